"""Products with 2 to 16 quantised tokens: every weight is read once, many at a time.

A block takes some row tiles; their units, in the order they lie in memory, go to its warps in equal
runs. A warp starts its first loads, then the block brings the tokens (they come from the kernel
before: with programmatic dependent launch the weights are on their way while that one ends), then
tensor cores multiply and sums of a tile meet in shared memory, where integers may be added in any
order. One token: :mod:`gemv` and :mod:`fused`.
"""

from __future__ import annotations

import itertools
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
from bitcompile.targets.tir.cuda.tile import (
    TILE_ROWS,
    TOKEN_UNIT,
    TOKENS,
    UNIT_COLUMNS,
    UNIT_WORDS,
)
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

WARPS = 16
"""A power of two: 2**4, as :class:`Share` says."""
THREADS = 32 * WARPS
IN_FLIGHT = 8
"""Units of weights a warp has under way: 64 KiB a block."""
STEP_WORDS = UNIT_COLUMNS // 4
"""Words of a token's unit."""
ROW_PAD = 4
"""Words between tokens in shared memory that keep a warp's reads in different banks."""

PARAMETERS = [
    ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"), ("w", "uint32*"),
    ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"), ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "units", "token_groups", "tiles", "step", "pairs", "type_y", "has_bias",
        "has_residual", "activation",
    )),
]  # fmt: skip


