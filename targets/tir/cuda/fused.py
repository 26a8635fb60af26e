"""One row from activations to result in one kernel: norm, quantise, multiply.

What counts is the chain from the end of the kernel before to the own last store, so the roles are
split by warps. Some warps share the columns: each brings, norms and quantises its own units of the
row and multiplies them with every tile of the block; a warp's columns are a subtree of the pairwise
sum of squares. *Ending* warps scale and store. One fetches the weights into shared memory: some
before the kernel before has ended, the rest as the next one may start, so that neither takes the
other's bandwidth. Sums of a tile meet in shared memory, where integers may be added in
any order; the four lanes that share a row add to places of their own.

A multiprocessor should have one block of each kernel, and room for one of the next.
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
    kept,
    long,
    now,
    put,
    read,
    rolled,
    shared,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.rows import (
    gated,
    magnitude,
    pairwise,
    row_scale,
    square_sum4,
    warp_sum,
)
from bitcompile.targets.tir.cuda.tile import TILE_ROWS, UNIT_COLUMNS, UNIT_WORDS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

MOST_WARPS = {2: 12, 4: 16}
"""Warps that share the row, by the units that each has: rows of up to 3072 or 8192 values."""
MOST_TILES = {2: 8, 4: 2}
"""Row tiles of a block, likewise; both of a pair count. *Ending* warps have a lane for each row."""
REGISTERS = 56
"""Of a thread: a block of 18 warps leaves half of them to the next kernel's."""
PIECES = 8
"""Most copies of weights of a block: one a tile, or two of a long one; a lane opens each."""
EARLY = 4
"""Copies that a block asks for at once; for the rest it waits until the kernel before has ended,
where kernels overlap."""

PARAMETERS = [
    ("x", "uint8*"), ("w", "uint32*"), ("gamma", "float32*"), ("w_scale", "float32*"),
    *((name, "int32") for name in (
        "units", "tiles", "step", "warps", "ending", "K", "N", "type_x", "has_norm",
    )),
    ("inverse", "float32"), ("eps", "float32"),
    ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in ("type_y", "has_bias", "has_residual", "activation")),
]  # fmt: skip
"""What the first loads need comes first: 64 bytes of arguments arrive together."""


