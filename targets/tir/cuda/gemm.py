"""Products with many tokens on tensor cores: 128 weight rows by a tile of tokens a block.

Two schedules read the same weights and activations. ``gemm``: ``mma.sync`` (sm_80 and later),
tokens by asynchronous copies, weights from registers. ``wgmma`` (sm_90a): a block makes one tile
after the other; one thread brings tokens by bulk copies, two warpgroups unpack weights into
registers and multiply with tokens in shared memory, and results leave (:mod:`leave`). Tried on an
H100: weights as int8 in shared memory, unpacked by these or a third warpgroup, warpgroups that
multiply by turns, tiles of 256 rows by half the tokens (no faster), and tokens shared by a cluster
of blocks (slower).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
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
from bitcompile.targets.tir.cuda.leave import (
    GROUP_ROWS,
    GROUP_THREADS,
    LEAVING,
    PAD,
    ROWS,
    Leaving,
    store_tile,
)
from bitcompile.targets.tir.cuda.rows import FLOAT, each
from bitcompile.targets.tir.cuda.tile import (
    TILE_ROWS,
    TOKEN_UNIT,
    TOKENS,
    UNIT_COLUMNS,
    UNIT_WORDS,
)
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

ROW_TILES = ROWS // TILE_ROWS

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "units", "token_groups", "tiles", "blocks", "type_y", "has_bias", "has_residual",
        "direct",
    )),
]  # fmt: skip


class Tokens:
    """What scales the products of a block's tokens, in shared memory."""

    def __init__(
        self, ids: Ids, count: int, threads: int, s: Buffer, qsum: Buffer, M: Expr
    ) -> None:
        self.scale, self.inverse = shared(count, "float32"), shared(count, "float32")
        self.total = shared(count, "int32")

        def bring(i: Expr) -> None:
            m = T.min(ids.block_y * count + i, M - 1)
            put(self.scale, read("float32", "bc_load", s.data, long(m), FLOAT), i)
            put(self.inverse, call("float32", "__fdiv_rn", T.float32(1), self.scale[i]), i)
            put(self.total, read("int32", "bc_load_int", qsum.data, long(m)), i)

        each(ids, T.int32(count), bring, threads)

    def scaled(self, acc: Expr, token: Expr, weight: Expr) -> Expr:
        """``fl(acc) * fl(weight / s)``, acc without the offset of the codes."""
        ratio = call("float32", "bc_divide", weight, self.scale[token], self.inverse[token])
        return T.cast(acc - self.total[token], "float32") * ratio


class Feature:
    """Scale and bias of one weight row; zero beyond the last."""

    def __init__(self, n: Expr, N: Expr, w_scale: Buffer, bias: Buffer, has_bias: Expr) -> None:
        self.scale, self.bias = (variable(T.float32(0), "float32") for _ in range(2))
        self.has_bias = has_bias
        with when(n < N):
            put(self.scale, w_scale[n])
            with when(has_bias != 0):
                put(self.bias, bias[n])

    def result(self, value: Expr) -> Expr:
        """``value`` and the bias; without one nothing is added, as -0 + 0 is another zero."""
        kept = variable(value, "float32")
        with when(self.has_bias != 0):
            put(kept, kept[0] + self.bias[0])
        return kept[0]


# --- mma.sync -------------------------------------------------------------------------------------

TILE_TOKENS = 128
THREADS = 128
STAGES = 4
STAGE_BYTES = TILE_TOKENS * UNIT_COLUMNS
"""Of ``gemm``: a warp has 64 rows and 64 tokens."""


