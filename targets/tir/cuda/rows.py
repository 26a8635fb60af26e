"""Norm, gated activation and quantisation of many rows. See ``bitcompile.numerics``.

One block a row. Every operation rounds once, in the reference's order: the compiler fuses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.cuda.device import (
    ARITHMETIC,
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
    shuffle_xor,
    variable,
    view,
)
from bitcompile.targets.tir.cuda.tile import TOKENS, UNIT_COLUMNS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when
from bitcompile.targets.tir.gates import GATES
from bitcompile.targets.tir.subtrees import Subtrees

THREADS = 256
WARPS = THREADS // 32
CHUNK = 2048
"""Values of a row that wait in shared memory for their neighbours."""
INF_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
"""Element types by their ONNX number."""

Row = Callable[[Expr], Expr]


def gated(activation: Expr, gate: Expr, up: Expr) -> Expr:
    """``act(gate) * up``; ``activation`` counts the gates of ``GATES`` in their order."""
    first, *others = GATES.values()
    result = variable(first(ARITHMETIC, gate, 1) * up, "float32")
    with when(activation > 0):  # one jump over all of them
        for number, function in enumerate(others, 1):
            with when(activation == number):
                put(result, function(ARITHMETIC, gate, 1) * up)
    return result[0]


def pairwise(values: Buffer, count: int) -> Expr:
    """The pairwise sum of ``count`` values, in place."""
    while count > 1:
        for i in range(count // 2):
            put(values, values[2 * i] + values[2 * i + 1], i)
        if count % 2:
            put(values, values[count - 1], count // 2)
        count = (count + 1) // 2
    return values[0]


def square_sum4(values: Buffer, first: int) -> Buffer:
    """The pairwise sum of four squares."""
    low, high = (values[i] * values[i] + values[i + 1] * values[i + 1] for i in (first, first + 2))
    return variable(low + high, "float32")


def traded_sums(values: list[Buffer], lane: Expr) -> Buffer:
    """Pairwise sums over a warp's lanes: lane l gets that of values :func:`sum_of_lane` (l).

    Lanes trade halves of their ``values``, a power of two, so that few shuffles do it; these are
    overwritten.
    """
    distance = 1
    while len(values) > 1:
        half = len(values) // 2
        upper = T.bitwise_and(lane, distance) != 0
        for low, high in zip(values[:half], values[half:], strict=True):
            given = variable(T.Select(upper, low[0], high[0]), "float32")
            put(low, T.Select(upper, high[0], low[0]))
            put(low, low[0] + shuffle_xor(given[0], distance))
        values = values[:half]
        distance *= 2
    (total,) = values
    while distance < 32:
        put(total, total[0] + shuffle_xor(total[0], distance))
        distance *= 2
    return total


def sum_of_lane(lane: Expr, count: int) -> Expr:
    """Which of ``count`` sums :func:`traded_sums` leaves a lane: its low bits, the other way."""
    number, bit = T.int32(0), 1
    while count > 1:
        count //= 2
        number = number + T.Select(T.bitwise_and(lane, bit) != 0, T.int32(count), T.int32(0))
        bit *= 2
    return number


def warp_sum(values: list[Buffer], lane: Expr) -> Expr:
    """The pairwise sum of a warp's values, ``values[i]`` of lane l being number ``32 i + l``."""
    distance = len(values)
    total = traded_sums(values, lane)
    while distance > 1:
        distance //= 2
        put(total, total[0] + shuffle_xor(total[0], distance))
    return total[0]


def reciprocal_rms(total: Expr, K: Expr, eps: Expr) -> Expr:
    """``fl(1 / sqrt(fl(total / K) + eps))``."""
    mean = call("float32", "__fdiv_rn", total, T.cast(K, "float32"))
    return call("float32", "__frcp_rn", call("float32", "__fsqrt_rn", mean + eps))


def magnitude(value: Expr) -> Expr:
    """The bits of ``|value|``, which order floats and put Inf and NaN on top."""
    return T.bitwise_and(call("int32", "__float_as_int", value), T.int32(0x7FFFFFFF))


