"""Products of weights with a scale for each group of columns, any number of tokens.

A warp has a row tile and eight tokens and goes through the columns in order: sums of a group are
integers, and groups gather in float32 one after the other, as the reference has it. Weights are
read once for eight tokens, so many tokens are slow beside :mod:`gemm`.
"""

from __future__ import annotations

import itertools
from typing import Any

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
    variable,
)
from bitcompile.targets.tir.cuda.rows import FLOAT
from bitcompile.targets.tir.cuda.tile import (
    TILE_ROWS,
    TOKEN_UNIT,
    TOKENS,
    UNIT_COLUMNS,
    UNIT_WORDS,
)
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

WARPS = 4
THREADS = 32 * WARPS
PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("w", "uint32*"), ("w_scale", "float32*"),
    ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "units", "token_groups", "tiles", "groups", "group_blocks", "type_y", "has_bias",
        "has_residual",
    )),
]  # fmt: skip


def grouped(name: str) -> Any:
    """``y[m, n] = fl(1 / s[m]) * sum_j fl(w_scale[n, j] * fl(acc[m, n, j]))``, bias and residual.

    ``w_scale``: ``[tiles, groups, 16]``; a group has ``group_blocks`` times 16 columns, the last
    maybe fewer. Grid: ceil(tiles / WARPS), ceil(M / 8).
    """

    def body(ids: Ids, q: Buffer, s: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, groups: Expr, group_blocks: Expr, type_y: Expr, has_bias: Expr,
             has_residual: Expr) -> None:  # fmt: skip
        tile = ids.block_x * WARPS + ids.warp
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4
        held = local(4, "uint32")
        low, high, sums = (local(4, "int32") for _ in range(3))
        totals = local(4, "float32")
        for i in range(4):
            put(totals, T.float32(0), i)
        block, group = (variable(T.int32(0), "int32") for _ in range(2))

        def clear() -> None:
            for buffer in (low, high, sums):
                for i in range(4):
                    put(buffer, T.int32(0), i)

        def finish_group() -> None:
            for half in range(2):
                row = (long(tile) * groups + group[0]) * TILE_ROWS + half * 8 + g
                by = variable(w_scale[row], "float32")[0]
                for e in range(2):
                    i = half * 2 + e
                    acc = T.shift_right(low[i], 2 * half) + T.shift_right(high[i], 4 + 2 * half)
                    whole = variable(acc - sums[i], "int32")[0]
                    part = variable(T.cast(whole, "float32") * by, "float32")[0]
                    put(totals, totals[i] + part, i)
            clear()
            put(block, T.int32(0))
            put(group, group[0] + 1)

        clear()
        do("bc_let_next_start")
        do("bc_wait_for_earlier")
        with when(tile < tiles), rolled(units) as unit:
            word = (long(tile) * units + unit) * UNIT_WORDS + ids.lane * 4
            do("bc_load_weights", at(held, 0), at(w, word))
            start = (long(unit) * token_groups + ids.block_y) * TOKEN_UNIT + g * UNIT_COLUMNS
            for t, half in itertools.product(range(4), range(2)):
                piece = T.bitwise_xor(T.int32(2 * t + half), g)
                b = read("int32", "bc_load_int_at", q.data, start + piece * 16 + c * 4)
                do(f"bc_mma_{'high' if half else 'low'}", at(high if half else low, 0), held[t], b)
                do("bc_mma_ones", at(sums, 0), b)
                put(block, block[0] + 1)
                with when(T.And(block[0] == group_blocks, group[0] < groups)):
                    finish_group()
        with when(T.And(tile < tiles, T.And(block[0] > 0, group[0] < groups))):
            finish_group()
        for half, e in itertools.product(range(2), range(2)):
            n, m = tile * TILE_ROWS + half * 8 + g, ids.block_y * TOKENS + c * 2 + e
            with when(T.And(tile < tiles, T.And(n < N, m < M))):
                by = read("float32", "bc_load", s.data, long(m), FLOAT)
                inverse = variable(call("float32", "__frcp_rn", by), "float32")[0]
                result = variable(totals[half * 2 + e] * inverse, "float32")
                to = long(m) * N + n
                with when(has_bias != 0):
                    put(result, result[0] + bias[n])
                with when(has_residual != 0):
                    more = read("float32", "bc_load", residual.data, to, type_y)
                    put(result, result[0] + more)
                do("bc_store", y.data, to, result[0], type_y)

    return device_kernel(name, PARAMETERS, THREADS, body)
