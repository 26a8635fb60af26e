"""Products of weights with a scale for each group of columns.

Sums of a group are integers, and groups gather in float32 one after the other, as the reference has
it. ``grouped``: a block has a row tile and eight tokens; its warps share the columns, leave the
sums of their groups in shared memory, and a thread a result gathers them. ``grouped_many`` and, on
Hopper, ``grouped_wgmma``: a block has 128 rows and 128 tokens, as those of :mod:`gemm`.
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
from bitcompile.targets.tir.cuda.feed import (
    HOPPER_THREADS,
    OTHER_REGISTERS,
    WORKER_REGISTERS,
    WORKERS,
    Feed,
    Ring,
)
from bitcompile.targets.tir.cuda.gemm import ROW_TILES, STAGE_BYTES, STAGES, TILE_TOKENS
from bitcompile.targets.tir.cuda.leave import PAD, ROWS, store_tile
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


# --- many tokens on Hopper ------------------------------------------------------------------------

WGMMA_COLUMNS = (128, 64, 32)
"""Columns of one product of ``grouped_wgmma``: a group, or 128 of a longer one."""
WGMMA_STAGES = 8
"""Units of tokens under way or in use."""
WGMMA_AHEAD = 4
"""Units of weights that a warp has under way."""
HALF_TILE = TILE_TOKENS // 2
WGMMA_SHARED = 1024 + WGMMA_STAGES * STAGE_BYTES + HALF_TILE * (ROWS + PAD) * 4


def wgmma_source() -> str:
    """``bc_wgmma_group_COLUMNS(d, a, b, keep)``: starts a product of 64 rows and 128 tokens.

    It is added to ``d`` if ``keep``, else takes its place. ``bc_wgmma_128_wait`` ends it.
    """
    n = TILE_TOKENS // 2
    results = ", ".join(f'"+r"(d[{i}])' for i in range(n))
    names = ", ".join(f"%{i}" for i in range(n))
    text = ""
    for columns in WGMMA_COLUMNS:
        count = columns // 32
        products = []
        for t in range(count):
            a = ", ".join(f"%{n + 4 * t + i}" for i in range(4))
            products.append(
                f'"wgmma.mma_async.sync.aligned.m64n{TILE_TOKENS}k32.s32.s8.s8 {{{names}}}, '
                f'{{{a}}}, %{n + 4 * count + t}, {"q" if t else "p"};\\n"'
            )
        weights = ", ".join(f'"r"(a[{i}])' for i in range(4 * count))
        tokens = ", ".join(f'"l"(b + {2 * t})' for t in range(count))  # 32 bytes, in units of 16
        text += f"""
