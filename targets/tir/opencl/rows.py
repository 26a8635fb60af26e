"""Row-wise float32 kernels: one work-group a row. See ``bitcompile.numerics``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitcompile import numerics
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when
from bitcompile.targets.tir.gates import GATES, f32
from bitcompile.targets.tir.opencl.device import (
    ARITHMETIC,
    barrier,
    bits,
    call,
    device_kernel,
    divide,
    join,
    kept,
    rounded,
    shared,
)
from bitcompile.targets.tir.rows import INF_BITS, NAN_BITS
from bitcompile.targets.tir.subtrees import Subtrees

LANES = 64
"""Work-items of a row."""
RUN = 16
"""Sums of four neighbours that an item adds."""
ONES = 0x01010101
Element = Callable[[Expr], Expr]


def _strided(item: Expr, count: Expr, each: Callable[[Expr], None]) -> None:
    """``each(k)`` for k = item, item + LANES, ... below ``count``."""
    with T.serial(T.floordiv(count - item + (LANES - 1), LANES)) as i:
        each(item + i * LANES)


def _joined(item: Expr, value: Expr, dtype: str, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All items' ``value`` joined, in every item."""
    values = shared(LANES, dtype)
    T.buffer_store(values, value, [item])
    join(values, item, LANES, combine)
    return kept(values[0], dtype)


def _reciprocal_rms(x: Buffer, row: Expr, item: Expr, K: Expr, eps: Expr) -> Expr:
    """``fl(1 / sqrt(mean(x**2) + eps))`` of one row; see ``numerics.pairwise_sum``."""
    columns = LANES * RUN * 4
    subtrees, total = Subtrees(columns), local(1, "float32")
    quads, values = shared(LANES * (RUN + 1), "float32"), shared(LANES, "float32")
    turns = T.floordiv(K + (columns - 1), columns)
    with T.serial(turns) as turn:
        for i in range(RUN):  # neighbours are loaded by neighbours
            quad = i * LANES + item
            first = turn * columns + quad * 4
            squares = []
            for k in (first + j for j in range(4)):
                value = kept(T.if_then_else(k < K, x[row + k], f32(0.0, 1)))
                squares.append(kept(value * value))
            low, high = kept(squares[0] + squares[1]), kept(squares[2] + squares[3])
            # A free place after each run: items read at once from different banks.
            T.buffer_store(quads, low + high, [quad + T.floordiv(quad, RUN)])
        barrier()

        def run(first: int, count: int) -> Expr:
            if count == 1:
                return kept(quads[item * (RUN + 1) + first])
            half = count // 2
            return kept(run(first, half) + run(first + half, half))

        T.buffer_store(values, run(0, RUN), [item])
        join(values, item, LANES, lambda a, b: a + b)
        T.buffer_store(total, values[0], [0])
        barrier()
        subtrees.add(total, turn)
    mean = kept(divide(subtrees.total(turns), T.cast(K, "float32")))
    return kept(divide(f32(1.0, 1), call("float32", "bc_sqrt", mean + eps)))


def _scale(element: Element, limit: float, item: Expr, K: Expr, s: Buffer, m: Expr) -> Expr:
    """Store the row's scale; returns it, or 0 for a row with NaN or Inf, whose scale is NaN.

    Magnitudes are compared as integers, which orders floats and puts Inf and NaN on top.
    """
    most = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(most, T.int32(0), [0])

    def widen(k: Expr) -> None:
        magnitude = T.bitwise_and(bits(element(k)), T.int32(0x7FFFFFFF))
        T.buffer_store(most, T.max(most[0], magnitude), [0])

    _strided(item, K, widen)
    magnitude = _joined(item, most[0], "int32", T.max)
    floor = numerics.AMAX_FLOOR.view("int32").item()
    amax = call("float32", "as_float", T.max(magnitude, T.int32(floor)))
    scale = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(scale, kept(divide(f32(1.0, 1), amax)) * f32(limit, 1), [0])
    written = kept(scale[0])
    with when(magnitude >= INF_BITS):
        T.buffer_store(scale, f32(0.0, 1), [0])
    with when(item == 0):
        nan = call("float32", "as_float", T.int32(NAN_BITS))
        T.buffer_store(s, T.Select(magnitude >= INF_BITS, nan, written), [m])
    return scale[0]


def _whole(value: Expr, scale: Expr) -> Expr:
    """``rint(value * scale)`` as int32; a scale of 0 marks a row without finite values."""
    # Select before rounding: NaN * 0 is NaN and has no integer.
    product = kept(value * scale)
    return kept(rounded(T.Select(scale > f32(0.0, 1), product, f32(0.0, 1))), "int32")


