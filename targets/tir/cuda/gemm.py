"""Products with many tokens on tensor cores: 128 weight rows by a tile of tokens a block.

Two schedules read the same weights and activations. ``gemm``: ``mma.sync`` (sm_80 and later),
tokens by asynchronous copies, weights from registers. ``wgmma`` (sm_90a): tokens by bulk copies;
two warpgroups hold weights in registers and multiply with tokens in shared memory.
"""

from __future__ import annotations

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
OUT_STRIDE = ROWS + 4
"""Floats between tokens of the finished tile in shared memory: no bank conflicts."""

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "units", "token_groups", "tiles", "type_y", "has_bias", "has_residual",
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


def finish(ids: Ids, done: Buffer, offset: Expr, tokens: int, threads: int, residual: Buffer,
           y: Buffer, M: Expr, N: Expr, type_y: Expr, has_residual: Expr) -> None:  # fmt: skip
    """Store a tile of results ``[tokens, OUT_STRIDE]``, four rows a thread at a time."""
    values, old = local(4, "float32"), local(4, "float32")
    quads = ROWS // 4

    def store(i: Expr) -> None:
        token, n = T.floordiv(i, quads), ids.block_x * ROWS + (i % quads) * 4
        m = ids.block_y * tokens + token
        with when(T.And(m < M, n < N)):
            to = long(m) * N + n
            do(
                "bc_load_shared4",
                at(values, 0),
                at(done, offset + token * OUT_STRIDE + i % quads * 4),
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

    Dynamic shared memory: ``max(STAGES * STAGE_BYTES, TILE_TOKENS * OUT_STRIDE * 4)``.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
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
                        put(done, feature.result(scaled), token * OUT_STRIDE + row)
        barrier()
        finish(ids, done, T.int32(0), TILE_TOKENS, THREADS, residual, y, M, N, type_y, has_residual)

    return device_kernel(name, PARAMETERS, THREADS, body)


# --- wgmma ----------------------------------------------------------------------------------------

HOPPER_THREADS = 256
"""Two warpgroups of 64 weight rows. The first thread copies too: a warp of its own would cost the
registers of a whole warpgroup."""
HOPPER_STAGES = {64: 6, 128: 5, 256: 5}
"""Stages of tokens by the tokens of a tile."""


def wgmma_source(tokens: int) -> str:
    """``bc_wgmma_N``: 64 rows by ``tokens`` tokens by 128 columns; ``..._wait`` ends it."""
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
    return f"""
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
BC_INLINE void bc_wgmma_{tokens}(int* d, const uint* a, uint64_t b) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\nwgmma.fence.sync.aligned;\\n"
    {chr(10).join("    " + product for product in products).strip()}
    "wgmma.commit_group.sync.aligned;\\n}}" : {results} : {weights}, {tiles} : "memory");
}}
BC_INLINE void bc_wgmma_{tokens}_wait(int* d, uint* a) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {results}, {kept} :: "memory");
}}
#endif
"""


def wgmma(name: str, count: int) -> Any:
    """``y = scaled(W q)`` with tiles of ``count`` tokens. Grid: ceil(N / 128), ceil(M / count).

    Dynamic shared memory: 1024 bytes to align, then the larger of the stages (``count * 128`` bytes
    each) and the finished tile.
    """
    stages, stage = HOPPER_STAGES[count], count * UNIT_COLUMNS

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = dynamic()
        done = view(room, "float32")
        full, free = shared(stages, "uint64"), shared(stages, "uint64")
        base = variable(read("int32", "bc_to_kilobyte", at(room, 0)), "int32")
        with when(ids.thread == 0):
            for i in range(stages):
                do("bc_barrier_init", at(full, i), T.int32(1))
                do("bc_barrier_init", at(free, i), T.int32(HOPPER_THREADS))
            do("bc_barrier_fence")
        do("bc_let_next_start")
        do("bc_wait_for_earlier")
        tokens = Tokens(ids, count, HOPPER_THREADS, s, qsum, M)
        barrier()

        def copy(unit: Expr) -> None:
            slot = unit % stages
            start = long(unit) * token_groups + ids.block_y * (count // TOKENS)
            to = at(room, base[0] + slot * stage)
            do("bc_copy_bulk", to, q.data, start * TOKEN_UNIT, T.int32(stage), at(full, slot))

        with when(ids.thread == 0), T.serial(T.min(units, stages)) as unit:
            copy(unit)
        acc = local(count // 2, "int32")
        held, a = local(4, "uint32"), local(16, "uint32")
        row = ids.warp * 16  # of the warp, in the block
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4
        tile = T.min(ids.block_x * ROW_TILES + ids.warp, tiles - 1)
        word = long(tile) * units * UNIT_WORDS + ids.lane * 4
        do("bc_load_weights", at(held, 0), at(w, word))
        with T.unroll(count // 2) as i:
            put(acc, T.int32(0), i)
        with T.serial(units) as unit:
            slot = unit % stages
            for t in range(4):
                for f in range(4):
                    shifted = T.shift_right(held[t], T.uint32(2 * f))
                    put(a, T.bitwise_and(shifted, T.uint32(0x03030303)), t * 4 + f)
            do("bc_barrier_wait", at(full, slot), T.floordiv(unit, stages) % 2)
            b = call("uint64", "bc_describe", at(room, base[0] + slot * stage))
            do(f"bc_wgmma_{count}", at(acc, 0), at(a, 0), b)
            with when(unit + 1 < units):
                do("bc_load_weights", at(held, 0), at(w, word + (unit + 1) * UNIT_WORDS))
            # The slot of the unit before: the other warpgroup has most likely left it as well.
            before = unit - 1
            again = T.And(unit > 0, before + stages < units)
            with when(T.And(ids.thread == 0, again)):
                turn = T.floordiv(before, stages) % 2
                do("bc_barrier_wait", at(free, before % stages), turn)
                copy(before + stages)
            do(f"bc_wgmma_{count}_wait", at(acc, 0), at(a, 0))
            do("bc_barrier_arrive", at(free, slot))
        barrier()
        for half in range(2):
            n = ids.block_x * ROWS + row + half * 8 + g
            feature = Feature(n, N, w_scale, bias, has_bias)
            for j in range(count // 8):
                for e in range(2):
                    token = j * 8 + c * 2 + e
                    scaled = tokens.scaled(acc[j * 4 + half * 2 + e], token, feature.scale[0])
                    to = T.floordiv(base[0], 4) + token * OUT_STRIDE + row + half * 8 + g
                    put(done, feature.result(scaled), to)
        barrier()
        offset = T.floordiv(base[0], 4)
        finish(ids, done, offset, count, HOPPER_THREADS, residual, y, M, N, type_y, has_residual)

    return device_kernel(name, PARAMETERS, HOPPER_THREADS, body)
