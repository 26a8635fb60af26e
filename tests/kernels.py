"""Kernels called one by one, through ``driver.c`` on this machine's CPU or an emulated one."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile import numerics
from bitcompile.packing import CPU_TILE, Layout, PackedTernary, layout
from bitcompile.targets import resolve
from bitcompile.targets.tir import arm, x86
from bitcompile.targets.tir.linking import CSRC, zig
from bitcompile.targets.tir.plugin import coding, static_library
from tests.tools import program

Arrays = dict[str, np.ndarray]
DRIVER = Path(__file__).with_name("driver.c")
ROW_PAD = 16
"""Activation rows that kernels may read past the last one (``BC_ROW_PAD``)."""
GUARD = 5
"""Elements after each output that no kernel may touch."""


@dataclass(frozen=True)
class Call:
    """One kernel call: arrays, ints and floats in the order of ``kernels.h``."""

    kernel: str
    arguments: Sequence[Any]
    outputs: Mapping[str, int]
    """Names of the arrays it writes, and their places among the arguments."""

    def encode(self) -> bytes:
        """What the driver reads; outputs get guard elements behind."""
        parts = [struct.pack("<24si", self.kernel.encode(), len(self.arguments))]
        for i, value in enumerate(self.arguments):
            if isinstance(value, np.ndarray):
                data = (_guarded(value) if i in self.outputs.values() else value).tobytes()
                tag = b"o" if i in self.outputs.values() else b"b"
                parts.append(tag + struct.pack("<q", len(data)) + data)
            else:
                kind = "f" if isinstance(value, float) else "i"
                parts.append(struct.pack(f"<c{kind}", kind.encode(), value))
        return b"".join(parts)

    def decode(self, data: memoryview) -> tuple[Arrays, memoryview]:
        """The outputs, and what of ``data`` is left; a touched guard is an error."""
        results: Arrays = {}
        for name, place in sorted(self.outputs.items(), key=lambda item: item[1]):
            like = self.arguments[place]
            guarded = _guarded(like)
            found = np.frombuffer(data[: guarded.nbytes], like.dtype)
            np.testing.assert_array_equal(found[like.size :], guarded[like.size :])
            results[name] = found[: like.size].reshape(like.shape)
            data = data[guarded.nbytes :]
        return results, data


def _guarded(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array.reshape(-1), np.full(GUARD, 77, array.dtype)])


@dataclass(frozen=True)
class Machine:
    """A CPU that runs the driver: this one, or one that qemu emulates."""

    target: str
    triple: str
    """Of the driver; musl makes it a static program, which needs no libraries of that system."""
    emulator: tuple[str, ...] = ()

    @property
    def tiles(self) -> list[Layout]:
        """The layouts that its kernels read."""
        return [layout(id) for id in resolve(self.target).layouts]

    def run(self, calls: Sequence[Call], isa: str) -> list[Arrays]:
        """The outputs of each call, computed by one variant."""
        done = self._start([], isa, b"".join(call.encode() for call in calls))
        assert done.returncode == 0, done.stderr.decode()
        left = memoryview(done.stdout)
        results = []
        for call in calls:
            outputs, left = call.decode(left)
            results.append(outputs)
        assert not left
        return results

    def picks(self, isa: str = "") -> str:
        """The variant chosen when ``BITCOMPILE_ISA`` is ``isa``, or the reason for none."""
        done = self._start(["variant"], isa)
        return (done.stderr if done.returncode else done.stdout).decode().strip()

    def _start(self, more: list[str], isa: str, data: bytes = b"") -> Any:
        emulator = [program(self.emulator[0]), *self.emulator[1:]] if self.emulator else []
        command = [*emulator, str(_driver(self.target, self.triple)), *more]
        environment = {**os.environ, "BITCOMPILE_ISA": isa}
        return subprocess.run(
            command, input=data, capture_output=True, env=environment, check=False
        )


def emulated(cpu: str) -> Machine:
    """An AArch64 machine with a CPU that ``qemu-aarch64 -cpu help`` lists."""
    return Machine("arm", "aarch64-linux-musl", ("qemu-aarch64", "-cpu", cpu))


NATIVE = Machine("x86", "x86_64-linux-gnu.2.17")


@cache
def _driver(target: str, triple: str) -> Path:
    """The driver with a target's kernels, as its plugin has them."""
    archive = static_library(resolve(target).compile()[0])
    made = archive.with_name(f"driver-{os.getpid()}")
    flags = ["-std=c11", "-O2", "-fno-sanitize=all", "-Wall", "-Werror", f"-I{CSRC}"]
    zig(["cc", "-target", triple, *flags, str(DRIVER), str(archive), "-o", str(made)])
    final = archive.with_name("driver")
    made.replace(final)
    return final


