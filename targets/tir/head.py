"""The language-model head: 15-bit activations against an 8- or 4-bit table, read in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bitcompile import numerics
from bitcompile.custom_ops.head_linear import BLOCK
from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    exact,
    in_powers,
    kernel,
    load,
    local,
    prefetch,
    splat,
    store,
    typed,
    when,
)
from bitcompile.targets.tir.gates import f32
from bitcompile.targets.tir.isa import Isa, shifted_bytes
from bitcompile.targets.tir.rows import add_lanes, quantized, row_magnitude, row_scale

CHUNK = 64
"""Table bytes of one step; an int32 lane covers 4 of them (``numerics.HEAD_LANES``)."""
SPLIT = 128
"""Activations are ``128 * hi + lo``, both int8, where the instruction set multiplies bytes."""
HALVES = ("hi", "lo")


def _zero(isa: Isa, bits: int) -> int:
    """What a code still exceeds its value by when it is multiplied.

    Where products are signed, 8-bit codes lose their zero point before.
    """
    return 0 if isa.signed and bits == 8 else 1 << (bits - 1)


def _parts(bits: int) -> int:
    """Activations that meet one table byte: the nibbles of 4-bit codes lie side by side."""
    return 8 // bits


def head_quantize(isa: Isa, name: str, bits: int) -> Any:
    """``void name(x, hi, lo, offset, s, M, K, B, per_block)``: 15-bit quantisation of ``[M, K]``.

    ``hi``, ``lo``: int8 ``[M, B, per_block, parts, 64]``: part p of a 64-byte chunk holds the
    activations that meet bit field p of its bytes (for 4-bit codes: even columns, then odd ones);
    columns from K on are 0. With ``isa.word_dot`` both are int16 ``[..., 32]``: whole activations,
    those of even bytes in ``hi``, of odd ones in ``lo``. ``offset``: int32 ``[M, B, 16]``, where
    each lane's sum begins: it takes back what the codes' zero point will add. ``s``: float32
    ``[M]``.
    """
    parts = _parts(bits)
    zero = _zero(isa, bits)
    lanes = numerics.HEAD_LANES

    def body(x: Buffer, hi: Buffer, lo: Buffer, offset: Buffer, s: Buffer, M: Expr, K: Expr,
             B: Expr, per_block: Expr) -> None:  # fmt: skip
        block = per_block * (CHUNK * parts)
        with T.serial(M) as m:
            limit = float(numerics.HEAD_LIMIT)
            magnitude = row_magnitude(lambda k, lanes: load(x, m * K + k, lanes), K)
            scale = row_scale(magnitude, limit, s, m)
            with T.serial(B) as b:
                store(offset, (m * B + b) * lanes, const(0, "int32", lanes), lanes)
                with T.serial(block) as inside:
                    k = b * block + inside
                    value = T.if_then_else(k < K, x[m * K + k], f32(0.0, 1))
                    # Through a variable: TVM's simplifier would multiply the rounding constant
                    # inside the expression out of int32's range.
                    whole = local(1, "int32")
                    store(whole, 0, quantized(value, scale, 1), 1)
                    q = whole[0]
                    chunk = T.floordiv(inside, CHUNK * parts)
                    within = T.floormod(inside, CHUNK * parts)
                    byte, part = T.floordiv(within, parts), T.floormod(within, parts)
                    at = (m * B + b) * block + (chunk * parts + part) * CHUNK
                    (_store_digits if isa.word_dot is None else _store_word)(hi, lo, at, byte, q)
                    lane = (m * B + b) * lanes + T.floordiv(byte, CHUNK // lanes)
                    store(offset, lane, offset[lane] - q * zero, 1)

    pointers = [("x", "float32*"), ("hi", "int8*"), ("lo", "int8*"), ("offset", "int32*")]
    sizes = [(n, "int32") for n in ("M", "K", "B", "per_block")]
    return kernel(name, [*pointers, ("s", "float32*"), *sizes], body)


def _store_digits(hi: Buffer, lo: Buffer, at: Expr, byte: Expr, q: Expr) -> None:
    high = T.shift_right(q + T.int32(SPLIT // 2), T.int32(7))
    store(hi, at + byte, T.cast(high, "int8"), 1)
    store(lo, at + byte, T.cast(q - high * SPLIT, "int8"), 1)


def _store_word(hi: Buffer, lo: Buffer, at: Expr, byte: Expr, q: Expr) -> None:
    for odd, buffer in enumerate((hi, lo)):
        with when(T.floormod(byte, 2) == odd):
            store(buffer, at + byte - odd, T.cast(q, "int8"), 1)
            store(buffer, at + byte - odd + 1, T.cast(T.shift_right(q, T.int32(8)), "int8"), 1)


def head(isa: Isa, name: str, bits: int) -> Any:
    """``void name(table, scale, hi, lo, offset, s, y, V, M, B, per_block, ldy)``: ``V`` logits.

    ``table``: uint8 ``[V, B * per_block, 64]``; ``scale``: float32 ``[V, B]``; ``hi``, ``lo``,
    ``offset``, ``s`` as :func:`head_quantize` leaves them; ``y``: float32 ``[M, ldy]``;
    ``per_block``: 64-byte chunks under one scale.

    Callers give no more table than the second cache holds, so that it is read once from memory for
    any number of activation rows: a register tile of them walks it, then the next.
    """

    def body(table: Buffer, scale: Buffer, hi: Buffer, lo: Buffer, offset: Buffer, s: Buffer,
             y: Buffer, V: Expr, M: Expr, B: Expr, per_block: Expr, ldy: Expr) -> None:  # fmt: skip
        made = _Head(isa, bits, table, scale, {"hi": hi, "lo": lo}, offset, s, y, B, per_block, ldy)
        in_powers(M, isa.head.rows, lambda m, size: made.rows(V, m, size))

    pointers = [("table", "uint8*"), ("scale", "float32*"), ("hi", "int8*"), ("lo", "int8*")]
    pointers += [("offset", "int32*"), ("s", "float32*"), ("y", "float32*")]
    sizes = [(n, "int32") for n in ("V", "M", "B", "per_block", "ldy")]
    return kernel(name, pointers + sizes, body)


@dataclass(frozen=True)
class _Head:
    """One kernel's operands; its methods emit the steps of :func:`head`."""

    isa: Isa
    bits: int
    table: Buffer
    scale: Buffer
    halves: Mapping[str, Buffer]
    """The activations, as :func:`head_quantize` leaves them."""
    offset: Buffer
    s: Buffer
    y: Buffer
    B: Expr
    per_block: int | Expr
    """A number is unrolled."""
    ldy: Expr

    @property
    def sums(self) -> tuple[str, ...]:
        """Accumulators of a lane: one for each digit of an activation."""
        return HALVES if self.isa.word_dot is None else ("lo",)

    def rows(self, V: Expr, m: Expr, size: int) -> None:
        """The whole table times ``size`` activation rows from ``m`` on."""
        if self.bits == 4 and size > 1:  # unrolled, its sums would not fit the registers
            self._walk(V, m, size)
            return
        usual = BLOCK // (CHUNK * _parts(self.bits))  # other blocks run the same steps in a loop
        with when(self.per_block == usual):
            replace(self, per_block=usual)._walk(V, m, size)
        with when(self.per_block != usual):
            self._walk(V, m, size)

    def _walk(self, V: Expr, m: Expr, size: int) -> None:
        # A single row is bound by memory, which gives more to one stream than to several.
        wide = self.isa.head.table_rows if size > 1 else 1
        with T.serial(T.floordiv(V, wide)) as several:
            self._tile(several * wide, m, wide, size)
        if wide > 1:
            with T.serial(T.floormod(V, wide)) as single:
                self._tile(T.floordiv(V, wide) * wide + single, m, 1, size)

    def _tile(self, v: Expr, m: Expr, wide: int, size: int) -> None:
        """``y[m : m + size, v : v + wide]``."""
        lanes = numerics.HEAD_LANES
        cells = [(r, t) for r in range(size) for t in range(wide)]
        sums = local(len(cells) * lanes, "float32")
        for i in range(len(cells)):
            store(sums, i * lanes, f32(0.0, lanes), lanes)
        with T.serial(self.B) as b:
            acc = {half: local(len(cells) * lanes, "int32") for half in self.sums}
            for i, (r, _) in enumerate(cells):
                for half in self.sums:
                    store(acc[half], i * lanes, const(0, "int32", lanes), lanes)
                start = load(self.offset, ((m + r) * self.B + b) * lanes, lanes)
                store(acc["lo"], i * lanes, start, lanes)
            if isinstance(self.per_block, int):
                for c in range(self.per_block):
                    self._chunk(acc, v, m, b * self.per_block + c, wide, size)
            else:
                with T.serial(self.per_block) as c:
                    self._chunk(acc, v, m, b * self.per_block + c, wide, size)
            for i, (_, t) in enumerate(cells):
                total = load(acc["lo"], i * lanes, lanes)
                if "hi" in acc:
                    high = load(acc["hi"], i * lanes, lanes)
                    total = high * const(SPLIT, "int32", lanes) + total
                scale = splat(self.scale[(v + t) * self.B + b], lanes)
                part = exact(T.cast(total, f"float32x{lanes}") * scale, lanes)
                store(sums, i * lanes, load(sums, i * lanes, lanes) + part, lanes)
        for i, (r, t) in enumerate(cells):
            joined = add_lanes(load(sums, i * lanes, lanes), lanes, lambda p, q: p + q)
            inverse = exact(f32(1.0, 1) / self.s[m + r], 1)
            store(self.y, (m + r) * self.ldy + v + t, exact(joined, 1) * inverse, 1)

    def _chunk(
        self, acc: Mapping[str, Buffer], v: Expr, m: Expr, chunk: Expr, wide: int, size: int
    ) -> None:
        """Accumulate the products of one chunk of each table row with those of each half."""
        isa, parts = self.isa, _parts(self.bits)
        chunks = self.B * self.per_block
        bases = [((v + t) * chunks + chunk) * CHUNK for t in range(wide)]
        for base in bases:
            prefetch(self.table, base + isa.gemv.prefetch_bytes, isa.gemv.prefetch_locality)
        for g, part in product(range(isa.groups), range(parts)):
            for r, half in product(range(size), HALVES):
                at = (((m + r) * chunks + chunk) * parts + part) * CHUNK + g * isa.bytes
                a = load(self.halves[half], at, isa.bytes)
                for t, base in enumerate(bases):
                    w = load(self.table, base + g * isa.bytes, isa.bytes)
                    cell = (r * wide + t) * numerics.HEAD_LANES + g * isa.rows
                    into = acc[half if half in acc else "lo"]
                    total = self._dot(load(into, cell, isa.rows), w, part, half, a)
                    store(into, cell, total, isa.rows)

    def _dot(self, acc: Expr, v: Expr, part: int, half: str, a: Expr) -> Expr:
        """``acc`` and the products of one field of table bytes ``v`` with activations ``a``."""
        lanes = self.isa.bytes
        if self.isa.word_dot is not None:
            words = T.reinterpret(v, dtype=typed("uint16", lanes // 2))
            shift = self.bits * part + 8 * HALVES.index(half)
            if shift:
                words = T.shift_right(words, const(shift, "uint16", lanes // 2))
            if shift + self.bits < 16:
                mask = const((1 << self.bits) - 1, "uint16", lanes // 2)
                words = T.bitwise_and(words, mask)
            int16 = typed("int16", lanes // 2)
            return self.isa.word_dot(
                acc, T.reinterpret(words, dtype=int16), T.reinterpret(a, dtype=int16)
            )
        if self.bits == 8:
            code = T.bitwise_xor(v, const(128, "uint8", lanes)) if self.isa.signed else v
        else:
            moved = shifted_bytes(v, 4, lanes) if part else v
            code = T.bitwise_and(moved, const(15, "uint8", lanes))
        return self.isa.dot4(acc, code, a)
