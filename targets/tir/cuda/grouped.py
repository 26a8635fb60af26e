"""Products of weights with a scale for each group of columns.

Sums of a group are integers, and groups gather in float32 one after the other, as the reference has
it. ``grouped``: a block has a row tile and eight tokens; its warps share the columns, leave the
sums of their groups in shared memory, and a thread a result gathers them. ``grouped_many``: a block
has 128 rows and 128 tokens, as :mod:`gemm` has.
"""

from __future__ import annotations

import itertools
from typing import Any

from bitcompile.targets.tir.cuda.device import (
    Ids,
    at,
    barrier,
    call,
    device_kernel,
    do,
    dynamic,
    long,
    put,
    read,
    rolled,
    shared,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.gemm import PAD, ROW_TILES, ROWS, STAGE_BYTES, STAGES, TILE_TOKENS
from bitcompile.targets.tir.cuda.gemm import finish as store_tile
from bitcompile.targets.tir.cuda.rows import FLOAT, each
from bitcompile.targets.tir.cuda.tile import (
    TILE_ROWS,
    TOKEN_UNIT,
    TOKENS,
    UNIT_COLUMNS,
    UNIT_WORDS,
)
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

WARPS = 8
THREADS = 32 * WARPS
AHEAD = 3
"""Units that a warp loads at once."""
UNIT_BLOCKS = UNIT_COLUMNS // 16
RESULTS = TILE_ROWS * TOKENS
PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("w", "uint32*"), ("w_scale", "float32*"),
    ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "units", "token_groups", "tiles", "groups", "group_blocks", "share", "type_y",
        "has_bias", "has_residual",
    )),
]  # fmt: skip


