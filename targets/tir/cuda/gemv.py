"""One quantised row: every weight is on its way before anything else happens.

A block has a tile of rows; its warps share the columns. A warp loads all weights of a turn at once,
then waits for the row, whose scale and sum are on their way too; sums meet in shared memory. The
code is short on purpose: at 2 to 5 us a kernel waits for its own instructions.
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
    shuffle_xor,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.rows import FLOAT
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

MOST_WARPS = 24
AHEAD = 3
"""Units that a warp loads."""
LONGEST = MOST_WARPS * AHEAD * UNIT_COLUMNS

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "N", "units", "warps", "type_y", "has_bias", "has_residual",
    )),
]  # fmt: skip


def dot_unit(acc: Buffer, b: Buffer, words: Buffer, first: int) -> None:
    """Add a lane's part of a unit's products; ``words`` from ``first`` on are its four.

    Not by tensor cores: for one token, an ``mma.sync`` takes longer than the dot products.
    """
    for t in range(4):
        do("bc_dot16", at(acc, 0), words[first + t], b[2 * t], b[2 * t + 1])


def lane_row(acc: Buffer, lane: Expr) -> Expr:
    """The sum of row ``lane / 4``, in lanes 0 and 1 of four, or of the row 8 further on."""
    upper = acc[0] + T.shift_right(acc[2], 4)
    lower = T.shift_right(acc[1], 2) + T.shift_right(acc[3], 6)
    # Lanes trade: even ones add up the upper row, odd ones the lower.
    odd = T.bitwise_and(lane, 1) != 0
    kept = variable(T.if_then_else(odd, lower, upper), "int32")
    given = variable(T.if_then_else(odd, upper, lower), "int32")
    put(kept, kept[0] + shuffle_xor(given[0], 1))
    put(kept, kept[0] + shuffle_xor(kept[0], 2))
    return kept[0]


def gemv(name: str, early: bool, extras: bool) -> Any:
    """``y = scaled(W q)`` for one row of at most LONGEST columns.

    ``early``: the kernel before may still run. ``extras``: plus bias ``[N]`` and residual like y,
    where there are. Grid: tiles. Threads: 32 * (``warps`` + 1); the last warp scales the sums.
    Dynamic shared memory: the row's units (128 bytes) and 16 sums.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, N: Expr, units: Expr, warps: Expr, type_y: Expr,
             has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = view(dynamic(), "int32")
        held = local(AHEAD * 4, "uint32")
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        # The last warp has no units: whatever it could load lies beyond the last.
        place = variable(T.if_then_else(warp < warps, warp * AHEAD, units), "int32")[0]
        word = (long(ids.block_x) * units + place) * UNIT_WORDS + ids.lane * 4
        address = variable(call("uint64", "bc_pointer", at(w, word)), "uint64")[0]

        def bring() -> None:
            pieces = units * (UNIT_COLUMNS // 16)
            do("bc_bring_token", at(room, 0), q.data, ids.thread, warps * 32 + 32, pieces)

        if not early:
            bring()
        for i in range(AHEAD):
            wanted = T.cast(place + i < units, "int32")
            do("bc_load_unit", at(held, i * 4), address + T.uint64(i * UNIT_WORDS * 4), wanted)
        if early:
            do("bc_let_next_start")
            do("bc_wait_for_earlier")
            bring()
        lane, sums = ids.lane, units * (UNIT_COLUMNS // 4)
        row = ids.block_x * TILE_ROWS + lane
        ends = T.And(warp == warps, T.And(lane < TILE_ROWS, row < N))
        scale, total = variable(T.float32(1), "float32"), variable(T.int32(0), "int32")
        weight, offset = (variable(T.float32(0), "float32") for _ in range(2))
        old = variable(T.uint32(0), "uint32")
        with when(ends):
            put(scale, read("float32", "bc_load", s.data, T.int64(0), FLOAT))
            put(total, read("int32", "bc_load_int", qsum.data, T.int64(0)))
            put(weight, w_scale[row])
            put(room, T.int32(0), sums + lane)
            if extras:
                with when(has_bias != 0):
                    put(offset, bias[row])
                with when(has_residual != 0):
                    put(old, read("uint32", "bc_load_bits", residual.data, long(row), type_y))
        do("bc_copy_wait")
        barrier()
        with when(warp < warps):
            acc, b = local(4, "int32"), local(8, "int32")
            for i in range(4):
                put(acc, T.int32(0), i)
            first = call("uint32", "bc_shared", at(room, place * 32 + T.floordiv(lane, 8) * 4))
            start = variable(first, "uint32")[0]
            for i in range(AHEAD):
                with when(place + i < units):
                    do("bc_load_token", at(b, 0), start + T.uint32(i * UNIT_COLUMNS))
                    dot_unit(acc, b, held, i * 4)
            sum_ = lane_row(acc, lane)
            with when(lane % 4 < 2):
                to = sums + lane % 4 * 8 + T.floordiv(lane, 4)
                do("bc_add_shared", at(room, to), sum_)
        barrier()
        with when(ends):
            factor = call("float32", "__fdiv_rn", weight[0], scale[0])
            whole = room[sums + lane] - total[0]
            result = variable(T.cast(whole, "float32") * factor, "float32")
            if extras:
                with when(has_bias != 0):
                    put(result, result[0] + offset[0])
                with when(has_residual != 0):
                    put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
            do("bc_store", y.data, long(row), result[0], type_y)

    return device_kernel(name, PARAMETERS, 32 * (MOST_WARPS + 1), body)