def threads(share: int) -> int:
    """Most threads of a block whose warps have ``share`` units each."""
    return 32 * (MOST_WARPS[share] + MOST_TILES[share] // 2 + 1)


def fused(name: str, share: int, wide: bool, gate: bool) -> Any:
    """``y = scaled(W quantise(norm(x)))`` for one row whose warps have ``share`` units each.

    The number of values is a multiple of 4, ``inverse`` 1 over it; ``wide``: they are float32, else
    of a 16-bit type.
    ``W``: units ``[tiles, units]``; ``y`` ``[N]`` of ``type_y``, plus bias ``[N]`` and residual
    like y. With ``gate``, rows n and N + n of W give ``act(gate) * up``. Grid: blocks of ``step``
    tiles. Threads: 32 * (``warps`` + ``ending`` + 1), of which ``ending`` warps have a lane for
    each row. Dynamic shared memory: ``fused_shared`` in ``cuda_launch.c``.
    """
    pairs = 2 if gate else 1
    cuts = share // 2  # copies a tile

    def body(ids: Ids, x: Buffer, w: Buffer, gamma: Buffer, w_scale: Buffer, units: Expr,
             tiles: Expr, step: Expr, warps: Expr, ending: Expr, K: Expr, N: Expr, type_x: Expr,
             has_norm: Expr, inverse: Expr, eps: Expr, bias: Buffer, residual: Buffer, y: Buffer,
             type_y: Expr, has_bias: Expr, has_residual: Expr,
             activation: Expr) -> None:  # fmt: skip
        room = view(dynamic(), "int32")
        sums_of_warps, most = shared(MOST_WARPS[share], "float32"), shared(32, "int32")
        landed = shared(PIECES, "uint64")
        warp, lane = kept(ids.warp), kept(ids.lane, ids.lane)
        base = ids.block_x * step
        count = T.min(step, tiles - base)
        rows, slots = count * TILE_ROWS, count * pairs
        # Weights, then the row's int8 values, then sums.
        row_at = step * pairs * units * UNIT_WORDS
        sums = row_at + warps * (share * (UNIT_COLUMNS // 4))
        meeting = (warps + ending) * 32
        half = T.floordiv(units, 2) if cuts == 2 else units

        with when(ids.thread < slots * TILE_ROWS):
            do("bc_clear4", at(room, sums + ids.thread * 4))
        with when(ids.thread < MOST_WARPS[share]):
            put(sums_of_warps, T.float32(0), ids.thread)
        with when(warp == warps + ending):
            with when(lane < slots * cuts):
                do("bc_landing", at(landed, lane))
            do("bc_landing_fence")
        barrier()

        with when(warp == warps + ending), rolled(slots * cuts) as i:
            slot, second = T.floordiv(i, cuts), i % cuts
            tile = base + slot + T.if_then_else(slot < count, 0, tiles - count)
            first = second * half
            many = half + second * (units - half * 2)
            to = at(room, (slot * units + first) * UNIT_WORDS)
            do("bc_fetch", to, w.data, (long(tile) * units + first) * (UNIT_WORDS * 4),
               many * (UNIT_WORDS * 4), at(landed, i), lane)  # fmt: skip
            with when(i == T.min(slots * cuts, EARLY) - 1):
                do("bc_wait_for_earlier")
                do("bc_let_next_start")

        with when(warp < warps):
            own = warp * share
            weights = local(4 * share, "float32")  # of the norm
            row = local(4 * share, "float32")
            # Word 4 j + c of a unit goes to lanes c of four: theirs lie together.
            c, g = lane % 4, T.floordiv(lane, 4)
            mine = address(at(room, row_at + own * (UNIT_COLUMNS // 4) + c * 8))
            most_at = address(at(most, warp))
            first = address(at(room, own * UNIT_WORDS + lane * 4))
            sum_at = address(at(room, sums + lane))
            landing = address(at(landed, T.int32(0)))
            to = now(mine + T.cast(g * 4, "uint32"))
            wanted = [now(T.cast(own + p < units, "uint32")) for p in range(share)]
            for i in range(4 * share):
                put(weights, T.float32(0), i)
            length = T.cast(K, "float32")
            with when(has_norm != 0):
                for p in range(share):
                    k = (own + p) * UNIT_COLUMNS + lane * 4
                    with when(k < K):
                        do("bc_load_constant4", at(weights, p * 4), gamma.data, k)
            do("bc_wait_for_earlier")
            place = x.data, T.int64(0), own * 32 + lane, T.int32(32), T.floordiv(K, 4)
            if wide:
                do(f"bc_load_wide<{share}>", at(row, 0), *place)
            else:
                do(f"bc_load_narrow<{share}>", at(row, 0), *place, type_x)
            with when(has_norm != 0):
                own_sum = warp_sum([square_sum4(row, p * 4) for p in range(share)], lane)
                with when(lane == 0):
                    put(sums_of_warps, own_sum, warp)
                do("bc_meet_some", warps * 32)
                squares = local(MOST_WARPS[share], "float32")
                for i in range(0, MOST_WARPS[share], 4):
                    do("bc_load_shared4", at(squares, i), at(sums_of_warps, i))
                total = pairwise(squares, MOST_WARPS[share])
                rstd = variable(
                    call("float32", "bc_reciprocal_rms", total, length, inverse, eps), "float32"
                )[0]
                for i in range(4 * share):
                    put(row, (row[i] * rstd) * weights[i], i)
            bits = variable(T.int32(0), "int32")
            for i in range(4 * share):
                put(bits, T.max(bits[0], magnitude(row[i])))
            put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
            with when(lane == 0):
                do("bc_store_shared", most_at, bits[0])
            do("bc_meet", meeting)
            put(bits, most[T.min(lane, warps - 1)])
            put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
            scale, _ = row_scale(bits[0])
            part, b = variable(T.int32(0), "int32"), local(8 * share, "int32")
            for p in range(share):
                packed = variable(call("int32", "bc_quantized4", at(row, p * 4), scale), "int32")
                put(part, part[0] + call("int32", "bc_sum4", packed[0]))
                do("bc_store_shared", to + T.uint32(p * UNIT_COLUMNS), packed[0])
            do("__syncwarp")
            for p in range(share):
                do("bc_load_shared8", at(b, p * 8), mine + T.uint32(p * UNIT_COLUMNS))
            put(part, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), part[0]))

            # The codes' zero point, taken off once a row.
            offset = variable(T.if_then_else(c == 0, part[0], 0), "int32")[0]
            together = 4 // share  # units: more registers would cost a block
            acc, words = local(4, "int32"), local(4 * together, "uint32")
            for i in range(4 * together):
                put(words, T.uint32(0), i)
            next_, sum_ = variable(first, "uint32"), variable(sum_at, "uint32")
            with rolled(slots) as slot:
                for i in range(4):
                    put(acc, T.int32(0), i)
                if cuts == 1:
                    do("bc_landed", landing + T.cast(slot * 8, "uint32"))
                else:
                    with when(own < half):
                        do("bc_landed", landing + T.cast(slot * 16, "uint32"))
                    with when(own + share > half):
                        do("bc_landed", landing + T.cast(slot * 16 + 8, "uint32"))
                for p in range(0, share, together):
                    for i in range(together):
                        unit = next_[0] + T.uint32((p + i) * UNIT_WORDS * 4)
                        do("bc_load_shared_unit_if", at(words, i * 4), unit, wanted[p + i])
                    for t in range(4 * together):
                        q = b[(p * 4 + t) * 2], b[(p * 4 + t) * 2 + 1]
                        do("bc_dot16", at(acc, 0), words[t], *q)
                put(next_, next_[0] + T.cast(units * (UNIT_WORDS * 4), "uint32"))
                upper = acc[0] + T.shift_right(acc[2], 4)
                lower = T.shift_right(acc[1], 2) + T.shift_right(acc[3], 6)
                do("bc_add_at", sum_[0], upper - offset)
                do("bc_add_at", sum_[0] + T.uint32(TILE_ROWS * 8), lower - offset)
                put(sum_, sum_[0] + T.uint32(TILE_ROWS * 16))
            do("bc_meet", meeting)

        with when(T.And(warp >= warps, warp < warps + ending)):
            own = ids.thread - warps * 32
            n = base * TILE_ROWS + own
            mine = T.And(own < rows, n < N)
            scales = [variable(T.float32(0), "float32") for _ in range(pairs)]
            with when(mine):
                for i in range(pairs):
                    put(scales[i], w_scale[i * N + n])
            # Adding -0 changes nothing.
            addend, old = (variable(T.float32(-0.0), "float32") for _ in range(2))
            with when(T.And(has_bias != 0, mine)):
                put(addend, bias[n])
            to = read("uint64", "bc_element", y.data, long(n), type_y)
            sums_at = address(at(room, sums + own * 4))
            do("bc_wait_for_earlier")
            with when(T.And(has_residual != 0, mine)):
                put(old, read("float32", "bc_load", residual.data, long(n), type_y))
            do("bc_meet", meeting)
            bits = variable(most[T.min(lane, warps - 1)], "int32")
            put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
            _, stored = row_scale(bits[0])
            factors = [
                variable(call("float32", "__fdiv_rn", scale[0], stored), "float32")
                for scale in scales
            ]
            do("bc_meet", meeting)
            with when(mine):

                def product(address: Expr, factor: Buffer) -> Expr:
                    whole = read("int32", "bc_sum_of4", address)
                    return variable(T.cast(whole, "float32") * factor[0], "float32")[0]

                result = variable(product(sums_at, factors[0]), "float32")
                if gate:
                    up = product(sums_at + T.cast(rows * 16, "uint32"), factors[1])
                    put(result, gated(activation, result[0], up))
                put(result, result[0] + addend[0])
                put(result, result[0] + old[0])
                do("bc_store_to", to, result[0], type_y)

    return device_kernel(name, PARAMETERS, threads(share), body)
