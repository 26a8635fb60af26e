"""One quantised row: every weight is on its way before anything else happens.

A block has one or two tiles of rows; its warps share the columns. A warp loads all weights of a turn
at once, then waits for the row of the kernel before, whose scale, sum and residual are on their way
too while tensor cores multiply; sums of a tile meet in shared memory.
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
    variable,
    view,
)
from bitcompile.targets.tir.cuda.rows import FLOAT, gated
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, TOKEN_UNIT, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

MOST_WARPS = 16

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "N", "units", "token_groups", "tiles", "warps", "turns", "type_y", "has_bias",
        "has_residual", "activation",
    )),
]  # fmt: skip


def mma_unit(low: Buffer, high: Buffer, b: Buffer, words: Buffer, first: int) -> None:
    """Add a unit's products; ``words`` from ``first`` on are a lane's four."""
    for t in range(4):
        do("bc_mma_scaled", at(low, 0), at(high, 0), words[first + t], b[2 * t], b[2 * t + 1])


def lane_row(low: Buffer, high: Buffer, column: Expr) -> Expr:
    """The sum of row ``lane / 4`` (column 0 of a lane's four) or of the row 8 further on.

    Every column of the product is the one token; the codes' places divide the sums without rest.
    """
    upper = low[0] + T.shift_right(high[0], 4)
    lower = T.shift_right(low[2], 2) + T.shift_right(high[2], 6)
    return T.if_then_else(column == 0, upper, lower)


def gemv(name: str, slots: int, ahead: int) -> Any:
    """``y = scaled(W q)`` for one row, ``ahead`` units of each of ``slots`` tiles at a time.

    With two slots and ``activation`` >= 0, a block has a gate tile and its up tile, ``tiles``
    further on; without, two neighbours. Grid: ceil(tiles / slots), or tiles with a gate. Threads:
    32 * ``warps``. Dynamic shared memory: ``turns * warps * ahead`` units of the row (128 bytes),
    and ``slots * warps * 16`` sums.
    """

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, N: Expr, units: Expr, token_groups: Expr, tiles: Expr,
             warps: Expr, turns: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             activation: Expr) -> None:  # fmt: skip
        memory = dynamic()
        room = view(memory, "int32")
        held = local(slots * ahead * 4, "uint32")
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        gate = T.cast(activation >= 0, "int32") if slots == 2 else T.int32(0)
        tile = ids.block_x * (slots - gate) if slots == 2 else ids.block_x
        apart = T.if_then_else(gate != 0, tiles, 1)
        addresses = []
        for slot in range(slots):
            mine = tile + slot * apart
            if slot:  # a last block may have one tile; it reads it twice
                mine = T.min(mine, tiles * (1 + gate) - 1)
            word = long(mine) * units * UNIT_WORDS + warp * (ahead * UNIT_WORDS) + ids.lane * 4
            addresses.append(variable(call("uint64", "bc_pointer", at(w, word)), "uint64"))

        def load(turn: Expr) -> None:
            first = (turn * warps + warp) * ahead
            for i in range(ahead):
                for slot in range(slots):
                    skipped = T.cast(turn * warps * (ahead * UNIT_WORDS * 4), "uint64")
                    address = addresses[slot][0] + skipped + T.uint64(i * UNIT_WORDS * 4)
                    wanted = T.cast(first + i < units, "int32")
                    do("bc_load_unit", at(held, (slot * ahead + i) * 4), address, wanted)

        load(T.int32(0))
        do("bc_let_next_start")
        thread = ids.thread
        row = tile * TILE_ROWS + thread if slots == 1 else T.if_then_else(
            thread < TILE_ROWS, tile * TILE_ROWS + thread,
            (tile + apart) * TILE_ROWS + thread - TILE_ROWS,
        )  # fmt: skip
        total_rows = N * (1 + gate)
        ends = T.And(thread < slots * TILE_ROWS, row < total_rows)
        weight = variable(T.float32(0), "float32")
        offset = variable(T.float32(0), "float32")
        with when(ends):
            put(weight, w_scale[row])
            with when(has_bias != 0):
                put(offset, bias[row])
        do("bc_wait_for_earlier")
        pieces = units * (UNIT_COLUMNS // 16)
        with T.serial(T.floordiv(pieces + (warps * 32 - 1), warps * 32)) as turn:
            i = turn * (warps * 32) + thread
            with when(i < pieces):
                byte = long(T.floordiv(i, 8) * token_groups) * TOKEN_UNIT + i % 8 * 16
                do("bc_copy_async16", at(room, i * 4), q.data, byte)
        scale, total = variable(T.float32(1), "float32"), variable(T.int32(0), "int32")
        old = variable(T.uint32(0), "uint32")
        with when(thread < slots * TILE_ROWS):
            put(scale, read("float32", "bc_load", s.data, T.int64(0), FLOAT))
            put(total, read("int32", "bc_load_int", qsum.data, T.int64(0)))
            with when(T.And(has_residual != 0, ends)):
                put(old, read("uint32", "bc_load_bits", residual.data, long(row), type_y))
        do("bc_copy_wait")
        barrier()
        low = [local(4, "int32") for _ in range(slots)]
        high = [local(4, "int32") for _ in range(slots)]
        b = local(8, "int32")
        for slot in range(slots):
            for i in range(4):
                put(low[slot], T.int32(0), i)
                put(high[slot], T.int32(0), i)
        operand = call("uint32", "bc_shared", at(room, warp * (ahead * 32) + T.floordiv(ids.lane, 8) * 4))
        start = variable(operand, "uint32")

        def multiply(turn: Expr) -> None:
            first = (turn * warps + warp) * ahead
            for i in range(ahead):
                with when(first + i < units):
                    byte = T.cast(turn * warps * (ahead * 128) + i * 128, "uint32")
                    do("bc_load_token", at(b, 0), start[0] + byte)
                    for slot in range(slots):
                        mma_unit(low[slot], high[slot], b, held, (slot * ahead + i) * 4)

        factor = variable(call("float32", "__fdiv_rn", weight[0], scale[0]), "float32")
        multiply(T.int32(0))
        with T.serial(turns - 1) as more:
            load(more + 1)
            multiply(more + 1)
        sums = units * 32
        column = ids.lane % 4
        with when(column < 2):
            for slot in range(slots):
                to = sums + (slot * warps + warp) * TILE_ROWS + column * 8 + T.floordiv(ids.lane, 4)
                put(room, lane_row(low[slot], high[slot], column), to)
        barrier()
        with when(ids.warp == 0):
            acc = variable(-total[0], "int32")
            slot, r = T.floordiv(thread, TILE_ROWS), thread % TILE_ROWS
            with when(thread < slots * TILE_ROWS), T.serial(warps) as i:
                put(acc, acc[0] + room[sums + (slot * warps + i) * TILE_ROWS + r])
            result = variable(T.cast(acc[0], "float32") * factor[0], "float32")
            if slots == 2:
                other = call(
                    "float32", "__shfl_down_sync", T.uint32(0xFFFFFFFF), result[0], T.int32(16)
                )
                up = variable(other, "float32")
                with when(gate != 0):
                    put(result, gated(activation, result[0], up[0]))
            mine = T.And(ends, T.Or(gate == 0, thread < TILE_ROWS))
            with when(mine):
                with when(has_bias != 0):
                    put(result, result[0] + offset[0])
                with when(has_residual != 0):
                    put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
                do("bc_store", y.data, long(row), result[0], type_y)

    return device_kernel(name, PARAMETERS, 32 * MOST_WARPS, body)
