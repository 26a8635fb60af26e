"""One quantised row: every weight is on its way before anything else happens.

A block has a tile of rows; its warps share the columns. A warp asks for all of its weights, and for
a part of the row: before them, unless it must wait for the kernel before. Sums meet in shared
memory. At 2 to 5 us a kernel waits for its own instructions and arguments, so the code is short and
straight: beyond the last column are the warp's first weights and a row of zeros, not a branch.
"""

from __future__ import annotations

from typing import Any

from bitcompile.targets.tir.cuda.device import (
    Ids,
    address,
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
from bitcompile.targets.tir.cuda.rows import FLOAT
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

AHEAD = (1, 2, 3, 4)
"""Units of a warp: a thread has at most one piece of 16 bytes of the row to bring."""
MOST_WARPS = 24
LONGEST = MOST_WARPS * AHEAD[-1] * UNIT_COLUMNS
REGISTERS = 56
"""Of a thread: with what the compiler takes unasked (72), the next kernel's blocks find no room."""
SUMS = TILE_ROWS * 4
"""The four lanes that share a row add to places of their own."""

PARAMETERS = [
    ("w", "uint32*"), ("q", "uint8*"),
    *((name, "int32") for name in ("units", "warps", "N", "type_y")),
    ("s", "float32*"), ("qsum", "int32*"), ("w_scale", "float32*"), ("y", "uint8*"),
    ("bias", "float32*"), ("residual", "uint8*"), ("has_bias", "int32"), ("has_residual", "int32"),
]  # fmt: skip
"""What the first loads need comes first: 64 bytes of arguments arrive together."""


def gemv(name: str, ahead: int, early: bool, extras: bool) -> Any:
    """``y = scaled(W q)`` for one row of at most MOST_WARPS * ``ahead`` units.

    ``early``: the kernel before may still run. ``extras``: plus bias ``[N]`` and residual like y,
    where there are. Grid: tiles. Threads: 32 * ``warps``, with ``ahead`` units each. Dynamic shared
    memory: ``SUMS`` words, then the warps' units of the row (128 bytes).
    """

    def body(ids: Ids, w: Buffer, q: Buffer, units: Expr, warps: Expr, N: Expr, type_y: Expr,
             s: Buffer, qsum: Buffer, w_scale: Buffer, y: Buffer, bias: Buffer, residual: Buffer,
             has_bias: Expr, has_residual: Expr) -> None:  # fmt: skip
        room = view(dynamic(), "int32")
        thread, lane = ids.thread, ids.lane
        place = ids.warp * ahead
        first = ids.block_x * units + place
        held, piece = local(ahead * 4, "uint32"), local(4, "int32")
        for i in range(4):
            put(piece, T.int32(0), i)

        def bring() -> None:
            with when(thread < units * (UNIT_COLUMNS // 16)):
                do("bc_load_int4", at(piece, 0), q.data, long(thread * 16))

        if not early:
            bring()
        for i in range(ahead):
            unit = first + T.if_then_else(place + i < units, i, 0)
            do("bc_load_weights", at(held, i * 4), at(w, long(unit) * UNIT_WORDS + lane * 4))
        if early:
            do("bc_let_next_start")
            do("bc_wait_for_earlier")
            bring()
        row = ids.block_x * TILE_ROWS + lane
        ends = T.And(thread < TILE_ROWS, row < N)
        scale, total = variable(T.float32(1), "float32"), variable(T.int32(0), "int32")
        weight, offset = (variable(T.float32(0), "float32") for _ in range(2))
        old = variable(T.uint32(0), "uint32")
        with when(ends):
            put(scale, read("float32", "bc_load", s.data, T.int64(0), FLOAT))
            put(total, read("int32", "bc_load_int", qsum.data, T.int64(0)))
            put(weight, w_scale[row])
            if extras:
                with when(has_bias != 0):
                    put(offset, bias[row])
                with when(has_residual != 0):
                    put(old, read("uint32", "bc_load_bits", residual.data, long(row), type_y))
        with when(thread < SUMS // 4):
            do("bc_clear4", at(room, thread * 4))
        with when(thread < warps * (ahead * UNIT_COLUMNS // 16)):
            do("bc_put4", at(room, SUMS + thread * 4), at(piece, 0))
        sums_at = address(at(room, lane * 4))
        barrier()

        acc, b = local(4, "int32"), local(8, "int32")
        for i in range(4):
            put(acc, T.int32(0), i)
        from_ = at(room, SUMS + place * (UNIT_COLUMNS // 4) + T.floordiv(lane, 8) * 4)
        start = variable(call("uint32", "bc_shared", from_), "uint32")[0]
        for i in range(ahead):
            do("bc_load_token", at(b, 0), start + T.uint32(i * UNIT_COLUMNS))
            # Not by tensor cores: for one row, mma.sync takes longer than the dot products.
            for t in range(4):
                do("bc_dot16", at(acc, 0), held[i * 4 + t], b[2 * t], b[2 * t + 1])
        do("bc_add_shared", at(room, lane), acc[0] + T.shift_right(acc[2], 4))
        lower = T.shift_right(acc[1], 2) + T.shift_right(acc[3], 6)
        do("bc_add_shared", at(room, SUMS // 2 + lane), lower)
        barrier()
        with when(ends):
            whole = read("int32", "bc_sum_of4", sums_at) - total[0]
            factor = call("float32", "__fdiv_rn", weight[0], scale[0])
            result = variable(T.cast(whole, "float32") * factor, "float32")
            if extras:
                with when(has_bias != 0):
                    put(result, result[0] + offset[0])
                with when(has_residual != 0):
                    put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
            to = read("uint64", "bc_element", y.data, long(row), type_y)
            do("bc_store_to", to, result[0], type_y)

    return device_kernel(name, PARAMETERS, 32 * MOST_WARPS, body)
