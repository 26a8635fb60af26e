"""The language-model head: 15-bit activations against an 8- or 4-bit table, read in place."""

from __future__ import annotations

from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    exact,
    kernel,
    load,
    local,
    prefetch,
    splat,
    store,
)
from bitcompile.targets.tir.gates import f32
from bitcompile.targets.tir.isa import Isa, shifted_bytes
from bitcompile.targets.tir.rows import add_lanes, quantized, row_magnitude, row_scale

CHUNK = 64
"""Table bytes of one step; an int32 lane covers 4 of them (``numerics.HEAD_LANES``)."""
SPLIT = 128
"""Activations are ``128 * hi + lo``, both int8."""


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
    columns from K on are 0. ``offset``: int32 ``[M, B, 16]``, what the codes' zero point adds to
    each lane. ``s``: float32 ``[M]``.
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
                    high = T.shift_right(q + T.int32(SPLIT // 2), T.int32(7))
                    chunk = T.floordiv(inside, CHUNK * parts)
                    within = T.floormod(inside, CHUNK * parts)
                    byte, part = T.floordiv(within, parts), T.floormod(within, parts)
                    at = (m * B + b) * block + (chunk * parts + part) * CHUNK + byte
                    store(hi, at, T.cast(high, "int8"), 1)
                    store(lo, at, T.cast(q - high * SPLIT, "int8"), 1)
                    lane = (m * B + b) * lanes + T.floordiv(byte, CHUNK // lanes)
                    store(offset, lane, offset[lane] + q * zero, 1)

    pointers = [("x", "float32*"), ("hi", "int8*"), ("lo", "int8*"), ("offset", "int32*")]
    sizes = [(n, "int32") for n in ("M", "K", "B", "per_block")]
    return kernel(name, [*pointers, ("s", "float32*"), *sizes], body)


def head(isa: Isa, name: str, bits: int) -> Any:
    """``void name(table, scale, hi, lo, offset, s, y, V, M, B, per_block, ldy)``: ``V`` logits.

    ``table``: uint8 ``[V, B * per_block, 64]``; ``scale``: float32 ``[V, B]``; ``hi``, ``lo``,
    ``offset``, ``s`` as :func:`head_quantize` leaves them; ``y``: float32 ``[M, ldy]``;
    ``per_block``: 64-byte chunks under one scale.
    """
    parts = _parts(bits)
    lanes = numerics.HEAD_LANES

    def code(v: Expr, part: int) -> Expr:
        if bits == 8:
            sign = const(128, "uint8", isa.bytes)
            return T.bitwise_xor(v, sign) if isa.signed else v
        moved = shifted_bytes(v, 4, isa.bytes) if part else v
        return T.bitwise_and(moved, const(15, "uint8", isa.bytes))

    def body(table: Buffer, scale: Buffer, hi: Buffer, lo: Buffer, offset: Buffer, s: Buffer,
             y: Buffer, V: Expr, M: Expr, B: Expr, per_block: Expr, ldy: Expr) -> None:  # fmt: skip
        row_bytes = B * per_block * CHUNK
        with T.serial(M) as m, T.serial(V) as v:
            sums = local(lanes, "float32")
            store(sums, 0, f32(0.0, lanes), lanes)
            with T.serial(B) as b:
                acc = {w: local(lanes, "int32") for w in ("hi", "lo")}
                for buffer in acc.values():
                    store(buffer, 0, const(0, "int32", lanes), lanes)
                with T.serial(per_block) as c:
                    chunk = b * per_block + c
                    base = v * row_bytes + chunk * CHUNK
                    prefetch(table, base + isa.gemv.prefetch_bytes, isa.gemv.prefetch_locality)
                    for g in range(isa.groups):
                        w = load(table, base + g * isa.bytes, isa.bytes)
                        for part in range(parts):
                            at = ((m * B * per_block + chunk) * parts + part) * CHUNK
                            for which, source in (("hi", hi), ("lo", lo)):
                                a = load(source, at + g * isa.bytes, isa.bytes)
                                into = load(acc[which], g * isa.rows, isa.rows)
                                total = isa.dot4(into, code(w, part), a)
                                store(acc[which], g * isa.rows, total, isa.rows)
                total = load(acc["hi"], 0, lanes) * const(SPLIT, "int32", lanes)
                total = total + load(acc["lo"], 0, lanes)
                total = total - load(offset, (m * B + b) * lanes, lanes)
                part_sum = T.cast(total, f"float32x{lanes}") * splat(scale[v * B + b], lanes)
                store(sums, 0, load(sums, 0, lanes) + exact(part_sum, lanes), lanes)
            joined = add_lanes(load(sums, 0, lanes), lanes, lambda p, q: p + q)
            inverse = exact(f32(1.0, 1) / s[m], 1)
            store(y, m * ldy + v, exact(joined, 1) * inverse, 1)

    pointers = [("table", "uint8*"), ("scale", "float32*"), ("hi", "int8*"), ("lo", "int8*")]
    pointers += [("offset", "int32*"), ("s", "float32*"), ("y", "float32*")]
    sizes = [(n, "int32") for n in ("V", "M", "B", "per_block", "ldy")]
    return kernel(name, pointers + sizes, body)
