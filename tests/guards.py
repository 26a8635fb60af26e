"""Kernels on buffers of exactly the size they may touch, beside pages that they may not.

``python -m tests.guards KERNELS.so`` calls every kernel of every variant that this CPU runs, with
tails of every kind; a kernel that reads or writes past an end dies of SIGSEGV, and the last line
printed names it. Sizes are those that ``kernels.h`` promises.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile.packing import CPU_TILE, T5_TILE, Layout
from bitcompile.targets.tir.gemm import panel_bytes, partial_values
from bitcompile.targets.tir.isa import Isa
from bitcompile.targets.tir.plugin import GENERATORS, coding, symbol
from bitcompile.targets.tir.x86 import ISAS

PAGE = mmap.PAGESIZE
PROTECTED = 0  # PROT_NONE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
ROWS, COLUMNS = (1, 15, 16, 17, 70), (1, 15, 16, 17, 130)
BATCHES = (1, 3, 8, 13)
GROUPS = (16, 64)


class Guarded:
    """Buffers between protected pages; ``at_end`` says which side of them touches one."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._kept: list[mmap.mmap] = []

    def __call__(self, shape: tuple[int, ...], dtype: Any, fill: Any = None) -> np.ndarray:
        """An array of its own; ``fill``: values, default zeros."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pages = -(-size // PAGE)
        region = mmap.mmap(-1, (pages + 2) * PAGE)
        self._kept.append(region)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (start, start + (pages + 1) * PAGE):
            if LIBC.mprotect(guard, PAGE, PROTECTED):
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = (pages + 1) * PAGE - size if self.at_end else PAGE
        array = np.frombuffer(region, np.uint8, size, offset).view(dtype).reshape(shape)
        if fill is not None:
            array[...] = fill
        return array


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Caller:
    """Calls the kernels of one variant."""

    def __init__(self, library: ctypes.CDLL, isa: Isa, at_end: bool) -> None:
        self.library, self.isa, self.at_end = library, isa, at_end
        self.rng = np.random.default_rng(0)
        self.new = Guarded(at_end)

    def call(self, field: str, *arguments: Any) -> None:
        """Arrays go as pointers, None as NULL, floats as float, others as int32."""
        shapes = [a.shape if isinstance(a, np.ndarray) else a for a in arguments]
        side = "end" if self.at_end else "begin"
        print(f"\r{symbol(field, self.isa.name)} {side} {shapes}", end="", flush=True)
        function = getattr(self.library, symbol(field, self.isa.name))
        function.restype = None
        function(*(_argument(a) for a in arguments))
        self.new = Guarded(self.at_end)

    def floats(self, *shape: int) -> np.ndarray:
        return self.new(shape, np.float32, self.rng.standard_normal(shape))

    def codes(self, tile: Layout, *shape: int) -> np.ndarray:
        """Valid weight bytes: every code 0, 1 or 2."""
        fields = self.rng.integers(0, 3, (*shape, tile.codec.fields)).astype(np.uint8)
        return self.new(shape, np.uint8, tile.codec.join(fields))

    def whole(self, dtype: Any, *shape: int) -> np.ndarray:
        return self.new(shape, dtype, self.rng.integers(-100, 100, shape))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)


def rows(c: Caller) -> None:
    """Quantisation, norm and gate."""
    for M in BATCHES:
        for K in COLUMNS:
            Kp = padded(K, CPU_TILE.tile_k)

            def results(M: int = M, Kp: int = Kp) -> tuple[np.ndarray, ...]:
                return c.new((M, Kp), np.int8), c.new((M,), np.float32), c.new((M,), np.int32)

            c.call("quantize", c.floats(M, K), *results(), M, K, Kp)
            c.call("norm_quantize", c.floats(M, K), c.floats(K), *results(), M, K, Kp, 1e-5)
            for gate in (field for field in GENERATORS if field.startswith("glu")):
                for ld, ld_hidden in ((K, K), (2 * K, K + 1)):
                    inputs = [_strided(c, M, K, ld) for _ in range(2)]
                    hidden = _strided(c, M, K, ld_hidden)
                    c.call(gate, *inputs, hidden, M, K, ld, ld_hidden)
            for size in GROUPS:
                G = -(-K // size)
                sums = c.new((M, G), np.int32)
                c.call("group_sums", c.whole(np.int8, M, Kp), sums, M, Kp, G, size // 16)


def _strided(c: Caller, M: int, K: int, ld: int) -> np.ndarray:
    """Rows of K that are ``ld`` apart, without what would follow the last."""
    return c.floats((M - 1) * ld + K)


def products(c: Caller) -> None:
    """Decode and prefill, with one scale a row or more."""
    for M in BATCHES:
        for N in ROWS:
            for K in COLUMNS:
                for tile, size in ((T5_TILE, 0), *((CPU_TILE, g) for g in (0, *GROUPS))):
                    for extras in (False, True):
                        _product(c, tile, M, N, K, size, extras)


def _product(c: Caller, tile: Layout, M: int, N: int, K: int, size: int, extras: bool) -> None:
    isa = c.isa
    KB, tiles = -(-K // tile.tile_k), -(-N // tile.tile_n)
    G = -(-K // size) if size else 1
    kind = "_grouped" if size else f"[BC_{coding(tile.id).upper()}]"

    def inputs(first: int, count: int, M: int) -> list[Any]:
        left = N - 16 * first
        scale = c.floats(count, G, 16) if size else c.floats(left)
        held = padded(M, isa.gemm.rows)
        bias, residual = (c.floats(left), c.floats(M, left)) if extras else (None, None)
        return [
            c.codes(tile, count, KB, tile.tile_bytes),
            c.whole(np.int8, held, tile.tile_k * KB),
            c.whole(np.int32, held, G),
            c.floats(held),
            scale,
            bias,
            residual,
            c.new((M, left), np.float32),
            left,
            left,
            int(extras),
            int(extras),
            count,
            M,
            KB,
        ]

    groups = [G, size // 16] if size else []
    if M <= 8:
        c.call(f"gemv{kind}", *inputs(0, tiles, M), *groups)
    for first in range(0, tiles, isa.gemm.tiles):
        count = min(isa.gemm.tiles, tiles - first)
        panel = c.new((panel_bytes(isa),), np.uint8)
        blocks = -(-M // isa.gemm.rows)
        partial = c.new((partial_values(isa) * blocks,), np.int32)
        c.call(f"gemm{kind}", *inputs(first, count, M), *groups, panel, partial)


def heads(c: Caller) -> None:
    """The head's table, of both widths."""
    for bits, blocks in ((8, (64, 128, 256)), (4, (128, 256))):
        for block in blocks:
            for M in (1, 2, 5, 7):
                for K in COLUMNS:
                    for V in ROWS:
                        _head(c, bits, block, M, K, V)