def grouped(name: str) -> Any:
    """``y[m, n] = fl(1 / s[m]) * sum_j fl(w_scale[n, j] * fl(acc[m, n, j]))``, bias and residual.

    ``w_scale``: ``[tiles, groups, 16]``; a group has ``group_blocks`` times 16 columns, the last
    maybe fewer. ``share``: units that a warp takes in one turn, whole groups. Grid: tiles,
    ceil(M / 8). Dynamic shared memory: for every group of a turn RESULTS sums and 16 scales.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, groups: Expr, group_blocks: Expr, share: Expr, type_y: Expr,
             has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = view(dynamic(), "float32")
        tile, lane = ids.block_x, ids.lane
        g, c = T.floordiv(lane, 4), lane % 4
        held, b = local(AHEAD * 4, "uint32"), local(AHEAD * 8, "int32")
        low, high, sums = (local(4, "int32") for _ in range(3))
        total = variable(T.float32(0), "float32")
        block, group = (variable(T.int32(0), "int32") for _ in range(2))
        own = variable(T.floordiv(share * UNIT_BLOCKS, group_blocks), "int32")[0]
        turn_groups = variable(own * WARPS, "int32")[0]

        def clear() -> None:
            for buffer in (low, high, sums):
                for i in range(4):
                    put(buffer, T.int32(0), i)
            put(block, T.int32(0))

        def finish_group() -> None:
            for half, e in itertools.product(range(2), range(2)):
                i, row, token = half * 2 + e, half * 8 + g, c * 2 + e
                acc = T.shift_right(low[i], 2 * half) + T.shift_right(high[i], 4 + 2 * half)
                whole = T.cast(acc - sums[i], "float32")
                put(room, whole, group[0] * RESULTS + row * TOKENS + token)
            put(group, group[0] + 1)
            clear()

        def sum_units(first: Expr, count: Expr) -> None:
            """The groups of some units, into shared memory."""
            for i in range(AHEAD):
                word = (long(tile) * units + first + i) * UNIT_WORDS + lane * 4
                address = call("uint64", "bc_pointer", at(w, word))
                do("bc_load_unit", at(held, i * 4), address, T.cast(i < count, "int32"))
            do("bc_wait_for_earlier")
            for i in range(AHEAD):
                start = (long(first + i) * token_groups + ids.block_y) * TOKEN_UNIT
                with when(i < count):
                    for k in range(8):
                        piece = T.bitwise_xor(T.int32(k), g)
                        from_ = start + g * UNIT_COLUMNS + piece * 16 + c * 4
                        put(b, read("int32", "bc_load_int_at", q.data, from_), i * 8 + k)
            for i in range(AHEAD):
                with when(i < count):
                    for k in range(8):
                        into, part = (high, "high") if k % 2 else (low, "low")
                        word = held[i * 4 + k // 2]
                        do(f"bc_mma_{part}", at(into, 0), word, b[i * 8 + k])
                        do("bc_mma_ones", at(sums, 0), b[i * 8 + k])
                        put(block, block[0] + 1)
                        with when(block[0] == group_blocks):
                            finish_group()

        do("bc_let_next_start")
        turns = T.floordiv(units + share * WARPS - 1, share * WARPS)
        with rolled(turns) as turn:
            passed = variable(turn * turn_groups, "int32")[0]
            here = variable(T.min(turn_groups, groups - passed), "int32")[0]

            def bring_scales(i: Expr) -> None:
                from_ = (long(tile) * groups + passed) * (TILE_ROWS * 4) + i * 16
                do("bc_copy_async16", at(room, turn_groups * RESULTS + i * 4), w_scale.data, from_)

            each(ids, here * (TILE_ROWS // 4), bring_scales, THREADS)
            clear()
            put(group, ids.warp * own)
            begin = variable((turn * WARPS + ids.warp) * share, "int32")[0]
            mine = variable(T.min(share, units - begin), "int32")[0]
            with rolled(T.floordiv(T.max(mine, 0) + (AHEAD - 1), AHEAD)) as step:
                sum_units(begin + step * AHEAD, mine - step * AHEAD)
            with when(block[0] > 0):
                finish_group()
            do("bc_copy_wait")
            barrier()
            with when(ids.thread < RESULTS), T.serial(here) as j:
                by = room[turn_groups * RESULTS + j * TILE_ROWS + T.floordiv(ids.thread, TOKENS)]
                part = variable(room[j * RESULTS + ids.thread] * by, "float32")[0]
                put(total, total[0] + part)
            barrier()
        n = tile * TILE_ROWS + T.floordiv(ids.thread, TOKENS)
        m = ids.block_y * TOKENS + ids.thread % TOKENS
        do("bc_wait_for_earlier")
        with when(T.And(ids.thread < RESULTS, T.And(n < N, m < M))):
            by = read("float32", "bc_load", s.data, long(m), FLOAT)
            inverse = variable(call("float32", "__frcp_rn", by), "float32")[0]
            result = variable(total[0] * inverse, "float32")
            to = long(m) * N + n
            with when(has_bias != 0):
                put(result, result[0] + bias[n])
            with when(has_residual != 0):
                more = read("float32", "bc_load", residual.data, to, type_y)
                put(result, result[0] + more)
            do("bc_store", y.data, to, result[0], type_y)

    return device_kernel(name, PARAMETERS, THREADS, body)


# --- many tokens ----------------------------------------------------------------------------------

MANY_THREADS = 256
"""Of ``grouped_many``: a warp has 64 rows and 32 tokens."""
MANY_LEAST = 2
"""Blocks of 16 columns in its smallest group, which are one product of the tensor cores."""
ROUND = 0x4B400000
"""1.5 * 2**23 as a float32: its bits plus a small integer are that float plus the integer."""
ONES = 0x55555555
"""A word of codes 1."""


def grouped_many(name: str) -> Any:
    """The same product, for ``group_blocks`` a multiple of MANY_LEAST.

    Grid: ceil(N / 128), ceil(M / 128); q is padded to whole tiles. Dynamic shared memory as that of
    :func:`gemm.gemm`. Codes are weights plus one, so that a row of ones gives what is too much of a
    sum. Sums begin with ROUND: one float32 subtraction of the two leaves the weights' own, exactly.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, groups: Expr, group_blocks: Expr, share: Expr, type_y: Expr,
             has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = dynamic()
        done = view(room, "float32")
        inverse = shared(TILE_TOKENS, "float32")
        rows_at, tokens_at = ids.warp % 2 * 64, T.floordiv(ids.warp, 2) * 32
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4
        acc, totals = local(64, "int32"), local(64, "float32")
        ones = local(16, "int32")
        held, coming = local(16, "uint32"), local(16, "uint32")
        b = local(8, "int32")
        scales = local(8, "float32")
        block, group = (variable(T.int32(0), "int32") for _ in range(2))

        def tile_of(i: int) -> Expr:
            return T.min(ids.block_x * ROW_TILES + T.floordiv(rows_at, TILE_ROWS) + i, tiles - 1)

        def weights(to: Buffer, unit: Expr) -> None:
            for i in range(4):
                word = (long(tile_of(i)) * units + unit) * UNIT_WORDS + ids.lane * 4
                do("bc_load_weights", at(to, i * 4), at(w, word))

        def copy(unit: Expr) -> None:
            start = long(unit) * token_groups + ids.block_y * (TILE_TOKENS // TOKENS)
            for i in range(STAGE_BYTES // (16 * MANY_THREADS)):
                byte = (i * MANY_THREADS + ids.thread) * 16
                to = at(room, unit % STAGES * STAGE_BYTES + byte)
                do("bc_copy_async16", to, q.data, start * TOKEN_UNIT + byte)

        def begin_group() -> None:
            """Its scales come while its columns are multiplied."""
            for i, half in itertools.product(range(4), range(2)):
                row = (long(tile_of(i)) * groups + group[0]) * TILE_ROWS + half * 8 + g
                put(scales, w_scale[row], i * 2 + half)
            with T.unroll(64) as i:
                put(acc, T.int32(ROUND), i)
            with T.unroll(16) as i:
                put(ones, T.int32(ROUND), i)
            put(block, T.int32(0))

        def finish_group() -> None:
            for i, j, half, e in itertools.product(range(4), range(4), range(2), range(2)):
                at_ = (i * 4 + j) * 4 + half * 2 + e
                whole = T.reinterpret("float32", acc[at_])
                offset = T.reinterpret("float32", ones[j * 4 + e])
                own = variable(whole - offset, "float32")[0]
                part = variable(own * scales[i * 2 + half], "float32")[0]
                put(totals, totals[at_] + part, at_)
            put(group, group[0] + 1)
            with when(group[0] < groups):
                begin_group()

        do("bc_let_next_start")
        with T.unroll(64) as i:
            put(totals, T.float32(0), i)
        begin_group()
        weights(held, T.int32(0))
        do("bc_wait_for_earlier")

        def invert(i: Expr) -> None:
            m = T.min(ids.block_y * TILE_TOKENS + i, M - 1)
            by = read("float32", "bc_load", s.data, long(m), FLOAT)
            put(inverse, call("float32", "__frcp_rn", by), i)

        each(ids, T.int32(TILE_TOKENS), invert, MANY_THREADS)
        for stage in range(STAGES - 1):
            with when(units > stage):
                copy(T.int32(stage))
            do("bc_copy_commit")
        with T.serial(units) as unit:
            do("bc_copy_wait2")
            barrier()
            with when(unit + (STAGES - 1) < units):
                copy(unit + (STAGES - 1))
            do("bc_copy_commit")
            with when(unit + 1 < units):
                weights(coming, unit + 1)
            for t in range(4):
                for j in range(2):
                    row = tokens_at + j * 16 + ids.lane % 8 + T.floordiv(ids.lane, 16) * 8
                    piece = T.bitwise_xor(2 * t + T.floordiv(ids.lane, 8) % 2, ids.lane % 8)
                    from_ = unit % STAGES * STAGE_BYTES + row * UNIT_COLUMNS + piece * 16
                    do("bc_load_matrix4", at(b, j * 4), at(room, from_))
                for j in range(4):
                    do("bc_mma", at(ones, j * 4), T.uint32(ONES), b[j * 2], b[j * 2 + 1])
                for i, j in itertools.product(range(4), range(4)):
                    operands = (held[i * 4 + t], b[j * 2], b[j * 2 + 1])
                    do("bc_mma", at(acc, (i * 4 + j) * 4), *operands)
                put(block, block[0] + MANY_LEAST)
                with when(T.And(block[0] == group_blocks, group[0] < groups)):
                    finish_group()
            for i in range(16):
                put(held, coming[i], i)
        with when(T.And(block[0] > 0, group[0] < groups)):
            finish_group()
        barrier()
        for i, half in itertools.product(range(4), range(2)):
            row = rows_at + i * TILE_ROWS + half * 8 + g
            n = ids.block_x * ROWS + row
            more = variable(T.float32(0), "float32")
            with when(T.And(has_bias != 0, n < N)):
                put(more, bias[n])
            for j, e in itertools.product(range(4), range(2)):
                token = tokens_at + j * 8 + c * 2 + e
                result = variable(
                    totals[(i * 4 + j) * 4 + half * 2 + e] * inverse[token], "float32"
                )
                with when(has_bias != 0):
                    put(result, result[0] + more[0])
                put(done, result[0], token * (ROWS + PAD) + row)
        barrier()
        store_tile(ids, done, T.int32(0), ids.block_x * ROWS, ids.block_y * TILE_TOKENS,
                   TILE_TOKENS, MANY_THREADS, residual, y, M, N, type_y, has_residual)  # fmt: skip

    return device_kernel(name, PARAMETERS, MANY_THREADS, body)
