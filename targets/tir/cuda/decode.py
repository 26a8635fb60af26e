"""Products with few tokens: every weight is read once, as early and as many at a time as can be.

A block takes some row tiles; their units, in the order they lie in memory, go to its warps in equal
runs. A warp starts its first loads, then the block makes the activations (they come from the kernel
before: with programmatic dependent launch the weights are on their way while that one ends), then
tensor cores multiply and sums of a tile meet in shared memory, where integers may be added in any
order.

Fused, for one token: the block norms and quantises the row by itself, which costs less than a
kernel between. Else up to 16 tokens come quantised (:mod:`rows`).
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
    shared,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.rows import (
    FLOAT,
    gated,
    magnitude,
    ordered_sum,
    reciprocal_rms,
    row_scale,
)
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
    ("x", "uint8*"), ("gamma", "float32*"), ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"),
    ("w", "uint32*"), ("w_scale", "float32*"), ("bias", "float32*"), ("residual", "uint8*"),
    ("y", "uint8*"),
    *((name, "int32") for name in (
        "M", "N", "K", "units", "token_groups", "tiles", "step", "pairs", "type_x", "type_y",
        "has_norm", "has_bias", "has_residual", "activation",
    )),
    ("eps", "float32"),
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


def _fragment(word: Expr) -> Expr:
    """Where word ``word`` of a token goes: a lane's eight words of a unit lie together."""
    within = word % STEP_WORDS
    return word - within + (within % 4) * (STEP_WORDS // 4) + T.floordiv(within, 4)


def _bring_gamma(ids: Ids, gamma: Buffer, values: Buffer, start: Expr, K: Expr,
                 words: Expr) -> None:  # fmt: skip
    """The norm's weight, on its way to shared memory; zeros from K on."""
    with T.serial(T.floordiv(words + (THREADS - 1), THREADS)) as turn:
        word = turn * THREADS + ids.thread
        with when(word * 4 + 3 < K):
            do("bc_copy_async16", at(values, start + word * 4), gamma.data, long(word) * 16)
        with when(T.And(word < words, word * 4 + 3 >= K)), T.serial(4) as j:
            put(values, T.float32(0), start + word * 4 + j)
            with when(word * 4 + j < K):
                put(values, gamma[word * 4 + j], start + word * 4 + j)


def _bring_row(ids: Ids, x: Buffer, values: Buffer, start: Expr, K: Expr, words: Expr,
               type_x: Expr) -> None:  # fmt: skip
    """The row in float32, zeros from K to a multiple of 512 values."""
    row = local(16, "float32")
    with T.serial(T.floordiv(words + (4 * THREADS - 1), 4 * THREADS)) as turn:
        first = turn * (4 * THREADS) + ids.thread
        do("bc_load_row4", at(row, 0), x.data, T.int64(0), first, THREADS, T.floordiv(K, 4), type_x)
        for i in range(4):
            word = first + i * THREADS
            with when(T.And(word * 4 < K, word * 4 + 3 >= K)):
                for j in range(3):
                    with when(word * 4 + j < K):
                        value = read("float32", "bc_load", x.data, long(word * 4 + j), type_x)
                        put(row, value, i * 4 + j)
            with when(word < words):
                do("bc_store_shared4", at(values, start + word * 4), at(row, i * 4))


def _quantise_row(ids: Ids, x: Buffer, gamma: Buffer, room: Buffer, values: Buffer, q_at: int,
                  x_at: Expr, gamma_at: Expr, K: Expr, words: Expr, row_words: Expr, type_x: Expr,
                  has_norm: Expr, eps: Expr) -> tuple[Expr, Expr]:  # fmt: skip
    """Norm and quantise one row into ``room`` from ``q_at``; its stored scale and sum."""
    norm, most = shared(1, "float32"), shared(WARPS, "int32")
    sums = shared(WARPS, "int32")
    _bring_row(ids, x, values, x_at, K, row_words, type_x)
    do("bc_copy_wait")
    barrier()
    rstd = variable(T.float32(0), "float32")
    with when(has_norm != 0):
        with when(ids.warp == 0):
            total = ordered_sum(values, x_at, row_words * 4, ids.lane)
            put(norm, reciprocal_rms(total, K, eps))
        barrier()
        put(rstd, norm[0])

    bits = variable(T.int32(0), "int32")
    four, gammas = local(4, "float32"), local(4, "float32")
    with T.serial(T.floordiv(words + (THREADS - 1), THREADS)) as turn:
        word = turn * THREADS + ids.thread
        with when(word < words):
            do("bc_load_shared4", at(four, 0), at(values, x_at + word * 4))
            with when(has_norm != 0):
                do("bc_load_shared4", at(gammas, 0), at(values, gamma_at + word * 4))
                for j in range(4):
                    put(four, (four[j] * rstd[0]) * gammas[j], j)
                do("bc_store_shared4", at(values, x_at + word * 4), at(four, 0))
            for j in range(4):
                put(bits, T.max(bits[0], magnitude(four[j])))
    put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
    with when(ids.lane == 0):
        put(most, bits[0], ids.warp)
    barrier()
    put(bits, most[ids.lane % WARPS])
    put(bits, call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), bits[0]))
    scale, kept = row_scale(bits[0])
    total = variable(T.int32(0), "int32")
    with T.serial(T.floordiv(words + (THREADS - 1), THREADS)) as turn:
        word = turn * THREADS + ids.thread
        with when(word < words):
            do("bc_load_shared4", at(four, 0), at(values, x_at + word * 4))
            parts = [call("int32", "bc_quantized", four[j], scale) for j in range(4)]
            packed = variable(call("int32", "bc_pack", *parts), "int32")
            put(total, total[0] + call("int32", "bc_sum4", packed[0]))
            put(room, packed[0], q_at + _fragment(word))
    put(total, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), total[0]))
    with when(ids.lane == 0):
        put(sums, total[0], ids.warp)
    barrier()
    put(total, T.if_then_else(ids.lane < WARPS, sums[ids.lane % WARPS], 0))
    put(total, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), total[0]))
    return kept, total[0]


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


