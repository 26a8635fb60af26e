"""The language-model head: 15-bit activations against an 8- or 4-bit table, read in place."""

from __future__ import annotations

from itertools import product
from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.cuda.device import (
    Ids,
    at,
    call,
    device_kernel,
    do,
    long,
    put,
    read,
    rolled,
    shared,
    shuffle_xor,
    variable,
)
from bitcompile.targets.tir.cuda.rows import WARPS, block_max, each, magnitude, row_scale
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when
from bitcompile.targets.tir.head import CHUNK, SPLIT

THREADS = 256
ROWS = 64
"""Table rows of a block: 8 a warp, four lanes each, which have 16 bytes of a chunk of 64."""
AHEAD = {1: 8, 4: 8, 8: 4}
"""Chunks that a lane has under way, by the tokens that each is multiplied with."""

QUANTISE_PARAMETERS = [
    ("x", "uint8*"), ("hi", "int8*"), ("lo", "int8*"), ("s", "float32*"),
    ("K", "int32"), ("width", "int32"), ("type", "int32"),
]  # fmt: skip
PARAMETERS = [
    ("table", "uint32*"), ("scale", "float32*"), ("hi", "int8*"), ("lo", "int8*"),
    ("s", "float32*"), ("y", "float32*"),
    *((name, "int32") for name in ("M", "V", "B", "per_block")),
]  # fmt: skip