# --- the calls of every operator ----------------------------------------------------------------


def padded_columns(K: int, tile: Layout = CPU_TILE) -> int:
    """Columns of quantised activations in memory."""
    return -(-K // tile.tile_k) * tile.tile_k


def quantize(x: np.ndarray) -> Call:
    """Outputs ``q``, ``s``, ``qsum`` of rows ``[M, K]``."""
    M, K = x.shape
    q, s, qsum = _row_outputs(M, K)
    arguments = [x, q, s, qsum, M, K, padded_columns(K)]
    return Call("quantize", arguments, {"q": 1, "s": 2, "qsum": 3})


def norm_quantize(x: np.ndarray, gamma: np.ndarray, eps: float) -> Call:
    """The same behind an RMSNorm."""
    M, K = x.shape
    q, s, qsum = _row_outputs(M, K)
    arguments = [x, gamma, q, s, qsum, M, K, padded_columns(K), float(eps)]
    return Call("norm_quantize", arguments, {"q": 2, "s": 3, "qsum": 4})


def _row_outputs(M: int, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (np.full((M, padded_columns(K)), 99, np.int8), np.full(M, 99, np.float32),
            np.full(M, 99, np.int32))  # fmt: skip


def group_sums(q: np.ndarray, group_size: int) -> Call:
    """Output ``sums`` ``[M, G]`` of padded rows q."""
    M, Kp = q.shape
    G = -(-Kp // group_size)
    sums = np.full((M, G), 99, np.int32)
    return Call("group_sums", [q, sums, M, Kp, G, group_size // 16], {"sums": 1})


def matmul(
    kind: str, weight: np.ndarray, q: np.ndarray, s: np.ndarray, scale: np.ndarray,
    bias: np.ndarray | None = None, residual: np.ndarray | None = None, group_size: int = 0,
    tile: Layout = CPU_TILE,
) -> Call:  # fmt: skip
    """``gemv`` or ``gemm`` of int8 q ``[M, K]``: output ``y`` ``[M, N + 3]``, 3 columns untouched.

    ``weight``: ternary ``[N, K]``; ``scale``: ``[N, G]``.
    """
    (M, K), N = q.shape, weight.shape[0]
    packed = PackedTernary.pack(weight, scale, tile, group_size)
    rows = np.zeros((M + ROW_PAD, padded_columns(K, tile)), np.int8)
    rows[:M, :K] = q
    G = scale.shape[1]
    spans = rows.astype(np.int32)
    step = group_size or rows.shape[1]
    qsum = np.stack([spans[:, j * step : (j + 1) * step].sum(axis=1) for j in range(G)], axis=1)
    scales = np.concatenate([s.reshape(-1), np.zeros(ROW_PAD, np.float32)]).astype(np.float32)
    stored = tile.encode_scale(packed.scale, group_size)
    ldy = N + 3
    y = np.full((M, ldy), 99, np.float32)
    wide = np.zeros((M, ldy), np.float32)
    if residual is not None:
        wide[:, :N] = residual
    tiles, KB, _ = packed.data.shape
    arguments = [packed.data, rows, qsum.astype(np.int32), scales, stored,
                 np.zeros(N, np.float32) if bias is None else bias, wide, y, N, ldy,
                 int(bias is not None), int(residual is not None), tiles, M, KB]  # fmt: skip
    arguments += [G, group_size // 16] if group_size else []
    what = "grouped" if group_size else coding(tile.id)
    return Call(f"{kind}_{what}", arguments, {"y": 7})


def glu(activation: str, both: np.ndarray) -> Call:
    """Output ``hidden`` ``[M, F]`` of ``[M, 2 F]``."""
    M, F = both.shape[0], both.shape[1] // 2
    up = both.reshape(-1)[F:]
    hidden = np.full((M, F), 99, np.float32)
    return Call(activation, [both, up, hidden, M, F, 2 * F, F], {"hidden": 2})


def head(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, quantized: Arrays | None = None
) -> Call:
    """``head_quantize`` of x (outputs ``hi``, ``lo``, ``offset``, ``s``), or ``head`` on those."""
    (M, K), (V, B, block_bytes) = x.shape, codes.shape
    per_block = block_bytes // 64
    width = B * block_bytes * 8 // bits
    if quantized is None:
        made = [np.full((M, width), 99, np.int8), np.full((M, width), 99, np.int8),
                np.full((M, B, 16), 99, np.int32), np.full(M, 99, np.float32)]  # fmt: skip
        names = {"hi": 1, "lo": 2, "offset": 3, "s": 4}
        return Call(f"head_quantize{bits}", [x, *made, M, K, B, per_block], names)
    y = np.full((M, V + 3), 99, np.float32)
    inputs = [quantized[name] for name in ("hi", "lo", "offset", "s")]
    arguments = [codes, scale, *inputs, y, V, M, B, per_block, V + 3]
    return Call(f"head{bits}", arguments, {"y": 6})


# --- cases: inputs, and what the reference makes of them ----------------------------------------


@dataclass(frozen=True)
class Case:
    """Kernel calls that belong to one set of inputs, and their expected outputs."""

    calls: Sequence[Call]
    expected: Sequence[Arrays]


def linear_case(
    a: Arrays, group_size: int, eps: float, tiles: Sequence[Layout] = (CPU_TILE,)
) -> Case:
    """A norm, a quantisation and both products, with weights in each of the layouts that hold them.

    ``a``: ``x`` ``[M, K]``, ``gamma``, ``weight`` ``[N, K]``, ``scale`` ``[N, G]``, ``bias``,
    ``residual``; and the reference's ``q``, ``s``, ``norm_q``, ``norm_s``, ``acc`` (int32
    ``[M, N]`` of q), ``y``.
    """
    M, K = a["x"].shape
    q, s = a["q"], a["s"]
    padded = np.pad(q, [(0, 0), (0, padded_columns(K) - K)])
    norm_padded = np.pad(a["norm_q"], [(0, 0), (0, padded_columns(K) - K)])
    one, ones = np.ones((a["weight"].shape[0], 1), np.float32), np.ones(M, np.float32)
    calls = [quantize(a["x"]), norm_quantize(a["x"], a["gamma"], eps)]
    expected = [{"q": padded, "s": s, "qsum": q.sum(axis=1, dtype=np.int32)},
                {"q": norm_padded, "s": a["norm_s"],
                 "qsum": a["norm_q"].sum(axis=1, dtype=np.int32)}]  # fmt: skip
    guard = np.full((M, 3), 99, np.float32)
    for kind, tile in product(("gemv", "gemm"), tiles):
        # Unit scales leave the accumulators themselves; below 2**24 a float32 holds them exactly.
        calls.append(matmul(kind, a["weight"], q, ones, one, tile=tile))
        expected.append({"y": np.hstack([a["acc"].astype(np.float32), guard])})
        if tile.holds(group_size):
            calls.append(matmul(kind, a["weight"], q, s, a["scale"], a["bias"], a["residual"],
                                group_size, tile))  # fmt: skip
            expected.append({"y": np.hstack([a["y"], guard])})
    if group_size:
        sums = [padded[:, j : j + group_size].sum(axis=1, dtype=np.int32)
                for j in range(0, padded.shape[1], group_size)]  # fmt: skip
        calls.append(group_sums(padded, group_size))
        expected.append({"sums": np.stack(sums, axis=1)})
    return Case(calls, expected)


def linear_reference(a: Arrays, group_size: int, eps: float) -> Arrays:
    """What :func:`linear_case` compares with, from the inputs in ``a``."""
    q, s = numerics.quantize_activations(a["x"])
    norm_q, norm_s = numerics.quantize_activations(numerics.rms_norm(a["x"], a["gamma"], eps))
    y = numerics.ternary_matmul(a["x"], a["weight"], a["scale"], group_size) + a["bias"]
    return {"q": q, "s": s[:, 0], "norm_q": norm_q, "norm_s": norm_s[:, 0],
            "acc": numerics.integer_matmul(q, a["weight"]),
            "y": (y + a["residual"]).astype(np.float32)}  # fmt: skip


def linear_inputs(
    rng: np.random.Generator, N: int, K: int, M: int, group_size: int, spread: float = 3
) -> Arrays:
    """Random inputs of :func:`linear_case`."""
    G = -(-K // group_size) if group_size else 1
    draw = rng.standard_normal
    return {"x": (draw((M, K)) * spread).astype(np.float32), "gamma": draw(K).astype(np.float32),
            "weight": rng.integers(-1, 2, (N, K)).astype(np.int8),
            "scale": rng.random((N, G)).astype(np.float32),
            "bias": draw(N).astype(np.float32),
            "residual": draw((M, N)).astype(np.float32)}  # fmt: skip


def glu_case(a: Arrays) -> Case:
    """Every gate on ``both`` ``[M, 2 F]``; ``a`` holds the reference's results by their names."""
    names = sorted(numerics.ACTIVATIONS)
    return Case([glu(name, a["both"]) for name in names], [{"hidden": a[name]} for name in names])


def glu_reference(both: np.ndarray) -> Arrays:
    """The gates' results."""
    g, up = np.split(both, 2, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        return {name: (act(g) * up).astype(np.float32)
                for name, act in numerics.ACTIVATIONS.items()}  # fmt: skip


def check(machine: Machine, isa: str, cases: Sequence[Case]) -> int:
    """Run cases on one variant; every output must equal the reference bit for bit (NaN is NaN).

    Returns the number of compared values.
    """
    calls = [call for case in cases for call in case.calls]
    expected = [outputs for case in cases for outputs in case.expected]
    compared = 0
    for call, found, wanted in zip(calls, machine.run(calls, isa), expected, strict=True):
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype, (call.kernel, name)
            np.testing.assert_array_equal(found[name], value, err_msg=f"{call.kernel} {name}")
            compared += value.size
    return compared


def check_head(machine: Machine, isa: str, a: Arrays, bits: int) -> int:
    """The head on ``x``, ``codes``, ``table_scale``: ``head_q`` (15-bit) and ``logits``."""
    quantized = machine.run([head(a["x"], a["codes"], a["table_scale"], bits)], isa)[0]
    B, per_block = a["codes"].shape[1], a["codes"].shape[2] // 64
    whole = _whole(quantized, isa)
    parts = whole.reshape(len(whole), B, per_block, 8 // bits, 64)
    q = parts.transpose(0, 1, 2, 4, 3).reshape(len(whole), -1)  # fields of a byte side by side
    K = a["x"].shape[1]
    np.testing.assert_array_equal(q[:, :K], a["head_q"])
    assert not q[:, K:].any()
    np.testing.assert_array_equal(quantized["s"], a["head_s"])
    y = machine.run([head(a["x"], a["codes"], a["table_scale"], bits, quantized)], isa)[0]["y"]
    np.testing.assert_array_equal(y[:, :-3], a["logits"])
    assert (y[:, -3:] == 99).all()
    return q.size + y.size


def _whole(quantized: Arrays, isa: str) -> np.ndarray:
    """15-bit activations, int32 ``[M, width]``, of the two halves a variant has of them."""
    words = next(i.word_dot for i in (*x86.ISAS, *arm.ISAS) if i.name == isa)
    if words is None:
        return quantized["hi"].astype(np.int32) * 128 + quantized["lo"]
    halves = [quantized[name].view(np.int16).astype(np.int32) for name in ("hi", "lo")]
    return np.stack(halves, axis=2).reshape(len(halves[0]), -1)


def head_inputs(
    rng: np.random.Generator, V: int, K: int, M: int, bits: int, block: int = 128
) -> Arrays:
    """A random head table and activations, with the reference's results."""
    codes, scale = numerics.quantize_table(rng.standard_normal((V, K)).astype("f4"), bits, block)
    x = rng.standard_normal((M, K)).astype(np.float32)
    return {"x": x, "codes": codes, "table_scale": scale, **head_reference(x, codes, scale, bits)}


def head_reference(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int) -> Arrays:
    """``head_q``, ``head_s`` and ``logits``."""
    q, s = numerics.quantize_head_activations(x)
    return {"head_q": q, "head_s": s[:, 0], "logits": numerics.head_matmul(x, codes, scale, bits)}


def sweep(seed: int, count: int, tiles: Sequence[Layout] = (CPU_TILE,)) -> Iterator[Case]:
    """Random cases whose shapes have tails: rows, columns, tokens and groups."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        # Every fifth has more columns than a panel, every fourth more rows than a workspace.
        N, K = int(rng.integers(1, 70)), int(rng.integers(1, 300 if i % 5 else 1200))
        M = int(rng.integers(1, 12)) if i % 4 else int(rng.integers(33, 230))
        group_size = int(rng.choice([0, 0, 16, 32, 64, 128, 256]))
        a = linear_inputs(rng, N, K, M, group_size, float(rng.choice([1e-7, 1, 1e4])))
        yield linear_case({**a, **linear_reference(a, group_size, 1e-5)}, group_size, 1e-5, tiles)