BC_INLINE void bc_wgmma_group_{columns}(int* d, const uint* a, uint64_t b, int keep) {{
  asm volatile("{{\\n.reg .pred p, q;\\nsetp.ne.s32 p, %{n + 5 * count}, 0;\\n"
    "setp.eq.u32 q, 0, 0;\\nwgmma.fence.sync.aligned;\\n"
    {" ".join(products)} "wgmma.commit_group.sync.aligned;\\n}}"
    : {results} : {weights}, {tokens}, "r"(keep) : "memory");
}}"""
    return f"\n#if defined(__CUDA_ARCH_FEAT_SM90_ALL){text}\n#endif\n"


def grouped_wgmma(name: str, columns: int) -> Any:
    """The same product, for groups of ``columns``, or of a multiple of 128 if that is 128.

    Grid: as many blocks as work at once. Weights become -1, 0 and 1 in registers. While one
    warpgroup gathers a group, the tensor cores work for the other.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, groups: Expr, group_blocks: Expr, share: Expr, type_y: Expr,
             has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = dynamic()
        done = view(room, "float32")
        feed = Feed(ids, WGMMA_STAGES, TILE_TOKENS, STAGE_BYTES)
        inverse = shared(TILE_TOKENS, "float32")
        base = variable(read("int32", "bc_to_kilobyte", at(room, 0)), "int32")[0]
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        out = variable(T.floordiv(base + WGMMA_STAGES * STAGE_BYTES, 4), "int32")[0]
        grid = variable(read("int32", "bc_grid"), "int32")[0]
        blocks = variable(T.floordiv(N + (ROWS - 1), ROWS), "int32")[0]
        work = blocks * T.floordiv(M + (TILE_TOKENS - 1), TILE_TOKENS)
        mine = variable(T.floordiv(work - ids.block_x + grid - 1, grid), "int32")[0]
        feed.open()
        do("bc_let_next_start")

        def work_on() -> None:
            ring = Ring(WGMMA_STAGES)
            acc, totals = local(64, "int32"), local(64, "float32")
            held, a = local(4 * WGMMA_AHEAD, "uint32"), local(16, "uint32")
            scales = local(2, "float32")
            block, group = (variable(T.int32(0), "int32") for _ in range(2))
            first_n, first_m, tile = (variable(T.int32(0), "int32") for _ in range(3))
            row = warp * TILE_ROWS  # in the block
            g, c = T.floordiv(ids.lane, 4), ids.lane % 4
            address = variable(T.uint64(0), "uint64")

            def load(place: int, unit: Expr) -> None:
                byte = T.cast(unit, "uint64") * T.uint64(UNIT_WORDS * 4)
                wanted = T.cast(unit < units, "int32")
                do("bc_load_unit", at(held, place * 4), address[0] + byte, wanted)

            def load_scales() -> None:
                for half in range(2):
                    at_ = (long(tile[0]) * groups + group[0]) * TILE_ROWS + half * 8 + g
                    put(scales, w_scale[at_], half)

            def finish_group() -> None:
                for j, half, e in itertools.product(range(TILE_TOKENS // 8), range(2), range(2)):
                    i = j * 4 + half * 2 + e
                    part = variable(T.cast(acc[i], "float32") * scales[half], "float32")[0]
                    put(totals, totals[i] + part, i)
                put(block, T.int32(0))
                put(group, group[0] + 1)
                with when(group[0] < groups):
                    load_scales()

            def multiply(place: int, unit: Expr) -> None:
                for t, f in itertools.product(range(4), range(4)):
                    codes = T.bitwise_and(
                        T.shift_right(held[place * 4 + t], T.uint32(2 * f)), T.uint32(0x03030303)
                    )
                    signed = T.bitwise_xor(codes + T.uint32(0x7F7F7F7F), T.uint32(0x80808080))
                    put(a, signed, t * 4 + f)
                load(place, unit + WGMMA_AHEAD)
                slot = variable(ring.slot[0], "int32")[0]
                do("bc_barrier_wait", at(feed.full, slot), ring.phase[0])
                tokens = at(room, base + slot * STAGE_BYTES)
                operand = variable(call("uint64", "bc_describe", tokens), "uint64")[0]
                ring.advance()
                for first in range(0, 4, columns // 32):
                    last = first + columns // 32 == 4
                    do(f"bc_wgmma_group_{columns}", at(acc, 0), at(a, first * 4),
                       operand + T.uint64(2 * first), block[0])  # fmt: skip
                    do(f"bc_wgmma_{TILE_TOKENS}_wait", at(acc, 0), at(a, 0))
                    if last:
                        with when(ids.lane == 0):
                            do("bc_barrier_arrive", at(feed.free, slot))
                    put(block, block[0] + columns // 16)
                    with when(T.And(block[0] == group_blocks, group[0] < groups)):
                        finish_group()

            with T.serial(mine) as number:
                place = variable(ids.block_x + number * grid, "int32")[0]
                put(first_n, place % blocks * ROWS)
                put(first_m, T.floordiv(place, blocks) * TILE_TOKENS)
                put(tile, T.min(place % blocks * ROW_TILES + warp, tiles - 1))
                word = long(tile[0]) * units * UNIT_WORDS + ids.lane * 4
                put(address, call("uint64", "bc_pointer", at(w, word)))
                put(block, T.int32(0))
                put(group, T.int32(0))
                for i in range(WGMMA_AHEAD):
                    load(i, T.int32(i))
                load_scales()
                with T.unroll(64) as i:
                    put(totals, T.float32(0), i)
                do("bc_wait_for_earlier")
                own = variable(T.float32(1), "float32")
                with when(ids.thread < TILE_TOKENS):
                    m = T.min(first_m[0] + ids.thread, M - 1)
                    put(own, read("float32", "bc_load", s.data, long(m), FLOAT))
                with T.serial(T.floordiv(units + (WGMMA_AHEAD - 1), WGMMA_AHEAD)) as turn:
                    for i in range(WGMMA_AHEAD):
                        unit = turn * WGMMA_AHEAD + i
                        with when(unit < units):
                            multiply(i, unit)
                with when(T.And(block[0] > 0, group[0] < groups)):
                    finish_group()
                with when(ids.thread < TILE_TOKENS):
                    put(inverse, call("float32", "__frcp_rn", own[0]), ids.thread)
                do("bc_workers")
                for first in range(0, TILE_TOKENS, HALF_TILE):
                    for half in range(2):
                        n = first_n[0] + row + half * 8 + g
                        more = variable(T.float32(0), "float32")
                        with when(T.And(has_bias != 0, n < N)):
                            put(more, bias[n])
                        for j, e in itertools.product(range(HALF_TILE // 8), range(2)):
                            token = j * 8 + c * 2 + e
                            value = totals[(first // 8 + j) * 4 + half * 2 + e]
                            result = variable(value * inverse[first + token], "float32")
                            with when(has_bias != 0):
                                put(result, result[0] + more[0])
                            to = out + token * (ROWS + PAD) + row + half * 8 + g
                            put(done, result[0], to)
                    do("bc_workers")
                    store_tile(ids, done, out, first_n[0], first_m[0] + first, HALF_TILE, WORKERS,
                               residual, y, M, N, type_y, has_residual)  # fmt: skip
                    do("bc_workers")

        with T.If(warp < WORKERS // 32):
            with T.Then():
                do(f"bc_more_registers<{WORKER_REGISTERS}>")
                work_on()
            with T.Else():
                do(f"bc_fewer_registers<{OTHER_REGISTERS}>")
                with when(ids.thread == WORKERS):
                    feed.bring(q, room, base, mine, grid, blocks, units, token_groups)

    return device_kernel(name, PARAMETERS, HOPPER_THREADS, body)