class Share:
    """The tiles of a block and the units of a warp, which lie one behind the other.

    With pairs, slot i of ``count`` is a gate tile and slot ``count + i`` its up tile, which lies
    ``tiles`` tiles further on; half of the warps take the former, half the latter.
    """

    def __init__(self, ids: Ids, w: Buffer, tiles: Expr, step: Expr, pairs: Expr,
                 units: Expr) -> None:  # fmt: skip
        self.base = ids.block_x * step
        self.count = T.min(step, tiles - self.base)
        # The shuffle tells the compiler that a warp agrees on it.
        warp = variable(
            call("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), ids.warp, T.int32(0)), "int32"
        )
        paired = T.cast(pairs == 2, "int32")
        shift = 4 - paired  # the warps of a team, as a power of two
        self.pair = T.shift_right(warp[0], shift)
        total = self.count * units
        run = T.shift_right(total + (WARPS - 1 - paired * (WARPS // 2)), shift)
        self.begin = variable((warp[0] - T.shift_left(self.pair, shift)) * run, "int32")
        self.left = variable(T.min(run, total - self.begin[0]), "int32")
        word = long((self.base + self.pair * tiles) * units + self.begin[0]) * UNIT_WORDS
        self.address = variable(call("uint64", "bc_pointer", at(w, word + ids.lane * 4)), "uint64")

    def place(self, units: Expr) -> tuple[Buffer, Buffer]:
        """Slot and column of the next unit; divisions, so not before the loads."""
        slot = self.pair * self.count + T.floordiv(self.begin[0], units)
        return variable(slot, "int32"), variable(self.begin[0] % units, "int32")

    def load(self, held: Buffer, ahead: int, place: int) -> None:
        """Start loading a lane's four words of the unit ``ahead`` of the next, if there is one."""
        address = self.address[0] + T.uint64(ahead * UNIT_WORDS * 4)
        wanted = T.cast(self.left[0] > ahead, "int32")
        do("bc_load_unit", at(held, place * 4), address, wanted)


def _bring_tokens(ids: Ids, q: Buffer, room: Buffer, tokens: int, units: Expr, stride: Expr,
                  token_groups: Expr) -> None:  # fmt: skip
    """The quantised tokens, each lane's words of a unit together."""
    pieces = units * (tokens * 8)  # 16 bytes each; one token stands in the first row of a group
    four = local(4, "int32")
    with T.serial(T.floordiv(pieces + (THREADS - 1), THREADS)) as turn:
        i = turn * THREADS + ids.thread
        with when(i < pieces):
            unit, token, stored = T.floordiv(i, tokens * 8), T.floordiv(i, 8) % tokens, i % 8
            group = unit * token_groups + T.floordiv(token, TOKENS)
            row = token % TOKENS
            offset = long(group) * TOKEN_UNIT + row * UNIT_COLUMNS + stored * 16
            do("bc_load_int4", at(four, 0), q.data, offset)
            piece = T.bitwise_xor(stored, row)
            for c in range(4):
                put(room, four[c], token * stride + unit * STEP_WORDS + c * 8 + piece)


def decode(name: str, tokens: int) -> Any:
    """``y = scaled(W q)`` for up to ``tokens`` quantised rows, 8 or 16.

    ``W``: units ``[tiles, units]``; ``y`` ``[M, N]`` of ``type_y``, plus bias ``[N]`` and residual
    like y. With ``pairs`` 2, rows n and N + n of W give ``act(gate) * up``. Grid: blocks of
    ``step`` tiles. Dynamic shared memory: ``decode_shared`` in ``cuda_launch.c``.
    """
    groups = tokens // TOKENS

    def body(ids: Ids, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer, w_scale: Buffer, bias: Buffer,
             residual: Buffer, y: Buffer, M: Expr, N: Expr, units: Expr, token_groups: Expr,
             tiles: Expr, step: Expr, pairs: Expr, type_y: Expr, has_bias: Expr, has_residual: Expr,
             activation: Expr) -> None:  # fmt: skip
        memory = dynamic()
        room, values = view(memory, "int32"), view(memory, "float32")
        held = local(IN_FLIGHT * 4, "uint32")
        share = Share(ids, w, tiles, step, pairs, units)
        stride = units * STEP_WORDS + ROW_PAD
        rows, slots = share.count * TILE_ROWS, step * pairs * TILE_ROWS
        sums = stride * tokens  # where accumulators begin: [slots, tokens]
        scales = sums + slots * tokens  # and the weights' scales: [slots]
        for i in range(IN_FLIGHT):
            share.load(held, i, i)
        do("bc_let_next_start")
        (slot, column), left = share.place(units), share.left
        with T.serial(T.floordiv(slots * tokens + (THREADS - 1), THREADS)) as turn:
            i = turn * THREADS + ids.thread
            with when(i < slots * tokens):
                put(room, T.int32(0), sums + i)
        with when(ids.thread < slots):
            pair = T.cast(ids.thread >= rows, "int32")
            n = share.base * TILE_ROWS + ids.thread - pair * rows
            with when(T.And(n < N, pair < pairs)):
                do("bc_copy_async4", at(values, scales + ids.thread), at(w_scale, pair * N + n))
        do("bc_wait_for_earlier")
        _bring_tokens(ids, q, room, tokens, units, stride, token_groups)
        do("bc_copy_wait")
        barrier()

        low, high = local(4 * groups, "int32"), local(4 * groups, "int32")
        b = local(8 * groups, "int32")
        g, c = T.floordiv(ids.lane, 4), ids.lane % 4

        def clear() -> None:
            for i in range(4 * groups):
                put(low, T.int32(0), i)
                put(high, T.int32(0), i)

        def add_up() -> None:
            """Add the tile's sums to the block's; the codes' places divide them without rest."""
            row = sums + (slot[0] * TILE_ROWS + g) * tokens
            for group, e in itertools.product(range(groups), range(4)):
                half = e // 2
                value = T.shift_right(low[group * 4 + e], 2 * half)
                value += T.shift_right(high[group * 4 + e], 4 + 2 * half)
                to = row + half * 8 * tokens + group * TOKENS + c * 2 + e % 2
                do("bc_add_shared", at(room, to), value)
            clear()

        clear()
        operands = [
            variable(
                call("uint32", "bc_shared", at(room, token + column[0] * STEP_WORDS + c * 8)),
                "uint32",
            )
            for token in [(g + n * TOKENS) * stride for n in range(groups)]
        ]
        started = variable(T.cast(left[0] > 0, "int32"), "int32")
        # The text asks for the bound again in every turn, so it must not change.
        turns = variable(T.floordiv(left[0] + (IN_FLIGHT - 1), IN_FLIGHT), "int32")
        with T.serial(turns[0]):
            for i in range(IN_FLIGHT):
                with when(left[0] > i):
                    for group in range(groups):
                        do("bc_load_shared8", at(b, group * 8), operands[group][0])
                        put(operands[group], operands[group][0] + T.uint32(STEP_WORDS * 4))
                    for t, group in itertools.product(range(4), range(groups)):
                        to = at(low, group * 4), at(high, group * 4)
                        pair = b[group * 8 + 2 * t], b[group * 8 + 2 * t + 1]
                        do("bc_mma_scaled", *to, held[i * 4 + t], *pair)
                    share.load(held, i + IN_FLIGHT, i)
                    put(column, column[0] + 1)
                    with when(column[0] == units):
                        add_up()
                        put(column, T.int32(0))
                        put(slot, slot[0] + 1)
                        for operand in operands:
                            put(operand, operand[0] - T.cast(units * (STEP_WORDS * 4), "uint32"))
            put(left, left[0] - IN_FLIGHT)
            put(share.address, share.address[0] + T.uint64(IN_FLIGHT * UNIT_WORDS * 4))
        with when(T.And(started[0] != 0, column[0] > 0)):
            add_up()
        barrier()

        with T.serial(T.floordiv(rows * M + (THREADS - 1), THREADS)) as turn:
            i = turn * THREADS + ids.thread
            m, r = T.floordiv(i, rows), i % rows
            n = share.base * TILE_ROWS + r
            with when(T.And(i < rows * M, n < N)):
                token_scale = read("float32", "bc_load", s.data, long(m), FLOAT)
                token_sum = read("int32", "bc_load_int", qsum.data, long(m))

                def product(row: Expr) -> Expr:
                    whole = room[sums + row * tokens + m] - token_sum
                    factor = call("float32", "__fdiv_rn", values[scales + row], token_scale)
                    return variable(T.cast(whole, "float32") * factor, "float32")[0]

                result = variable(product(r), "float32")
                with when(pairs == 2):
                    put(result, gated(activation, result[0], product(rows + r)))
                with when(has_bias != 0):
                    put(result, result[0] + bias[n])
                with when(has_residual != 0):
                    to = long(m) * N + n
                    more = read("float32", "bc_load", residual.data, to, type_y)
                    put(result, result[0] + more)
                do("bc_store", y.data, long(m) * N + n, result[0], type_y)

    return device_kernel(name, PARAMETERS, THREADS, body)