def _head(c: Caller, bits: int, block: int, M: int, K: int, V: int) -> None:
    B, size = -(-K // block), block * bits // 8
    hi, lo = c.new((M, B * block), np.int8), c.new((M, B * block), np.int8)
    offset, s = c.new((M, B * 16), np.int32), c.new((M,), np.float32)
    kept = c.new
    c.call(f"head_quantize{bits}", c.floats(M, K), hi, lo, offset, s, M, K, B, size // 64)
    table = c.whole(np.int8, V, B, size).view(np.uint8)
    y = c.new((M, V), np.float32)
    c.call(f"head{bits}", table, c.floats(V, B), hi, lo, offset, s, y, V, M, B, size // 64, V)
    del kept


def roofs(c: Caller) -> None:
    """What bench compares with."""
    for steps in (1, 3):
        out = c.new((64,), np.uint8)
        c.call("read_roof", c.whole(np.int8, 256 * steps), out, steps)
        c.call("dot_roof", c.whole(np.int8, 256), c.new((64,), np.uint8), steps)


KINDS: tuple[Callable[[Caller], None], ...] = (rows, products, heads, roofs)


def runnable() -> Iterator[Isa]:
    """The variants this CPU runs."""
    flags = next(
        line.split(":")[1].split()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")
    )
    names = {flag.replace("_", "") for flag in flags}
    for isa in ISAS:
        if names.issuperset(isa.features):
            yield isa


def main() -> int:
    """0 if no kernel touched a protected page."""
    faulthandler.enable()
    library = ctypes.CDLL(sys.argv[1])
    for isa in runnable():
        for at_end in (True, False):
            for kind in KINDS:
                kind(Caller(library, isa, at_end))
    print("\nno kernel left its buffers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
