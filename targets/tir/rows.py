"""Row-wise float32 kernels: norm, quantisation, gated activation. See ``bitcompile.numerics``.

Written in 16-lane vectors on every instruction set (LLVM splits them), with one rounding per
operation in the reference's order, so that all variants give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    exact,
    halves,
    kernel,
    lanes_of,
    load,
    local,
    round_to_int,
    splat,
    store,
    typed,
    when,
)
from bitcompile.targets.tir.gates import CPU, GATES, f32
from bitcompile.targets.tir.isa import Isa
from bitcompile.targets.tir.subtrees import Subtrees

LANES = 16
SUBTREE = 256
"""Columns whose squares are added in registers."""
WITHIN = tuple([at + i for q in range(0, LANES, 4) for at in (q, q + 2, LANES + q, LANES + q + 2)]
               for i in (0, 1))  # fmt: skip
"""Lanes of two vectors and their neighbours, by quarters, which is where shuffles are cheap. Twice
so, four vectors become one whose quarter q has a sum of each one's quarter q."""
ACROSS = tuple([at + i for q in range(0, 2 * LANES, 8) for at in range(q, q + 4)] for i in (0, 4))
"""Quarters 0, 2, ... and 1, 3, ...: twice so, four of those become the sums of 16 vectors."""
INF_BITS = 0x7F800000
NAN_BITS = 0x7FC00000


def vectors_and_tail(count: Expr, each: Callable[[Expr, int], None]) -> None:
    """``each(index, lanes)`` over ``count`` elements: whole vectors, then one by one."""
    whole = T.floordiv(count, LANES)
    with T.serial(whole) as i:
        each(i * LANES, LANES)
    with T.serial(count - whole * LANES) as i:
        each(whole * LANES + i, 1)


