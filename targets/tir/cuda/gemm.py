"""Products with many tokens on tensor cores: 128 weight rows by a tile of tokens a block.

Two schedules read the same weights and activations. ``gemm``: ``mma.sync`` (sm_80 and later),
tokens by asynchronous copies, weights from registers. ``wgmma`` (sm_90a): a block makes one tile
after the other; one thread brings tokens by bulk copies, two warpgroups unpack weights into
registers and multiply with tokens in shared memory by turns, and results leave while the next tile
is made. Weights as int8 in shared memory, unpacked by these or a third warpgroup, and tokens shared
by a cluster of blocks were tried on an H100: no faster, and slower.
"""

from __future__ import annotations

from collections.abc import Callable
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
from bitcompile.targets.tir.cuda.rows import FLOAT, each
from bitcompile.targets.tir.cuda.tile import (
    TILE_ROWS,
    TOKEN_UNIT,
    TOKENS,
    UNIT_COLUMNS,
    UNIT_WORDS,
)
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

ROWS = 128
"""Weight rows of a block."""
ROW_TILES = ROWS // TILE_ROWS
PAD = 4
"""More floats than rows between tokens of the finished tile in shared memory: no bank conflicts."""

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


def finish(ids: Ids, done: Buffer, offset: Expr, first_n: Expr, first_m: Expr, tokens: int,
           threads: int, residual: Buffer, y: Buffer, M: Expr, N: Expr, type_y: Expr,
           has_residual: Expr) -> None:  # fmt: skip
    """Store a tile of results ``[tokens, ROWS + PAD]``, four rows a thread at a time."""
    values, old = local(4, "float32"), local(4, "float32")
    quads = ROWS // 4

    def store(i: Expr) -> None:
        token, n = T.floordiv(i, quads), first_n + (i % quads) * 4
        m = first_m + token
        with when(T.And(m < M, n < N)):
            to = long(m) * N + n
            do(
                "bc_load_shared4",
                at(values, 0),
                at(done, offset + token * (ROWS + PAD) + i % quads * 4),
            )
            with when(N % 4 == 0):
                with when(has_residual != 0):
                    do("bc_load4", at(old, 0), residual.data, to, type_y)
                    for j in range(4):
                        put(values, values[j] + old[j], j)
                do("bc_store4", y.data, to, at(values, 0), type_y)
            with when(N % 4 != 0), T.serial(4) as j, when(n + j < N):
                with when(has_residual != 0):
                    more = read("float32", "bc_load", residual.data, to + j, type_y)
                    put(values, values[j] + more, j)
                do("bc_store", y.data, to + j, values[j], type_y)

    each(ids, T.int32(tokens * quads), store, threads)


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
        finish(ids, done, T.int32(0), ids.block_x * ROWS, ids.block_y * TILE_TOKENS, TILE_TOKENS,
               THREADS, residual, y, M, N, type_y, has_residual)  # fmt: skip

    return device_kernel(name, PARAMETERS, THREADS, body)


# --- wgmma ----------------------------------------------------------------------------------------

OUT_PITCH = 2 * ROWS + 16
"""Bytes between tokens of a finished tile of 16-bit values: no bank conflicts."""


@dataclass(frozen=True)
class Tile:
    """What a block of ``wgmma`` makes at a time: ROWS rows by ``tokens``, a multiple of 32."""

    tokens: int
    stages: int
    """Units of tokens under way or in use."""
    span: int
    """Units that a warpgroup multiplies in one turn: small products are not worth one each."""
    ahead: int = 4
    """Units of weights that a warp has under way, an even number."""

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
        """Bytes of dynamic shared memory: to align, stages, the finished tile.

        Of a tile that is not of 16-bit values, half is in there at a time, in float32.
        """
        return 1024 + self.stages * self.stage + self.tokens * OUT_PITCH


def wgmma_source(tokens: int) -> str:
    """Products of 64 rows, ``tokens`` tokens and 128 columns.

    ``bc_wgmma_N`` starts them, all but the last part as one group; before it may come
    ``bc_wgmma_N_more``. ``bc_wgmma_N_wait`` ends all.
    """
    n = tokens // 2
    results = ", ".join(f'"+r"(d[{i}])' for i in range(n))
    names = ", ".join(f"%{i}" for i in range(n))
    products = []
    for t in range(4):
        a = ", ".join(f"%{n + 4 * t + i}" for i in range(4))
        products.append(
            f'"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{names}}}, {{{a}}}, '
            f'%{n + 16 + t}, p;\\n"'
        )
    weights = ", ".join(f'"r"(a[{i}])' for i in range(16))
    tiles = ", ".join(f'"l"(b + {2 * t})' for t in range(4))  # 32 bytes, in units of 16
    kept = ", ".join(f'"+r"(a[{i}])' for i in range(16))
    commit = '"wgmma.commit_group.sync.aligned;\\n"'
    texts = {"": [*products[:3], commit, products[3], commit], "_more": products}
    functions = "".join(
        f"""
BC_INLINE void bc_wgmma_{tokens}{suffix}(int* d, const uint* a, uint64_t b) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\nwgmma.fence.sync.aligned;\\n"
    {" ".join(text)} "}}" : {results} : {weights}, {tiles} : "memory");
}}"""
        for suffix, text in texts.items()
    )
    return f"""
#if defined(__CUDA_ARCH_FEAT_SM90_ALL){functions}
BC_INLINE void bc_wgmma_{tokens}_wait(int* d, uint* a) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {results}, {kept} :: "memory");
}}
#endif
"""


