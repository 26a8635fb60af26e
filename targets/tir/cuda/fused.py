"""One row from activations to result in one kernel: norm, quantise, multiply.

Kernels are many and loops stay loops: a kernel of a few microseconds waits for its own code.

Each block norms and quantises the row by itself, so a multiprocessor should have one. Weights land
in shared memory meanwhile, and with programmatic dependent launch they are on their way before the
kernel before has ended. A block takes some row tiles; their units, in the order they lie in memory,
go to its warps in equal runs, and sums of a tile meet in shared memory, where integers may be added
in any order.
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
    rolled,
    shared,
    shuffle_xor,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.gemv import dot_unit, lane_row
from bitcompile.targets.tir.cuda.rows import (
    LANES,
    gated,
    magnitude,
    reciprocal_rms,
    row_scale,
)
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

WARPS = 16
"""A power of two."""
THREADS = 32 * WARPS
AHEAD = 8
"""Units of weights a warp has under way."""
TURNS = (2, 4)
"""Words of four values that a thread keeps of the row, by kernel: of up to 4096 or 8192."""
STEP_WORDS = UNIT_COLUMNS // 4

PARAMETERS = [
    ("x", "uint8*"), ("gamma", "float32*"), ("w", "uint32*"), ("w_scale", "float32*"),
    ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "N", "K", "units", "tiles", "step", "held", "type_x", "type_y", "has_norm",
        "has_bias", "has_residual", "activation",
    )),
    ("eps", "float32"),
]  # fmt: skip


def ordered_squares(squares: Buffer, start: Expr, count: Expr, lane: Expr) -> Expr:
    """The sum of squares in shared memory, by one warp; ``count``: a multiple of 512.

    Zeros that fill the row up leave the sums as they are.
    """
    sums = [variable(T.float32(0), "float32") for _ in range(2)]
    halves = [local(16, "float32") for _ in range(2)]
    from_ = variable(start + lane * 2, "int32")[0]

    def bring(turn: Expr, half: Buffer) -> None:
        for j in range(8):
            do("bc_load_shared2", at(half, j * 2), at(squares, from_ + (turn * 8 + j) * LANES))

    def add(half: Buffer) -> None:
        for j in range(8):
            for i in range(2):
                put(sums[i], sums[i][0] + half[j * 2 + i])

    turns = T.shift_right(count, 9)
    bring(T.int32(0), halves[0])
    with T.serial(T.shift_right(turns, 1)) as pair:
        bring(pair * 2 + 1, halves[1])
        add(halves[0])
        bring(T.min(pair * 2 + 2, turns - 1), halves[0])
        add(halves[1])
    with when(T.bitwise_and(turns, 1) == 1):
        add(halves[0])
    # A lane has sums 2 l and 2 l + 1: the tree joins sums 32, 16, 8, 4, 2, then 1 apart.
    for distance in (16, 8, 4, 2, 1):
        for total in sums:
            put(total, total[0] + shuffle_xor(total[0], distance))
    return sums[0][0] + sums[1][0]


def fused(name: str, turns: int, wide: bool, gate: bool) -> Any:
    """``y = scaled(W quantise(norm(x)))`` for one row of ``2048 * turns`` values at most.

    Their number is a multiple of 4; ``wide``: they are float32, else of a 16-bit type. ``W``: units
    ``[tiles, units]``; ``y`` ``[N]`` of ``type_y``, plus bias ``[N]`` and residual like y. With
    ``gate``, rows n and N + n of W give ``act(gate) * up``. Grid: blocks of
    ``step`` tiles. Dynamic shared memory: ``fused_shared`` in ``cuda_launch.c``.
    """

    def body(ids: Ids, x: Buffer, gamma: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, N: Expr, K: Expr, units: Expr, tiles: Expr, step: Expr,
             held: Expr, type_x: Expr, type_y: Expr, has_norm: Expr, has_bias: Expr,
             has_residual: Expr, activation: Expr, eps: Expr) -> None:  # fmt: skip
        pairs = 2 if gate else 1
        memory = dynamic()
        room, values = view(memory, "int32"), view(memory, "float32")
        norm, most = shared(1, "float32"), shared(WARPS, "int32")
        total = shared(1, "int32")
        words = T.floordiv(K, 4)
        row_words = units * STEP_WORDS
        filled = T.floordiv(words + 127, 128) * 128
        rows, slots = T.min(step, tiles - ids.block_x * step) * TILE_ROWS, step * pairs * TILE_ROWS
        # Weights, then the row (its squares, then its int8 values), gamma, sums, scales.
        row_at = held * (WARPS * UNIT_WORDS)
        gamma_at = row_at + filled * 4
        sums = gamma_at + filled * 4
        scales = sums + slots

        # The units of this warp: with pairs, half of the warps have gate tiles, half up tiles.
        base = ids.block_x * step
        count = T.min(step, tiles - base)
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )[0]
        team = WARPS // pairs
        pair = T.floordiv(warp, team)
        whole = count * units
        run = T.floordiv(whole + (team - 1), team)
        begin = variable(warp % team * run, "int32")
        left = variable(T.min(run, whole - begin[0]), "int32")[0]
        word = long((base + pair * tiles) * units + begin[0]) * UNIT_WORDS + ids.lane * 4
        address = variable(call("uint64", "bc_pointer", at(w, word)), "uint64")
        landing = call("uint32", "bc_shared", at(room, warp * held * UNIT_WORDS + ids.lane * 4))
        ring = variable(landing, "uint32")[0]

        def load(unit: Expr, place: Expr) -> None:
            wanted = T.cast(unit < left, "int32")
            byte = T.cast(unit, "uint64") * T.uint64(UNIT_WORDS * 4)
            to = ring + T.cast(place * (UNIT_WORDS * 4), "uint32")
            do("bc_copy_unit", to, address[0] + byte, wanted)
            do("bc_copy_commit")

        with when(has_norm != 0):
            for turn in range(turns):
                word = turn * THREADS + ids.thread
                with when(word < words):
                    do("bc_copy_async16", at(values, gamma_at + word * 4), gamma.data,
                       long(word) * 16)  # fmt: skip
        with when(ids.thread < slots):
            second = T.cast(ids.thread >= rows, "int32")
            n = base * TILE_ROWS + ids.thread - second * rows
            with when(n < N):
                do("bc_copy_async4", at(values, scales + ids.thread), at(w_scale, second * N + n))
        do("bc_copy_commit")
        with rolled(AHEAD) as i:
            load(i, i)
        do("bc_let_next_start")
        with when(ids.thread < slots):
            put(room, T.int32(0), sums + ids.thread)
        with when(ids.thread == 0):
            put(total, T.int32(0))
        slot = variable(pair * count + T.floordiv(begin[0], units), "int32")
        column = variable(begin[0] % units, "int32")

        do("bc_wait_for_earlier")
        own = T.int32(THREADS - 1) - ids.thread  # the last warps have fewer units
        n = base * TILE_ROWS + own
        ends = T.And(own < rows, n < N)
        old = variable(T.uint32(0), "uint32")
        row = local(4 * turns, "float32")
        place = x.data, T.int64(0), ids.thread, THREADS, words
        if wide:
            do(f"bc_load_wide<{turns}>", at(row, 0), *place)
        else:
            do(f"bc_load_narrow<{turns}>", at(row, 0), *place, type_x)
        with when(T.And(has_residual != 0, ends)):
            put(old, read("uint32", "bc_load_bits", residual.data, long(n), type_y))
        four = local(4, "float32")
        with when(has_norm != 0):
            for turn in range(turns):
                word = turn * THREADS + ids.thread
                with when(word < filled):
                    for j in range(4):
                        put(four, row[turn * 4 + j] * row[turn * 4 + j], j)
                    do("bc_store_shared4", at(values, row_at + word * 4), at(four, 0))
            barrier()
            with when(ids.warp == 0):
                summed = ordered_squares(values, row_at, filled * 4, ids.lane)
                put(norm, reciprocal_rms(summed, K, eps))
            do(f"bc_copy_wait_but<{AHEAD}>")
            barrier()
            rstd = norm[0]
            for turn in range(turns):
                word = turn * THREADS + ids.thread
                with when(word < words):
                    do("bc_load_shared4", at(four, 0), at(values, gamma_at + word * 4))
                    for j in range(4):
                        put(row, (row[turn * 4 + j] * rstd) * four[j], turn * 4 + j)
        bits = variable(T.int32(0), "int32")
        for i in range(4 * turns):
            put(bits, T.max(bits[0], magnitude(row[i])))
        put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
        with when(ids.lane == 0):
            put(most, bits[0], ids.warp)
        do(f"bc_copy_wait_but<{AHEAD}>")
        barrier()
        put(bits, most[ids.lane % WARPS])
        put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
        scale, kept = row_scale(bits[0])
        part = variable(T.int32(0), "int32")
        for turn in range(turns):
            word = turn * THREADS + ids.thread
            with when(word < row_words):
                packed = variable(call("int32", "bc_quantized4", at(row, turn * 4), scale), "int32")
                put(part, part[0] + call("int32", "bc_sum4", packed[0]))
                put(room, packed[0], row_at + word)
        put(part, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), part[0]))
        with when(ids.lane == 0):
            do("bc_add_shared", at(total, 0), part[0])
        barrier()
        factors = [variable(T.float32(0), "float32") for _ in range(2)]
        with when(ends):
            put(factors[0], call("float32", "__fdiv_rn", values[scales + own], kept))
            if gate:
                put(factors[1], call("float32", "__fdiv_rn", values[scales + rows + own], kept))

        acc = local(4, "int32")
        b, four_words = local(8, "int32"), local(4, "uint32")
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4

        def clear() -> None:
            for i in range(4):
                put(acc, T.int32(0), i)

        def add_up() -> None:
            """Add the tile's sums to the block's."""
            sum_ = lane_row(acc, ids.lane)
            with when(c < 2):
                do("bc_add_shared", at(room, sums + slot[0] * TILE_ROWS + c * 8 + g), sum_)
            clear()

        clear()
        first = call("uint32", "bc_shared", at(room, row_at + T.floordiv(ids.lane, 8) * 4))
        operand = variable(first + T.cast(column[0] * UNIT_COLUMNS, "uint32"), "uint32")
        slot_of = variable(T.int32(0), "int32")
        with rolled(left) as unit:
            do(f"bc_copy_wait_but<{AHEAD - 1}>")
            do("bc_load_shared_unit", at(four_words, 0),
               ring + T.cast(slot_of[0] * (UNIT_WORDS * 4), "uint32"))  # fmt: skip
            do("bc_load_token", at(b, 0), operand[0])
            put(operand, operand[0] + T.uint32(UNIT_COLUMNS))
            dot_unit(acc, b, four_words, 0)
            put(column, column[0] + 1)
            with when(T.Or(column[0] == units, unit + 1 == left)):
                add_up()
            with when(column[0] == units):
                put(column, T.int32(0))
                put(slot, slot[0] + 1)
                put(operand, operand[0] - T.cast(units * UNIT_COLUMNS, "uint32"))
            load(unit + AHEAD, slot_of[0])
            put(slot_of, slot_of[0] + 1)
            with when(slot_of[0] == AHEAD):
                put(slot_of, T.int32(0))
        barrier()

        with when(ends):

            def product(row: Expr, factor: Expr) -> Expr:
                whole = room[sums + row] - total[0]
                return variable(T.cast(whole, "float32") * factor, "float32")[0]

            result = variable(product(own, factors[0][0]), "float32")
            if gate:
                put(result, gated(activation, result[0], product(rows + own, factors[1][0])))
            with when(has_bias != 0):
                put(result, result[0] + bias[n])
            with when(has_residual != 0):
                put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
            do("bc_store", y.data, long(n), result[0], type_y)

    return device_kernel(name, PARAMETERS, THREADS, body)