def add_lanes(value: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """One value from a vector by halving: lanes i and i + h for h = lanes/2, ..., 1."""
    while lanes > 1:
        low, high = halves(value, lanes)
        value = combine(low, high)
        lanes //= 2
    return value


def _squares(x: Buffer, at: Expr) -> Expr:
    """The pairwise sum of the squares of SUBTREE values from ``x[at]`` on."""

    def held(value: Expr, lanes: int) -> Expr:
        result = local(lanes, "float32")
        store(result, 0, value, lanes)
        return load(result, 0, lanes)

    def sums(first: int, vectors: int) -> Expr:
        if vectors == 1:
            v = load(x, at + first * LANES, LANES)
            return held(exact(v * v, LANES), LANES)
        half = vectors // 2
        parts = [sums(first, half), sums(first + half, half)]
        even, odd = WITHIN if vectors <= 4 else ACROSS
        return held(lanes_of(parts, even) + lanes_of(parts, odd), LANES)

    total, lanes = sums(0, SUBTREE // LANES), LANES
    while lanes > 1:
        even, odd = (lanes_of([total], range(i, lanes, 2)) for i in (0, 1))
        lanes //= 2
        total = held(even + odd, lanes)
    return total


def _reciprocal_rms(x: Buffer, row: Expr, K: Expr, eps: Expr) -> Expr:
    """``fl(1 / sqrt(mean(x**2) + eps))`` of one row; see ``numerics.pairwise_sum``."""
    subtrees = Subtrees(SUBTREE)
    total = local(1, "float32")

    def add(source: Buffer, at: Expr, number: Expr) -> None:
        store(total, 0, _squares(source, at), 1)
        subtrees.add(total, number)

    whole = T.floordiv(K, SUBTREE)
    with T.serial(whole) as i:
        add(x, row + i * SUBTREE, i)
    rest = K - whole * SUBTREE
    with when(rest > 0):
        # Zeros leave a sum as it is.
        tail = local(SUBTREE, "float32")
        for i in range(0, SUBTREE, LANES):
            store(tail, i, f32(0.0, LANES), LANES)
        with T.serial(rest) as i:
            store(tail, i, x[row + whole * SUBTREE + i], 1)
        add(tail, 0, whole)
    whole_row = subtrees.total(T.floordiv(K + (SUBTREE - 1), SUBTREE))
    result = local(1, "float32")
    mean = exact(whole_row / T.cast(K, "float32"), 1)
    store(result, 0, f32(1.0, 1) / T.sqrt(mean + eps), 1)
    return result[0]


Element = Callable[[Expr, int], Expr]


def row_scale(magnitude_bits: Expr, limit: float, s: Buffer, m: Expr) -> Expr:
    """Store and return the row's scale; a row with NaN or Inf stores NaN and returns 0.

    Magnitudes are compared as integers, which orders floats and puts Inf and NaN on top.
    """
    floor = numerics.AMAX_FLOOR.view("int32").item()
    clamped = T.max(magnitude_bits, T.int32(floor))
    finite = local(1, "float32")
    reciprocal = f32(1.0, 1) / T.reinterpret(clamped, dtype="float32")
    store(finite, 0, exact(reciprocal, 1) * f32(limit, 1), 1)
    store(s, m, finite[0], 1)
    with when(magnitude_bits >= INF_BITS):
        store(s, m, T.reinterpret(T.int32(NAN_BITS), dtype="float32"), 1)
        store(finite, 0, f32(0.0, 1), 1)
    return finite[0]


def row_magnitude(element: Element, K: Expr) -> Expr:
    """Largest ``|element|`` of a row, as the bits of a float32."""
    wide = local(LANES, "int32")
    single = local(1, "int32")
    store(wide, 0, const(0, "int32", LANES), LANES)
    store(single, 0, T.int32(0), 1)

    def each(k: Expr, lanes: int) -> None:
        bits = T.reinterpret(element(k, lanes), dtype=typed("int32", lanes))
        magnitude = T.bitwise_and(bits, const(0x7FFFFFFF, "int32", lanes))
        into = wide if lanes > 1 else single
        store(into, 0, T.max(load(into, 0, lanes), magnitude), lanes)

    vectors_and_tail(K, each)
    return T.max(add_lanes(load(wide, 0, LANES), LANES, T.max), single[0])


def quantized(value: Expr, scale: Expr, lanes: int) -> Expr:
    """``rint(value * scale)`` as int32; a scale of 0 marks a row without finite values."""
    scaled = exact(value * splat(scale, lanes), lanes)
    usable = splat(scale, lanes) > f32(0.0, lanes)
    # Select before rounding: NaN * 0 is NaN and has no integer.
    return round_to_int(T.Select(usable, scaled, f32(0.0, lanes)), lanes)


def _quantize_row(element: Element, q: Buffer, s: Buffer, qsum: Buffer, m: Expr, K: Expr,
                  Kp: Expr) -> None:  # fmt: skip
    scale = row_scale(row_magnitude(element, K), 127.0, s, m)
    wide = local(LANES, "int32")
    single = local(1, "int32")
    store(wide, 0, const(0, "int32", LANES), LANES)
    store(single, 0, T.int32(0), 1)

    def each(k: Expr, lanes: int) -> None:
        value = quantized(element(k, lanes), scale, lanes)
        low, high = const(-128, "int32", lanes), const(127, "int32", lanes)
        clamped = T.max(T.min(value, high), low)
        into = wide if lanes > 1 else single
        store(into, 0, load(into, 0, lanes) + clamped, lanes)
        store(q, m * Kp + k, T.cast(clamped, typed("int8", lanes)), lanes)

    vectors_and_tail(K, each)
    with T.serial(Kp - K) as k:
        store(q, m * Kp + K + k, T.int8(0), 1)
    total = add_lanes(load(wide, 0, LANES), LANES, lambda a, b: a + b) + single[0]
    store(qsum, m, total, 1)


def quantize(isa: Isa, name: str) -> Any:
    """``void name(x, q, s, qsum, M, K, Kp)``: per-token int8 quantisation of ``[M, K]``.

    ``q``: int8 ``[M, Kp]``, columns from K on are 0; ``s``, ``qsum``: ``[M]``.
    """

    def body(x: Buffer, q: Buffer, s: Buffer, qsum: Buffer, M: Expr, K: Expr, Kp: Expr) -> None:
        with T.serial(M) as m:
            _quantize_row(lambda k, lanes: load(x, m * K + k, lanes), q, s, qsum, m, K, Kp)

    parameters = [("x", "float32*"), ("q", "int8*"), ("s", "float32*"), ("qsum", "int32*")]
    return kernel(name, [*parameters, ("M", "int32"), ("K", "int32"), ("Kp", "int32")], body)


def group_sums(isa: Isa, name: str) -> Any:
    """``void name(q, sums, M, Kp, G, group_blocks)``: sums ``[M, G]`` of int8 ``[M, Kp]``.

    Group j holds the 16-column blocks from ``j * group_blocks`` on; the last may be shorter.
    """

    def body(q: Buffer, sums: Buffer, M: Expr, Kp: Expr, G: Expr, group_blocks: Expr) -> None:
        with T.serial(M) as m, T.serial(G) as j:
            first = j * group_blocks * 16
            wide = local(LANES, "int32")
            store(wide, 0, const(0, "int32", LANES), LANES)
            with T.serial(T.min(group_blocks, T.floordiv(Kp - first, 16))) as block:
                values = load(q, m * Kp + first + block * 16, LANES)
                store(wide, 0, load(wide, 0, LANES) + T.cast(values, f"int32x{LANES}"), LANES)
            store(sums, m * G + j, add_lanes(load(wide, 0, LANES), LANES, lambda a, b: a + b), 1)

    pointers = [("q", "int8*"), ("sums", "int32*")]
    return kernel(name, pointers + [(n, "int32") for n in ("M", "Kp", "G", "group_blocks")], body)


def norm_quantize(isa: Isa, name: str) -> Any:
    """``void name(x, gamma, q, s, qsum, M, K, Kp, eps)``: RMSNorm, then :func:`quantize`."""

    def body(x: Buffer, gamma: Buffer, q: Buffer, s: Buffer, qsum: Buffer, M: Expr, K: Expr,
             Kp: Expr, eps: Expr) -> None:  # fmt: skip
        with T.serial(M) as m:
            rstd = _reciprocal_rms(x, m * K, K, eps)

            def element(k: Expr, lanes: int) -> Expr:
                scaled = exact(load(x, m * K + k, lanes) * splat(rstd, lanes), lanes)
                return exact(scaled * load(gamma, k, lanes), lanes)

            _quantize_row(element, q, s, qsum, m, K, Kp)

    parameters = [("x", "float32*"), ("gamma", "float32*"), ("q", "int8*"), ("s", "float32*")]
    sizes = [("qsum", "int32*"), ("M", "int32"), ("K", "int32"), ("Kp", "int32")]
    return kernel(name, [*parameters, *sizes, ("eps", "float32")], body)


def glu(isa: Isa, name: str, activation: str) -> Any:
    """``void name(gate, up, hidden, M, F, ld, ld_hidden)``: ``hidden = act(gate) * up``.

    ``gate``, ``up``: float32 ``[M, F]``, rows ``ld`` apart; ``hidden``: rows ``ld_hidden`` apart.
    """
    act = GATES[activation]

    def body(gate: Buffer, up: Buffer, hidden: Buffer, M: Expr, F: Expr, ld: Expr,
             ld_hidden: Expr) -> None:  # fmt: skip
        with T.serial(M) as m:

            def each(k: Expr, lanes: int) -> None:
                g = load(gate, m * ld + k, lanes)
                # A vector's arithmetic has no branches: NaN and Inf run through.
                value = exact(act(CPU, g, lanes), lanes) * load(up, m * ld + k, lanes)
                store(hidden, m * ld_hidden + k, value, lanes)

            vectors_and_tail(F, each)

    pointers = [(n, "float32*") for n in ("gate", "up", "hidden")]
    return kernel(name, pointers + [(n, "int32") for n in ("M", "F", "ld", "ld_hidden")], body)
