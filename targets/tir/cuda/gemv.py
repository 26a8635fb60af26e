"""One quantised row: every weight is on its way before anything else happens.

A block has one or two tiles of rows; its warps share the columns. A warp loads all weights of a turn
at once, then waits for the row of the kernel before, whose scale, sum and residual are on their way
too; sums of a tile meet in shared memory.
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
    stamp,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.rows import FLOAT, gated
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, TOKEN_UNIT, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

MOST_WARPS = 24

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "N", "units", "tiles", "warps", "turns", "type_y", "has_bias", "has_residual",
        "activation", "early",
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


def gemv(name: str, slots: int, ahead: int) -> Any:
    """``y = scaled(W q)`` for one row, ``ahead`` units of each of ``slots`` tiles at a time.

    With two slots and ``activation`` >= 0, a block has a gate tile and its up tile, ``tiles``
    further on; without, two neighbours. Grid: ceil(tiles / slots), or tiles with a gate. ``early``:
    the kernel before may still run. Threads: 32 * (``warps`` + 1). The last warp scales the sums. Dynamic shared memory: the row's units (128 bytes) and ``slots * 16`` sums.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, N: Expr, units: Expr, tiles: Expr, warps: Expr,
             turns: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             activation: Expr, early: Expr) -> None:  # fmt: skip
        memory = dynamic()
        room = view(memory, "int32")
        held = local(slots * ahead * 4, "uint32")
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        gate = T.cast(activation >= 0, "int32") if slots == 2 else T.int32(0)
        tile = ids.block_x * (slots - gate) if slots == 2 else ids.block_x
        apart = T.if_then_else(gate != 0, tiles, 1)
        # The last warp has no units: whatever it could load lies beyond the last.
        begin = T.if_then_else(warp < warps, warp * ahead, units)
        addresses = []
        for slot in range(slots):
            mine = tile + slot * apart
            if slot:  # a last block may have one tile; it reads it twice
                mine = T.min(mine, tiles * (1 + gate) - 1)
            word = (long(mine) * units + begin) * UNIT_WORDS + ids.lane * 4
            addresses.append(variable(call("uint64", "bc_pointer", at(w, word)), "uint64"))

        def load(turn: Expr) -> None:
            first = turn * warps * ahead
            for i in range(ahead):
                for slot in range(slots):
                    skipped = T.cast(first + i, "uint64") * T.uint64(UNIT_WORDS * 4)
                    wanted = T.cast(begin + first + i < units, "int32")
                    do("bc_load_unit", at(held, (slot * ahead + i) * 4), addresses[slot][0] + skipped,
                       wanted)  # fmt: skip

        def bring() -> None:
            """The row, and what the last warp needs of the kernel before."""
            pieces = units * (UNIT_COLUMNS // 16)
            do("bc_bring_token", at(room, 0), q.data, ids.thread, warps * 32 + 32, pieces)
            with when(warp == warps):
                put(scale, read("float32", "bc_load", s.data, T.int64(0), FLOAT))
                put(total, read("int32", "bc_load_int", qsum.data, T.int64(0)))

        scale, total = variable(T.float32(1), "float32"), variable(T.int32(0), "int32")
        with when(early == 0):
            bring()
        load(T.int32(0))
        do("bc_let_next_start")
        stamp(ids, y, N, 0)
        lane = ids.lane
        row = tile * TILE_ROWS + lane if slots == 1 else T.if_then_else(
            lane < TILE_ROWS, tile * TILE_ROWS + lane, (tile + apart - 1) * TILE_ROWS + lane
        )  # fmt: skip
        ends = T.And(
            warp == warps, T.And(lane < slots * TILE_ROWS, row < N * (1 + gate))
        )
        weight, offset = (variable(T.float32(0), "float32") for _ in range(2))
        with when(ends):
            put(weight, w_scale[row])
            with when(has_bias != 0):
                put(offset, bias[row])
        do("bc_wait_for_earlier")
        stamp(ids, y, N, 1)
        with when(early != 0):
            bring()
        sums = units * (UNIT_COLUMNS // 4)
        with when(T.And(warp == warps, lane < slots * TILE_ROWS)):
            put(room, T.int32(0), sums + lane)
        old = variable(T.uint32(0), "uint32")
        with when(T.And(has_residual != 0, ends)):
            put(old, read("uint32", "bc_load_bits", residual.data, long(row), type_y))
        do("bc_copy_wait")
        barrier()
        stamp(ids, y, N, 2)
        with when(warp < warps):
            acc = [local(4, "int32") for _ in range(slots)]
            for slot in range(slots):
                for i in range(4):
                    put(acc[slot], T.int32(0), i)
            b = local(8, "int32")
            operand = call(
                "uint32", "bc_shared", at(room, begin * 32 + T.floordiv(ids.lane, 8) * 4)
            )
            start = variable(operand, "uint32")

            place = variable(begin, "int32")
            with T.serial(turns) as turn:
                for i in range(ahead):
                    with when(place[0] + i < units):
                        do("bc_load_token", at(b, 0), start[0] + T.uint32(i * 128))
                        for slot in range(slots):
                            dot_unit(acc[slot], b, held, (slot * ahead + i) * 4)
                put(place, place[0] + warps * ahead)
                put(start, start[0] + T.cast(warps * (ahead * 128), "uint32"))
                load(turn + 1)
            for slot in range(slots):
                sum_ = lane_row(acc[slot], ids.lane)
                to = sums + slot * TILE_ROWS + ids.lane % 4 * 8 + T.floordiv(ids.lane, 4)
                with when(ids.lane % 4 < 2):
                    do("bc_add_shared", at(room, to), sum_)
        factor = variable(T.float32(0), "float32")
        with when(warp == warps):
            put(factor, call("float32", "__fdiv_rn", weight[0], scale[0]))
        stamp(ids, y, N, 3)
        barrier()
        stamp(ids, y, N, 4)
        with when(warp == warps):
            whole = room[sums + lane % (slots * TILE_ROWS)] - total[0]
            result = variable(T.cast(whole, "float32") * factor[0], "float32")
            if slots == 2:
                other = call(
                    "float32", "__shfl_down_sync", T.uint32(0xFFFFFFFF), result[0], T.int32(16)
                )
                up = variable(other, "float32")
                with when(gate != 0):
                    put(result, gated(activation, result[0], up[0]))
            with when(T.And(ends, T.Or(gate == 0, lane < TILE_ROWS))):
                with when(has_bias != 0):
                    put(result, result[0] + offset[0])
                with when(has_residual != 0):
                    put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
                do("bc_store", y.data, long(row), result[0], type_y)
            stamp(ids, y, N, 5, warps * 32)

    return device_kernel(name, PARAMETERS, 32 * (MOST_WARPS + 1), body)