def gemm(name: str) -> Any:
    """``y = scaled(W q)``. Grid: ceil(N / 128), ceil(M / 128); q is padded to whole tiles.

    Dynamic shared memory: ``max(STAGES * STAGE_BYTES, TILE_TOKENS * (ROWS + PAD) * 4)``.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, blocks: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             direct: Expr) -> None:  # fmt: skip
        room = dynamic()
        done = view(room, "float32")
        rows_at, tokens_at = ids.warp % 2 * 64, T.floordiv(ids.warp, 2) * 64
        acc = local(4 * 8 * 4, "int32")
        held, coming = local(16, "uint32"), local(16, "uint32")
        b = local(16, "int32")
        do("bc_let_next_start")
        with T.unroll(128) as i:
            put(acc, T.int32(0), i)

        def weights(to: Buffer, unit: Expr) -> None:
            for i in range(4):
                tile = T.min(ids.block_x * ROW_TILES + T.floordiv(rows_at, 16) + i, tiles - 1)
                word = (long(tile) * units + unit) * UNIT_WORDS + ids.lane * 4
                do("bc_load_weights", at(to, i * 4), at(w, word))

        def copy(unit: Expr) -> None:
            start = long(unit) * token_groups + ids.block_y * (TILE_TOKENS // TOKENS)
            for i in range(STAGE_BYTES // (16 * THREADS)):
                byte = (i * THREADS + ids.thread) * 16
                to = at(room, unit % STAGES * STAGE_BYTES + byte)
                do("bc_copy_async16", to, q.data, start * TOKEN_UNIT + byte)

        weights(held, T.int32(0))
        do("bc_wait_for_earlier")
        tokens = Tokens(ids, TILE_TOKENS, THREADS, s, qsum, M)
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
                for j in range(4):
                    row = tokens_at + j * 16 + ids.lane % 8 + T.floordiv(ids.lane, 16) * 8
                    piece = T.bitwise_xor(2 * t + T.floordiv(ids.lane, 8) % 2, ids.lane % 8)
                    from_ = unit % STAGES * STAGE_BYTES + row * UNIT_COLUMNS + piece * 16
                    do("bc_load_matrix4", at(b, j * 4), at(room, from_))
                for i in range(4):
                    for j in range(8):
                        operands = (held[i * 4 + t], b[j * 2], b[j * 2 + 1])
                        do("bc_mma", at(acc, (i * 8 + j) * 4), *operands)
            for i in range(16):
                put(held, coming[i], i)
        barrier()
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4
        for i in range(4):
            for half in range(2):
                row = rows_at + i * 16 + half * 8 + g
                feature = Feature(ids.block_x * ROWS + row, N, w_scale, bias, has_bias)
                for j in range(8):
                    for e in range(2):
                        token = tokens_at + j * 8 + c * 2 + e
                        value = acc[(i * 8 + j) * 4 + half * 2 + e]
                        scaled = tokens.scaled(value, token, feature.scale[0])
                        put(done, feature.result(scaled), token * (ROWS + PAD) + row)
        barrier()
        store_tile(ids, done, T.int32(0), ids.block_x * ROWS, ids.block_y * TILE_TOKENS,
                   TILE_TOKENS, THREADS, residual, y, M, N, type_y, has_residual)  # fmt: skip

    return device_kernel(name, PARAMETERS, THREADS, body)


# --- wgmma ----------------------------------------------------------------------------------------


AHEAD = 4
"""Units of weights that a warp has under way, a multiple of two steps."""


@dataclass(frozen=True)
class Tile:
    """What a block of ``wgmma`` makes at a time: ROWS rows by ``tokens``, a multiple of 16."""

    tokens: int
    stages: int
    """Units of tokens under way or in use."""
    span: int = 1
    """Units that a warpgroup multiplies in one step: small products are not worth one each."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"bc_wgmma{self.tokens}"

    @property
    def stage(self) -> int:
        """Bytes of a stage."""
        return self.tokens * UNIT_COLUMNS

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: to align, stages, what leaves."""
        return 1024 + self.stages * self.stage + 2 * LEAVING


def wgmma_source(tokens: int) -> str:
    """Products of 64 rows, ``tokens`` tokens and 128 columns.

    ``bc_wgmma_N`` starts them, added to ``d`` if ``keep``; ``bc_wgmma_N_wait`` ends all.
    """
    n = tokens // 2
    results = ", ".join(f'"+r"(d[{i}])' for i in range(n))
    names = ", ".join(f"%{i}" for i in range(n))
    products = []
    for t in range(4):
        a = ", ".join(f"%{n + 4 * t + i}" for i in range(4))
        products.append(
            f'"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{names}}}, {{{a}}}, '
            f'%{n + 16 + t}, {"q" if t else "p"};\\n"'
        )
    weights = ", ".join(f'"r"(a[{i}])' for i in range(16))
    tiles = ", ".join(f'"l"(b + {2 * t})' for t in range(4))  # 32 bytes, in units of 16
    kept = ", ".join(f'"+r"(a[{i}])' for i in range(16))
    return f"""
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
BC_INLINE void bc_wgmma_{tokens}(int* d, const uint* a, uint64_t b, int keep) {{
  asm volatile("{{\\n.reg .pred p, q;\\nsetp.ne.s32 p, %{n + 20}, 0;\\nsetp.eq.u32 q, 0, 0;\\n"
    "wgmma.fence.sync.aligned;\\n"
    {" ".join(products)} "}}" : {results} : {weights}, {tiles}, "r"(keep) : "memory");
}}
BC_INLINE void bc_wgmma_{tokens}_wait(int* d, uint* a) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {results}, {kept} :: "memory");
}}
#endif
"""


def wgmma(name: str, tile: Tile) -> Any:
    """``y = scaled(W q)``. Grid: as many blocks as work at once; ``blocks``: ceil(N / ROWS).

    A warpgroup unpacks the weights of a step while the tensor cores work for the one before, and
    for the other warpgroup. With ``direct``, results leave by a shorter way where rows share a
    scale: no bias, N a multiple of 8, aligned memory, K below 2**15, and 16 bits with a residual.
    """
    stages, count = tile.stages, tile.tokens

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, blocks: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             direct: Expr) -> None:  # fmt: skip
        room = dynamic()
        feed = Feed(ids, stages, count, tile.stage)
        scale = shared(2 * count, "float32")
        pairs = shared(2 * count * 2, "float32")  # totals (as bits) and ratios of two tokens each
        base = variable(read("int32", "bc_to_kilobyte", at(room, 0)), "int32")[0]
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        grid = variable(read("int32", "bc_grid"), "int32")[0]
        work = blocks * T.floordiv(M + (count - 1), count)
        mine = variable(T.floordiv(work - ids.block_x + grid - 1, grid), "int32")[0]
        feed.open()
        do("bc_let_next_start")

        def work_on() -> None:
            ring, behind = Ring(stages), Ring(stages)
            acc = local(count // 2, "int32")
            held = local(4 * AHEAD, "uint32")
            a = [[local(16, "uint32") for _ in range(tile.span)] for _ in range(2)]
            group = T.shift_right(warp, 2)
            own = Ids(ids.block_x, ids.block_y, ids.thread % GROUP_THREADS)
            row = warp % 4 * TILE_ROWS  # in the warpgroup's
            out = variable(base + stages * tile.stage + group * LEAVING, "int32")[0]
            block, column = (variable(T.int32(0), "int32") for _ in range(2))

            def go(number: Expr) -> Expr:
                """To a tile of this block; where its weights begin for this lane."""
                place = variable(ids.block_x + number * grid, "int32")[0]
                put(block, place % blocks)
                put(column, T.floordiv(place, blocks))
                first = T.min(block[0] * ROW_TILES + warp, tiles - 1)
                word = long(first) * units * UNIT_WORDS + ids.lane * 4
                return call("uint64", "bc_pointer", at(w, word))

            address = variable(go(T.int32(0)), "uint64")
            following = variable(address[0], "uint64")

            def load(place: int, unit: Expr, from_: Expr) -> None:
                byte = T.cast(unit, "uint64") * T.uint64(UNIT_WORDS * 4)
                do("bc_load_unit", at(held, place * 4), from_ + byte, T.int32(1))

            def load_next(i: int, unit: Expr) -> None:
                """What comes next in a place: of this tile, or of the next."""
                inside = unit + AHEAD < units
                from_ = T.if_then_else(inside, address[0], following[0])
                load(i, T.if_then_else(inside, unit + AHEAD, T.min(i, units - 1)), from_)

            def release(count: int) -> None:
                """The first stages that this warp has not left yet."""
                for _ in range(count):
                    with when(ids.lane == 0):
                        do("bc_barrier_arrive", at(feed.free, behind.slot[0]))
                    behind.advance()

            for i in range(AHEAD):
                load(i, T.min(i, units - 1), address[0])
            do("bc_wait_for_earlier")

            def start(now: list[Buffer], first: int, unit: Expr) -> None:
                """The product of as many units as ``now`` holds, which stay there to its end."""
                for n, codes in enumerate(now):
                    for t, f in itertools.product(range(4), range(4)):
                        word = T.shift_right(held[(first + n) * 4 + t], T.uint32(2 * f))
                        put(codes, T.bitwise_and(word, T.uint32(0x03030303)), t * 4 + f)
                operands = []
                for _ in now:
                    slot = variable(ring.slot[0], "int32")[0]
                    do("bc_barrier_wait", at(feed.full, slot), ring.phase[0])
                    tokens = at(room, base + slot * tile.stage)
                    operands.append(variable(call("uint64", "bc_describe", tokens), "uint64")[0])
                    ring.advance()
                for n, codes in enumerate(now):
                    do(f"bc_wgmma_{count}", at(acc, 0), at(codes, 0), operands[n], unit + n)
                do("bc_wgmma_commit")
                for n in range(len(now)):
                    load_next(first + n, unit + n)

            def end_all() -> None:
                """Of the products; the stages that they read are free."""
                do(f"bc_wgmma_{count}_wait", at(acc, 0), at(a[0][0], 0))
                for one in (*a[0], *a[1]):
                    do("bc_keep", at(one, 0))
                for _ in range(tile.span):
                    with when(behind.slot[0] != ring.slot[0]):
                        release(1)

            leaving = Leaving(
                own, row, room, out, acc, count, scale, pairs, group, w_scale, bias, residual, y,
                M, N, type_y, has_bias, has_residual,
            )  # fmt: skip

            with T.serial(mine) as number:
                first_n = variable(block[0] * ROWS + group * GROUP_ROWS, "int32")[0]
                first_m = variable(column[0] * count, "int32")[0]
                times = -(-count // GROUP_THREADS)
                own_scale, own_total = local(times, "float32"), local(times, "int32")
                for i in range(times):
                    m = T.min(first_m + i * GROUP_THREADS + own.thread, M - 1)
                    put(own_scale, read("float32", "bc_load", s.data, long(m), FLOAT), i)
                    put(own_total, read("int32", "bc_load_int", qsum.data, long(m)), i)
                common = variable(w_scale[T.min(first_n, N - 1)], "float32")[0]
                other = variable(
                    w_scale[T.min(first_n + own.thread % GROUP_ROWS, N - 1)], "float32"
                )[0]
                with when(number + 1 < mine):
                    put(following, go(number + 1))
                rounds = variable(T.floordiv(units, AHEAD), "int32")[0]
                with T.serial(rounds) as turn:
                    for i in range(0, AHEAD, tile.span):
                        now, before = a[i // tile.span % 2], a[i // tile.span % 2 - 1]
                        start(now, i, turn * AHEAD + i)
                        do("bc_wgmma_wait_before")
                        for one in before:
                            do("bc_keep", at(one, 0))
                        with when(turn * AHEAD + i > 0):
                            release(tile.span)
                for i in range(AHEAD - 1):
                    unit = rounds * AHEAD + i
                    with when(unit < units):
                        end_all()
                        start(a[0][:1], i, unit)
                put(address, following[0])
                for i in range(times):
                    token = i * GROUP_THREADS + own.thread
                    with when(token < count):
                        pair = group * (2 * count) + T.floordiv(token, 2) * 4 + token % 2
                        by = call("float32", "__fdiv_rn", common, own_scale[i])
                        put(scale, own_scale[i], group * count + token)
                        put(pairs, call("float32", "__int_as_float", own_total[i]), pair)
                        put(pairs, by, pair + 2)
                alike = read("int32", "bc_agree", group, T.cast(other == common, "int32"))
                quick = variable(T.bitwise_and(alike, direct), "int32")
                with when(T.And(quick[0] != 0, has_residual != 0)):
                    leaving.fetch(first_n, first_m, 0)
                end_all()
                leaving.go(first_n, first_m, quick[0])

        with T.If(warp < WORKERS // 32):
            with T.Then():
                do(f"bc_more_registers<{WORKER_REGISTERS}>")
                work_on()
            with T.Else():
                do(f"bc_fewer_registers<{OTHER_REGISTERS}>")
                with when(ids.thread == WORKERS):
                    feed.bring(q, room, base, mine, grid, blocks, units, token_groups)

    return device_kernel(name, PARAMETERS, HOPPER_THREADS, body)