def row_scale(bits: Expr, limit: float = 127.0) -> tuple[Expr, Expr]:
    """Scale for the values of a row (0 if it holds NaN or Inf) and the one that is stored (NaN)."""
    floor = numerics.AMAX_FLOOR.view("int32").item()
    amax = call("float32", "__int_as_float", T.max(bits, T.int32(floor)))
    scale = call("float32", "bc_reciprocal", amax) * T.float32(limit)
    used = variable(scale, "float32")
    kept = variable(used[0], "float32")
    with when(bits >= INF_BITS):
        put(used, T.float32(0))
        put(kept, call("float32", "__int_as_float", T.int32(NAN_BITS)))
    return used[0], kept[0]


def place(m: Expr, k: Expr, token_groups: Expr, unit_bytes: Expr) -> Expr:
    """Byte of token ``m``, column ``k`` in the quantised activations (see :mod:`tile`)."""
    row = m % TOKENS
    unit = T.floordiv(k, UNIT_COLUMNS) * token_groups + T.floordiv(m, TOKENS)
    piece = T.bitwise_xor(T.floordiv(k % UNIT_COLUMNS, 16), row)
    return long(unit) * unit_bytes + row * UNIT_COLUMNS + piece * 16 + k % 16


def each(ids: Ids, count: Expr, action: Callable[[Expr], None], stride: int = THREADS) -> None:
    """``action(i)`` for i below ``count``, spread over the block's threads."""
    with T.serial(T.floordiv(count + (stride - 1), stride)) as step:
        i = step * stride + ids.thread
        with when(i < count):
            action(i)


def block_max(ids: Ids, value: Expr, room: Buffer) -> Expr:
    """The largest int32 of the block's threads; ``room`` holds one value a warp."""
    most = variable(call("int32", "__reduce_max_sync", T.uint32(0xFFFFFFFF), value), "int32")
    with when(ids.lane == 0):
        put(room, most[0], ids.warp)
    barrier()
    for warp in range(WARPS):
        put(most, T.max(most[0], room[warp]))
    return most[0]