def wgmma(name: str, tile: Tile) -> Any:
    """``y = scaled(W q)``. Grid: as many blocks as work at once; ``blocks``: ceil(N / ROWS).

    A warpgroup unpacks the weights of a unit while the tensor cores work for the other. With
    ``direct``, 16-bit results of rows that share a scale leave by bulk copies.
    """
    stages, count = tile.stages, tile.tokens

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, blocks: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             direct: Expr) -> None:  # fmt: skip
        room = dynamic()
        done = view(room, "float32")
        feed = Feed(ids, stages, count, tile.stage)
        scale, ratio = shared(count, "float32"), shared(count, "float32")
        total = shared(count, "int32")
        base = variable(read("int32", "bc_to_kilobyte", at(room, 0)), "int32")[0]
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        out = base + stages * tile.stage
        grid = variable(read("int32", "bc_grid"), "int32")[0]
        work = blocks * T.floordiv(M + (count - 1), count)
        mine = variable(T.floordiv(work - ids.block_x + grid - 1, grid), "int32")[0]
        feed.open()
        do("bc_let_next_start")

        def work_on() -> None:
            ring = Ring(stages)
            acc = local(count // 2, "int32")
            held = local(4 * tile.ahead, "uint32")
            a = [local(16, "uint32") for _ in range(tile.span)]
            group = T.shift_right(warp, 2)
            row = warp * TILE_ROWS  # in the block
            g, c = T.floordiv(ids.lane, 4), ids.lane % 4

            def weights_of(number: Expr) -> Expr:
                """Where a tile's weights begin for this lane."""
                first = (ids.block_x + number * grid) % blocks * ROW_TILES + warp
                word = long(T.min(first, tiles - 1)) * units * UNIT_WORDS + ids.lane * 4
                return call("uint64", "bc_pointer", at(w, word))

            address = variable(weights_of(T.int32(0)), "uint64")
            following = variable(address[0], "uint64")

            def load(place: int, unit: Expr, from_: Expr) -> None:
                byte = T.cast(unit, "uint64") * T.uint64(UNIT_WORDS * 4)
                do("bc_load_unit", at(held, place * 4), from_ + byte, T.int32(1))

            for i in range(tile.ahead):
                load(i, T.min(i, units - 1), address[0])
            do("bc_wait_for_earlier")
            with when(group == 1):
                do("bc_pass_turn", group)

            def multiply(first: int, unit: Expr, span: int) -> None:
                """The product of some units; the other warpgroup unpacks meanwhile."""
                for n in range(span):
                    for t in range(4):
                        for f in range(4):
                            word = held[(first + n) * 4 + t]
                            codes = T.bitwise_and(
                                T.shift_right(word, T.uint32(2 * f)), T.uint32(0x03030303)
                            )
                            put(a[n], codes, t * 4 + f)
                slots, operands = [], []
                for _ in range(span):
                    slot = variable(ring.slot[0], "int32")[0]
                    do("bc_barrier_wait", at(feed.full, slot), ring.phase[0])
                    tokens = at(room, base + slot * tile.stage)
                    operands.append(variable(call("uint64", "bc_describe", tokens), "uint64")[0])
                    slots.append(slot)
                    ring.advance()
                do("bc_take_turn", group)
                for n in range(span):
                    suffix = "_more" if n + 1 < span else ""
                    do(f"bc_wgmma_{count}{suffix}", at(acc, 0), at(a[n], 0), operands[n])
                for n in range(span):
                    load_next(first + n, unit + n)
                do("bc_wgmma_wait_last")
                do("bc_pass_turn", group)
                for n in range(span):
                    do(f"bc_wgmma_{count}_wait", at(acc, 0), at(a[n], 0))
                with when(ids.lane == 0):
                    for slot in slots:
                        do("bc_barrier_arrive", at(feed.free, slot))

            def load_next(i: int, unit: Expr) -> None:
                """What comes next in a place: of this tile, or of the next."""
                inside = unit + tile.ahead < units
                from_ = T.if_then_else(inside, address[0], following[0])
                load(i, T.if_then_else(inside, unit + tile.ahead, T.min(i, units - 1)), from_)

            with T.serial(mine) as number:
                place = variable(ids.block_x + number * grid, "int32")[0]
                first_n = variable(place % blocks * ROWS, "int32")[0]
                first_m = variable(T.floordiv(place, blocks) * count, "int32")[0]
                own_scale = variable(T.float32(1), "float32")
                own_total = variable(T.int32(0), "int32")
                with when(ids.thread < count):
                    m = T.min(first_m + ids.thread, M - 1)
                    put(own_scale, read("float32", "bc_load", s.data, long(m), FLOAT))
                    put(own_total, read("int32", "bc_load_int", qsum.data, long(m)))
                common = variable(w_scale[first_n], "float32")[0]
                other = variable(w_scale[T.min(first_n + ids.thread % ROWS, N - 1)], "float32")[0]
                with when(number + 1 < mine):
                    put(following, weights_of(number + 1))
                with T.unroll(count // 2) as i:
                    put(acc, T.int32(0), i)
                rounds = variable(T.floordiv(units, tile.ahead), "int32")[0]
                with T.serial(rounds) as turn:
                    for i in range(0, tile.ahead, tile.span):
                        multiply(i, turn * tile.ahead + i, tile.span)
                for i in range(tile.ahead - 1):
                    unit = rounds * tile.ahead + i
                    with when(unit < units):
                        multiply(i, unit, 1)
                put(address, following[0])

                with when(ids.thread < count):
                    put(scale, own_scale[0], ids.thread)
                    put(total, own_total[0], ids.thread)
                    put(ratio, call("float32", "__fdiv_rn", common, own_scale[0]), ids.thread)
                do("bc_store_bulk_read")
                alike = variable(
                    read("int32", "bc_agree", T.cast(other == common, "int32")), "int32"
                )
                features = [
                    Feature(first_n + row + half * 8 + g, N, w_scale, bias, has_bias)
                    for half in range(2)
                ]

                def shared_scale(value: Expr, token: Expr, half: int) -> Expr:
                    scaled = T.cast(value - total[token], "float32") * ratio[token]
                    return features[half].result(scaled)

                def own_ratio(value: Expr, token: Expr, half: int) -> Expr:
                    by = call("float32", "bc_ratio", features[half].scale[0], scale[token])
                    scaled = T.cast(value - total[token], "float32") * by
                    return features[half].result(scaled)

                with when(T.And(direct != 0, alike[0] != 0)):
                    lane_token = ids.lane % 8 + T.floordiv(ids.lane, 16) * 8
                    lane_row = row + T.floordiv(ids.lane, 8) % 2 * 8
                    to = call(
                        "uint32", "bc_shared", at(room, out + lane_token * OUT_PITCH + lane_row * 2)
                    )
                    place_of = variable(to, "uint32")[0]
                    four = local(4, "uint32")
                    for j in range(0, count // 8, 2):
                        for i in range(4):
                            half, column = i % 2, j + i // 2
                            pair = [
                                shared_scale(
                                    acc[column * 4 + half * 2 + e], column * 8 + c * 2 + e, half
                                )
                                for e in range(2)
                            ]
                            put(four, call("uint32", "bc_narrow2", *pair, type_y), i)
                        do("bc_store_matrix4", place_of + T.uint32(j * 8 * OUT_PITCH), at(four, 0))
                    do("bc_proxy_fence")
                    do("bc_workers")
                    m = first_m + ids.thread
                    with when(T.And(ids.thread < count, m < M)):
                        size = T.min(N - first_n, ROWS) * 2
                        do("bc_store_bulk", y.data, (long(m) * N + first_n) * 2,
                           at(room, out + ids.thread * OUT_PITCH), size)  # fmt: skip
                with when(T.Or(direct == 0, alike[0] == 0)):
                    begin = variable(T.floordiv(out, 4), "int32")[0]
                    part = count // 2

                    def results(first: int, by: Callable[[Expr, Expr, int], Expr]) -> None:
                        for half in range(2):
                            to = variable(
                                begin + c * (2 * (ROWS + PAD)) + row + half * 8 + g, "int32"
                            )
                            for j in range(part // 8):
                                for e in range(2):
                                    value = acc[(first // 8 + j) * 4 + half * 2 + e]
                                    result = by(value, first + j * 8 + c * 2 + e, half)
                                    put(done, result, to[0] + (j * 8 + e) * (ROWS + PAD))

                    for first in (0, part):
                        with when(alike[0] != 0):
                            results(first, shared_scale)
                        with when(alike[0] == 0):
                            results(first, own_ratio)
                        do("bc_workers")
                        finish(ids, done, begin, first_n, first_m + first, part, WORKERS, residual,
                               y, M, N, type_y, has_residual)  # fmt: skip
                        do("bc_workers")
            do("bc_store_bulk_wait")

        with T.If(warp < WORKERS // 32):
            with T.Then():
                do(f"bc_more_registers<{WORKER_REGISTERS}>")
                work_on()
            with T.Else():
                do(f"bc_fewer_registers<{OTHER_REGISTERS}>")
                with when(ids.thread == WORKERS):
                    feed.bring(q, room, base, mine, grid, blocks, units, token_groups)

    return device_kernel(name, PARAMETERS, HOPPER_THREADS, body)
