"""The language-model head: 15-bit activations against an 8- or 4-bit table."""

from __future__ import annotations

from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.dsl import Buffer, Expr, T, const, when
from bitcompile.targets.tir.gates import f32
from bitcompile.targets.tir.head import CHUNK, SPLIT
from bitcompile.targets.tir.opencl.device import (
    barrier,
    call,
    device_kernel,
    divide,
    kept,
    shared,
)
from bitcompile.targets.tir.opencl.rows import LANES, _scale, _strided, _whole

ROWS = 4
"""Table rows of a work-group, 16 work-items each."""
WORDS = CHUNK // 4
"""Words of a 64-byte chunk: one for each of the 16 partial sums of a row."""
assert WORDS == numerics.HEAD_LANES


def head_quantize(name: str, field_bits: int) -> Any:
    """``void name(x, hi, lo, s, K, width)``: 15-bit quantisation of row ``get_group_id(0)``.

    ``x``: float32 ``[M, K]``; ``hi``, ``lo``: int8 ``[M, width / (64 parts), parts, 64]``, where
    part p of a 64-byte chunk holds the activations that meet bit field p of its bytes; columns
    from K to ``width`` are 0; ``s``: float32 ``[M]``.
    """
    parts = 8 // field_bits

    def body(group: Any, item: Any, x: Buffer, hi: Buffer, lo: Buffer, s: Buffer, K: Expr,
             width: Expr) -> None:  # fmt: skip
        m = group[0]
        limit = float(numerics.HEAD_LIMIT)
        scale = _scale(lambda k: x[m * K + k], limit, item[0], K, s, m)

        def one(k: Expr) -> None:
            value = kept(T.if_then_else(k < K, x[m * K + k], f32(0.0, 1)))
            whole = _whole(value, scale)
            high = kept(T.shift_right(whole + T.int32(SPLIT // 2), T.int32(7)), "int32")
            within = T.floormod(k, CHUNK * parts)
            byte, part = T.floordiv(within, parts), T.floormod(within, parts)
            at = m * width + k - within + part * CHUNK + byte
            T.buffer_store(hi, T.cast(high, "int8"), [at])
            T.buffer_store(lo, T.cast(whole - high * SPLIT, "int8"), [at])

        _strided(item[0], width, one)

    pointers = [("x", "float32*"), ("hi", "int8*"), ("lo", "int8*"), ("s", "float32*")]
    return device_kernel(name, [*pointers, ("K", "int32"), ("width", "int32")], (LANES, 1), body)


def head(name: str, field_bits: int) -> Any:
    """``void name(table, scale, hi, lo, s, y, V, B, per_block)``: ``ROWS`` logits of one row.

    ``table``: uint32 view of uint8 ``[V, B * per_block, 64]``; ``scale``: float32 ``[V, B]``;
    ``hi``, ``lo``: uint32 views of what :func:`head_quantize` leaves; ``y``: float32 ``[M, V]``.
    Work-group ``(i, m)``: rows ``[ROWS * i, ROWS * (i + 1))``.
    """
    parts = 8 // field_bits

    def signed(word: Expr, part: int) -> Expr:
        """Four codes less their zero point, as signed bytes."""
        if field_bits == 8:
            return T.bitwise_xor(word, T.uint32(0x80808080))
        moved = T.shift_right(word, T.uint32(4)) if part else word
        return call("uint32", "bc_nibbles", T.bitwise_and(moved, T.uint32(0x0F0F0F0F)))

    def body(group: Any, item: Any, table: Buffer, scale: Buffer, hi: Buffer, lo: Buffer,
             s: Buffer, y: Buffer, V: Expr, B: Expr, per_block: Expr) -> None:  # fmt: skip
        lane, m = item[0], group[1]
        row = group[0] * ROWS + item[1]
        v = T.min(row, V - 1)
        total = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(total, f32(0.0, 1), [0])
        with T.serial(B) as b:
            acc = T.alloc_buffer((2,), "int32", scope="local")
            for which in range(2):
                T.buffer_store(acc, T.int32(0), [which])
            with T.serial(per_block) as c:
                chunk = b * per_block + c
                word = kept(table[(v * B * per_block + chunk) * WORDS + lane], "uint32")
                for part in range(parts):
                    codes = kept(signed(word, part), "uint32")
                    at = ((m * B * per_block + chunk) * parts + part) * WORDS + lane
                    for which, source in enumerate((hi, lo)):
                        dot = call("int32", "bc_dot4", codes, source[at], acc[which])
                        T.buffer_store(acc, dot, [which])
            whole = T.cast(acc[0] * SPLIT + acc[1], "float32")
            T.buffer_store(total, total[0] + kept(whole * scale[v * B + b]), [0])
        sums = shared(ROWS * WORDS, "float32")
        T.buffer_store(sums, total[0], [item[1] * WORDS + lane])
        half = WORDS // 2
        barrier()
        while half:
            with when(lane < half):
                at = item[1] * WORDS + lane
                T.buffer_store(sums, sums[at] + sums[at + half], [at])
            barrier()
            half //= 2
        with when(T.And(lane == 0, row < V)):
            inverse = kept(divide(const(1.0, "float32", 1), s[m]))
            T.buffer_store(y, sums[item[1] * WORDS] * inverse, [m * V + row])

    pointers = [("table", "uint32*"), ("scale", "float32*"), ("hi", "uint32*"), ("lo", "uint32*")]
    pointers += [("s", "float32*"), ("y", "float32*")]
    sizes = [(n, "int32") for n in ("V", "B", "per_block")]
    return device_kernel(name, pointers + sizes, (WORDS, ROWS), body)