def _rstd(ids: Ids, row: Row, K: Expr, eps: Expr) -> Expr:
    """The reciprocal RMS of a row of which every thread brings values."""
    waiting, parts = shared(CHUNK, "float32"), shared(WARPS, "float32")
    subtrees = Subtrees(CHUNK)
    chunks = T.floordiv(K + (CHUNK - 1), CHUNK)
    with T.serial(chunks) as chunk:
        first = chunk * CHUNK

        def bring(i: Expr) -> None:
            value = variable(T.float32(0), "float32")
            with when(first + i < K):
                put(value, row(first + i))
            put(waiting, value[0], i)

        each(ids, CHUNK, bring)  # nobody reads these any more: all have met since
        barrier()
        squares, shares = local(CHUNK // THREADS, "float32"), local(WARPS, "float32")
        for i in range(CHUNK // THREADS):
            value = waiting[ids.thread * (CHUNK // THREADS) + i]
            put(squares, value * value, i)
        own = variable(pairwise(squares, CHUNK // THREADS), "float32")
        part = warp_sum([own], ids.lane)
        with when(ids.lane == 0):
            put(parts, part, ids.warp)
        barrier()
        for i in range(WARPS):
            put(shares, parts[i], i)
        total = variable(pairwise(shares, WARPS), "float32")
        subtrees.add(total, chunk)
    return variable(reciprocal_rms(subtrees.total(chunks), K, eps), "float32")[0]


PARAMETERS = [
    ("x", "uint8*"), ("gamma", "float32*"), ("q", "uint8*"), ("s", "float32*"), ("qsum", "int32*"),
    *((name, "int32") for name in (
        "K", "Kp", "token_groups", "unit_bytes", "type", "has_norm", "activation",
    )),
    ("eps", "float32"),
]  # fmt: skip


def any_rows(name: str) -> Any:
    """:func:`rows` of any length and alignment: every pass reads the row again.

    Rows of ``x``: gate (``activation`` >= 0), norm (``has_norm``), quantise.

    ``x``: ``[M, K]`` of an element type, or float32 ``[M, 2K]`` if there is a gate. ``q``: int8 in
    units of ``unit_bytes``, zeros from column K to Kp; ``s``, ``qsum``: ``[M]``. Grid: M blocks.
    """

    def body(ids: Ids, x: Buffer, gamma: Buffer, q: Buffer, s: Buffer, qsum: Buffer, K: Expr,
             Kp: Expr, token_groups: Expr, unit_bytes: Expr, type: Expr, has_norm: Expr,
             activation: Expr, eps: Expr) -> None:  # fmt: skip
        m = ids.block_x
        most, sums = shared(WARPS, "int32"), shared(WARPS, "int32")
        do("bc_let_next_start")
        do("bc_wait_for_earlier")

        def value(k: Expr) -> Expr:
            result = variable(T.float32(0), "float32")
            with when(activation < 0):
                put(result, read("float32", "bc_load", x.data, long(m) * K + k, type))
            with when(activation >= 0):
                start = long(m) * (2 * K) + k
                gate, up = (
                    read("float32", "bc_load", x.data, start + i * K, FLOAT) for i in (0, 1)
                )
                put(result, gated(activation, gate, up))
            return result[0]

        rstd = variable(T.float32(0), "float32")
        with when(has_norm != 0):
            put(rstd, _rstd(ids, value, K, eps))

        def normed(k: Expr) -> Expr:
            result = variable(value(k), "float32")
            with when(has_norm != 0):
                put(result, (result[0] * rstd[0]) * gamma[k])
            return result[0]

        bits = variable(T.int32(0), "int32")
        each(ids, K, lambda k: put(bits, T.max(bits[0], magnitude(normed(k)))))
        scale, kept = row_scale(block_max(ids, bits[0], most))
        total = variable(T.int32(0), "int32")

        def four(i: Expr) -> None:
            parts = local(4, "int32")
            with T.serial(4) as j:
                put(parts, T.int32(0), j)
                with when(i * 4 + j < K):
                    put(parts, call("int32", "bc_quantized", normed(i * 4 + j), scale), j)
            word = variable(call("int32", "bc_pack", *(parts[j] for j in range(4))), "int32")
            put(total, total[0] + call("int32", "bc_sum4", word[0]))
            do("bc_put_int", q.data, place(m, i * 4, token_groups, unit_bytes), word[0])

        each(ids, T.floordiv(Kp, 4), four)
        put(total, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), total[0]))
        with when(ids.lane == 0):
            put(sums, total[0], ids.warp)
        barrier()
        with when(ids.thread == 0):
            whole = variable(T.int32(0), "int32")
            for warp in range(WARPS):
                put(whole, whole[0] + sums[warp])
            put(qsum, whole[0], m)
            put(s, kept, m)

    return device_kernel(name, PARAMETERS, THREADS, body)


TURNS = 8
"""Words of four values that a thread holds in :func:`rows`."""
PART = THREADS * 16
"""Values that the block loads at once."""
LONGEST = THREADS * TURNS * 4
"""Longest row of :func:`rows`."""


def rows(name: str) -> Any:
    """Rows of at most LONGEST values, a multiple of 4, aligned: a thread keeps its share.

    The arguments are those of :func:`any_rows`. Dynamic shared memory, with a gate: K + PART
    floats.
    """

    def body(ids: Ids, x: Buffer, gamma: Buffer, q: Buffer, s: Buffer, qsum: Buffer, K: Expr,
             Kp: Expr, token_groups: Expr, unit_bytes: Expr, type: Expr, has_norm: Expr,
             activation: Expr, eps: Expr) -> None:  # fmt: skip
        m = ids.block_x
        most, sums = shared(WARPS, "int32"), shared(WARPS, "int32")
        units = shared(TURNS * WARPS, "float32")  # sums of squares of 128 neighbours
        row = view(dynamic(), "float32")  # with a gate: K values of it, PART of the other half
        held, others = local(4 * TURNS, "float32"), local(16, "float32")
        words = T.floordiv(K, 4)
        do("bc_let_next_start")
        do("bc_wait_for_earlier")
        for i in range(4 * TURNS):
            put(held, T.float32(0), i)
        for half in range(TURNS // 4):
            first, into = half * PART // 4 + ids.thread, at(held, half * 16)
            with when(activation < 0):
                do("bc_load_row4", into, x.data, long(m) * K, first, THREADS, words, type)
            with when(T.And(activation >= 0, half * PART < K)):
                start = long(m) * (2 * K)
                do("bc_load_row4", into, x.data, start, first, THREADS, words, FLOAT)
                do("bc_load_row4", at(others, 0), x.data, start + K, first, THREADS, words, FLOAT)
                for turn in range(4):  # through shared memory: registers have no index
                    word = turn * THREADS + ids.thread
                    with when(half * PART + word * 4 < K):
                        gate_at = at(row, half * PART + word * 4)
                        do("bc_store_shared4", gate_at, at(held, half * 16 + turn * 4))
                        do("bc_store_shared4", at(row, K + word * 4), at(others, turn * 4))
                with T.serial(16) as i:
                    own = (T.floordiv(i, 4) * THREADS + ids.thread) * 4 + i % 4
                    with when(half * PART + own < K):
                        gate, up = row[half * PART + own], row[K + own]
                        put(row, gated(activation, gate, up), half * PART + own)
                for turn in range(4):
                    word = turn * THREADS + ids.thread
                    with when(half * PART + word * 4 < K):
                        gate_at = at(row, half * PART + word * 4)
                        do("bc_load_shared4", at(held, half * 16 + turn * 4), gate_at)
        with when(has_norm != 0):
            squares = [square_sum4(held, turn * 4) for turn in range(TURNS)]
            own = traded_sums(squares, ids.lane)
            with when(ids.lane < TURNS):
                put(units, own[0], sum_of_lane(ids.lane, TURNS) * WARPS + ids.warp)
            barrier()
            pair = variable(units[ids.lane * 2] + units[ids.lane * 2 + 1], "float32")
            total = warp_sum([pair], ids.lane)
            rstd = variable(reciprocal_rms(total, K, eps), "float32")[0]
            for turn in range(TURNS):
                word = turn * THREADS + ids.thread
                with when(word < words):
                    do("bc_load4", at(others, 0), gamma.data, long(word * 4), FLOAT)
                    for j in range(4):
                        put(held, (held[turn * 4 + j] * rstd) * others[j], turn * 4 + j)
        bits = variable(T.int32(0), "int32")
        for i in range(4 * TURNS):
            put(bits, T.max(bits[0], magnitude(held[i])))
        scale, kept = row_scale(block_max(ids, bits[0], most))
        total = variable(T.int32(0), "int32")
        for turn in range(TURNS):
            word = turn * THREADS + ids.thread
            with when(word < T.floordiv(Kp, 4)):
                parts = [call("int32", "bc_quantized", held[turn * 4 + j], scale) for j in range(4)]
                packed = variable(call("int32", "bc_pack", *parts), "int32")
                put(total, total[0] + call("int32", "bc_sum4", packed[0]))
                do("bc_put_int", q.data, place(m, word * 4, token_groups, unit_bytes), packed[0])
        put(total, call("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), total[0]))
        with when(ids.lane == 0):
            put(sums, total[0], ids.warp)
        barrier()
        with when(ids.thread == 0):
            whole = variable(T.int32(0), "int32")
            for warp in range(WARPS):
                put(whole, whole[0] + sums[warp])
            put(qsum, whole[0], m)
            put(s, kept, m)

    return device_kernel(name, PARAMETERS, THREADS, body)