def decode(name: str, tokens: int, fused: bool = False) -> Any:
    """``y = scaled(W q)`` for one row ``x`` (fused) or up to ``tokens`` quantised ones.

    ``W``: units ``[tiles, units]``; ``y`` ``[M, N]`` of ``type_y``, plus bias ``[N]`` and residual
    like y. With ``pairs`` 2, rows n and N + n of W give ``act(gate) * up``. Grid: blocks of
    ``step`` tiles. Dynamic shared memory: ``decode_shared`` in ``cuda_launch.c``.
    """
    one = tokens == 1
    groups = max(1, tokens // TOKENS)

    def body(ids: Ids, x: Buffer, gamma: Buffer, q: Buffer, s: Buffer, qsum: Buffer, w: Buffer,
             w_scale: Buffer, bias: Buffer, residual: Buffer, y: Buffer, M: Expr, N: Expr, K: Expr,
             units: Expr, token_groups: Expr, tiles: Expr, step: Expr, pairs: Expr, type_x: Expr,
             type_y: Expr, has_norm: Expr, has_bias: Expr, has_residual: Expr, activation: Expr,
             eps: Expr) -> None:  # fmt: skip
        memory = dynamic()
        room, values = view(memory, "int32"), view(memory, "float32")
        held = local(IN_FLIGHT * 4, "uint32")
        share = Share(ids, w, tiles, step, pairs, units)
        words = units * STEP_WORDS
        stride = words + ROW_PAD
        rows, slots = share.count * TILE_ROWS, step * pairs * TILE_ROWS
        sums = stride * tokens  # where accumulators begin: [slots, tokens]
        scales = sums + slots * tokens  # and the weights' scales: [slots]
        do("bc_let_next_start")
        for i in range(IN_FLIGHT):
            share.load(held, i, i)
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
        if fused:
            x_at = scales + slots
            row_words = T.floordiv(words + 127, 128) * 128
            with when(has_norm != 0):
                _bring_gamma(ids, gamma, values, x_at + row_words * 4, K, words)
        do("bc_wait_for_earlier")
        old = variable(T.uint32(0), "uint32")
        mine = share.base * TILE_ROWS + ids.thread
        if one:  # a thread stores its own row
            with when(T.And(has_residual != 0, T.And(ids.thread < rows, mine < N))):
                put(old, read("uint32", "bc_load_bits", residual.data, long(mine), type_y))
        if fused:
            scale, total = _quantise_row(ids, x, gamma, room, values, 0, x_at, x_at + row_words * 4,
                                         K, words, row_words, type_x, has_norm, eps)  # fmt: skip
        else:
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
                if one and e % 2 == 0:  # every column holds the one token
                    with when(c == 0):
                        do("bc_add_shared", at(room, row + 8 * half), value)
                if not one:
                    to = row + half * 8 * tokens + group * TOKENS + c * 2 + e % 2
                    do("bc_add_shared", at(room, to), value)
            clear()

        clear()
        operands = [
            variable(
                call("uint32", "bc_shared", at(room, token + column[0] * STEP_WORDS + c * 8)),
                "uint32",
            )
            for token in ([0] if one else [(g + n * TOKENS) * stride for n in range(groups)])
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
            m, r = (T.int32(0), i) if one else (T.floordiv(i, rows), i % rows)
            n = share.base * TILE_ROWS + r
            with when(T.And(i < rows * M, n < N)):
                if fused:
                    token_scale, token_sum = scale, total
                else:
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
                    if not one:
                        to = long(m) * N + n
                        put(old, read("uint32", "bc_load_bits", residual.data, to, type_y))
                    put(result, result[0] + call("float32", "bc_from_bits", old[0], type_y))
                do("bc_store", y.data, long(m) * N + n, result[0], type_y)

    return device_kernel(name, PARAMETERS, THREADS, body)