def head_quantize(name: str, bits: int) -> Any:
    """15-bit quantisation of the rows of ``x`` ``[M, K]``; a block a row.

    ``hi``, ``lo``: int8 ``[M, width / (64 parts), parts, 64]``, where part p of a 64-byte chunk
    holds the activations that meet bit field p of its bytes; zeros from K to ``width``. ``s``:
    float32 ``[M]``.
    """
    parts = 8 // bits

    def body(ids: Ids, x: Buffer, hi: Buffer, lo: Buffer, s: Buffer, K: Expr, width: Expr,
             type: Expr) -> None:  # fmt: skip
        m = ids.block_x
        most = shared(WARPS, "int32")
        do("bc_let_next_start")
        do("bc_wait_for_earlier")

        def value(k: Expr) -> Expr:
            return read("float32", "bc_load", x.data, long(m) * K + k, type)

        largest = variable(T.int32(0), "int32")
        each(ids, K, lambda k: put(largest, T.max(largest[0], magnitude(value(k)))))
        limit = float(numerics.HEAD_LIMIT)
        scale, kept = row_scale(block_max(ids, largest[0], most), limit)
        with when(ids.thread == 0):
            put(s, kept, m)

        def one(k: Expr) -> None:
            scaled = variable(T.float32(0), "float32")
            with when(k < K):
                put(scaled, value(k) * scale)
            whole = variable(call("int32", "__float2int_rn", scaled[0]), "int32")[0]
            high = variable(T.shift_right(whole + SPLIT // 2, 7), "int32")[0]
            within = k % (CHUNK * parts)
            byte, part = T.floordiv(within, parts), within % parts
            to = long(m) * width + (k - within + part * CHUNK + byte)
            put(hi, T.cast(high, "int8"), to)
            put(lo, T.cast(whole - high * SPLIT, "int8"), to)

        each(ids, width, one)

    return device_kernel(name, QUANTISE_PARAMETERS, THREADS, body)


def head(name: str, bits: int, tokens: int) -> Any:
    """``y`` ``[M, V]``: logits of the rows that :func:`head_quantize` left.

    ``table``: uint8 ``[V, B * per_block, 64]``; ``scale``: float32 ``[V, B]``; ``per_block``:
    64-byte chunks under one scale. The table is read once for ``tokens`` rows. Grid:
    ceil(V / ROWS), ceil(M / tokens).
    """
    parts, ahead = 8 // bits, AHEAD[tokens]

    def body(ids: Ids, table: Buffer, scale: Buffer, hi: Buffer, lo: Buffer, s: Buffer, y: Buffer,
             M: Expr, V: Expr, B: Expr, per_block: Expr) -> None:  # fmt: skip
        piece = ids.lane % 4
        row = ids.block_x * ROWS + ids.warp * 8 + T.floordiv(ids.lane, 4)
        v = T.min(row, V - 1)
        chunks = B * per_block
        held = local(ahead * 4, "uint32")
        word = long(v) * chunks * (CHUNK // 4) + piece * 4
        address = variable(call("uint64", "bc_pointer", at(table, word)), "uint64")[0]

        def load(i: int, chunk: Expr) -> None:
            from_ = address + T.cast(chunk, "uint64") * T.uint64(CHUNK)
            do("bc_load_unit", at(held, i * 4), from_, T.cast(chunk < chunks, "int32"))

        for i in range(ahead):
            load(i, T.int32(i))
        do("bc_let_next_start")
        do("bc_wait_for_earlier")
        sums, acc = local(4 * tokens, "float32"), local(8 * tokens, "int32")
        q, codes = local(4, "int32"), local(4, "int32")
        for i in range(4 * tokens):
            put(sums, T.float32(0), i)
        for i in range(8 * tokens):
            put(acc, T.int32(0), i)
        block, within = (variable(T.int32(0), "int32") for _ in range(2))
        first = ids.block_y * tokens
        # Rows beyond the last repeat it.
        starts = [
            long(T.min(first + t, M - 1)) * chunks * (parts * CHUNK) + piece * 16
            for t in range(tokens)
        ]

        def finish_block() -> None:
            by = variable(scale[v * B + block[0]], "float32")[0]
            for i in range(4 * tokens):
                high = i // 4 * 8 + i % 4
                # 4-bit codes were multiplied in the upper half of a byte.
                whole = variable(acc[high] * SPLIT + acc[high + 4], "int32")[0]
                if bits == 4:
                    whole = T.shift_right(whole, 4)
                part = variable(T.cast(whole, "float32") * by, "float32")[0]
                put(sums, sums[i] + part, i)
                put(acc, T.int32(0), high)
                put(acc, T.int32(0), high + 4)
            put(block, block[0] + 1)
            put(within, T.int32(0))

        with rolled(T.floordiv(chunks + (ahead - 1), ahead)) as turn:
            for i in range(ahead):
                chunk = turn * ahead + i
                with when(chunk < chunks):
                    for part in range(parts):
                        for j in range(4):
                            word, field = held[i * 4 + j], T.int32(part)
                            put(codes, call("int32", f"bc_codes{bits}", word, field), j)
                        place = (long(chunk) * parts + part) * CHUNK
                        for t, (which, source) in product(range(tokens), enumerate((hi, lo))):
                            do("bc_load_int4", at(q, 0), source.data, starts[t] + place)
                            for j in range(4):
                                to = t * 8 + which * 4 + j
                                put(acc, call("int32", "bc_dot_ss", codes[j], q[j], acc[to]), to)
                    put(within, within[0] + 1)
                    with when(within[0] == per_block):
                        finish_block()
                load(i, chunk + ahead)
        # Lane sums 8, then 4, then 2 and 1 apart: 4 words a lane, four lanes a row.
        for distance in (2, 1):
            for i in range(4 * tokens):
                put(sums, sums[i] + shuffle_xor(sums[i], distance), i)
        for t in range(tokens):
            m = first + t
            for j in range(2):
                put(sums, sums[t * 4 + j] + sums[t * 4 + j + 2], t * 4 + j)
            with when(T.And(T.And(piece == 0, row < V), m < M)):
                by = read("float32", "bc_load", s.data, long(m), T.int32(1))
                inverse = variable(call("float32", "__frcp_rn", by), "float32")[0]
                put(y, (sums[t * 4] + sums[t * 4 + 1]) * inverse, long(m) * V + row)

    return device_kernel(name, PARAMETERS, THREADS, body)