def _quantize(element: Element, item: Expr, q: Buffer, s: Buffer, qsum: Buffer, m: Expr, K: Expr,
              Kp: Expr) -> None:  # fmt: skip
    scale = _scale(element, 127.0, item, K, s, m)
    total = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(total, T.int32(0), [0])

    def store(k: Expr) -> None:
        value = T.max(T.min(_whole(element(k), scale), T.int32(127)), T.int32(-128))
        T.buffer_store(q, T.cast(value, "int8"), [m * Kp + k])
        T.buffer_store(total, total[0] + value, [0])

    _strided(item, K, store)
    _strided(item, Kp - K, lambda k: T.buffer_store(q, T.int8(0), [m * Kp + K + k]))
    whole = _joined(item, total[0], "int32", lambda a, b: a + b)
    with when(item == 0):
        T.buffer_store(qsum, whole, [m])


OUTPUTS = [("q", "int8*"), ("s", "float32*"), ("qsum", "int32*"), ("K", "int32"), ("Kp", "int32")]


def quantize(name: str) -> Any:
    """``void name(x, q, s, qsum, K, Kp)``: int8 quantisation of row ``get_group_id(0)``.

    ``x``: float32 ``[M, K]``; ``q``: int8 ``[M, Kp]``, columns from K on are 0; ``s``, ``qsum``:
    ``[M]``.
    """

    def body(group: Any, item: Any, x: Buffer, q: Buffer, s: Buffer, qsum: Buffer, K: Expr,
             Kp: Expr) -> None:  # fmt: skip
        m = group[0]
        _quantize(lambda k: x[m * K + k], item[0], q, s, qsum, m, K, Kp)

    return device_kernel(name, [("x", "float32*"), *OUTPUTS], (LANES, 1), body)


def norm_quantize(name: str) -> Any:
    """``void name(x, gamma, q, s, qsum, K, Kp, eps)``: RMSNorm, then :func:`quantize`."""

    def body(group: Any, item: Any, x: Buffer, gamma: Buffer, q: Buffer, s: Buffer, qsum: Buffer,
             K: Expr, Kp: Expr, eps: Expr) -> None:  # fmt: skip
        m = group[0]
        rstd = _reciprocal_rms(x, m * K, item[0], K, eps)

        def element(k: Expr) -> Expr:
            return kept(kept(x[m * K + k] * rstd) * gamma[k])

        _quantize(element, item[0], q, s, qsum, m, K, Kp)

    parameters = [("x", "float32*"), ("gamma", "float32*"), *OUTPUTS, ("eps", "float32")]
    return device_kernel(name, parameters, (LANES, 1), body)


def group_sums(name: str) -> Any:
    """``void name(q, sums, Kp, G, group_blocks)``: sums ``[M, G]`` of int8 ``[M, Kp]``.

    ``q``: its uint32 view; group j holds the 16-column blocks from ``j * group_blocks`` on, the
    last may be shorter.
    """

    def body(group: Any, item: Any, q: Buffer, sums: Buffer, Kp: Expr, G: Expr,
             group_blocks: Expr) -> None:  # fmt: skip
        m, words = group[0], T.floordiv(Kp, 4)

        def one(j: Expr) -> None:
            first = j * group_blocks * 4
            total = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(total, T.int32(0), [0])
            with T.serial(T.min(group_blocks * 4, words - first)) as i:
                word = q[m * words + first + i]
                added = call("int32", "bc_dot4_code", T.uint32(ONES), word, total[0])
                T.buffer_store(total, added, [0])
            T.buffer_store(sums, total[0], [m * G + j])

        _strided(item[0], G, one)

    parameters = [("q", "uint32*"), ("sums", "int32*")]
    parameters += [(n, "int32") for n in ("Kp", "G", "group_blocks")]
    return device_kernel(name, parameters, (LANES, 1), body)


def glu(name: str, activation: str) -> Any:
    """``void name(both, hidden, F)``: ``hidden = act(both[:, :F]) * both[:, F:]``.

    Work-group ``(i, m)`` computes columns ``[LANES * i, LANES * (i + 1))`` of row m.
    """
    gate = GATES[activation]

    def body(group: Any, item: Any, both: Buffer, hidden: Buffer, F: Expr) -> None:
        k, m = group[0] * LANES + item[0], group[1]
        with when(k < F):
            g = kept(both[m * (2 * F) + k])
            act = kept(gate(ARITHMETIC, g, 1))
            T.buffer_store(hidden, act * both[m * (2 * F) + F + k], [m * F + k])

    parameters = [("both", "float32*"), ("hidden", "float32*"), ("F", "int32")]
    return device_kernel(name, parameters, (LANES, 1), body)
