"""The gate activations of a gated feed-forward network. See ``bitcompile.numerics``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitcompile import numerics
from bitcompile.targets.tir.dsl import Expr, T, const, exact, round_to_int, typed


@dataclass(frozen=True)
class Arithmetic:
    """What is not one plain expression on every device, for values of some lanes."""

    exact: Callable[[Expr, int], Expr]
    """A float32 value rounded here: no product meets an addition unrounded."""
    divide: Callable[[Expr, Expr, int], Expr]
    """``fl(a / b)``."""
    round_to_int: Callable[[Expr, int], Expr]
    """rint as int32, for magnitudes below 2**22."""


CPU = Arithmetic(exact=exact, divide=lambda a, b, lanes: a / b, round_to_int=round_to_int)

Gate = Callable[[Arithmetic, Expr, int], Expr]


def f32(value: float, lanes: int) -> Expr:
    """A float32 constant in every lane."""
    return const(value, "float32", lanes)


def _exp(a: Arithmetic, x: Expr, lanes: int) -> Expr:
    """``numerics.exp``."""
    x = T.max(T.min(x, f32(numerics.EXP_MAX, lanes)), f32(numerics.EXP_MIN, lanes))
    n = a.round_to_int(x * f32(numerics.LOG2E, lanes), lanes)
    nf = T.cast(n, typed("float32", lanes))
    r = x - a.exact(nf * f32(numerics.LN2_HI, lanes), lanes)
    r = a.exact(r - a.exact(nf * f32(numerics.LN2_LO, lanes), lanes), lanes)
    p = f32(numerics.EXP_COEFFICIENTS[0], lanes)
    for c in numerics.EXP_COEFFICIENTS[1:]:
        p = a.exact(p * r, lanes) + f32(c, lanes)
    y = a.exact(a.exact(p, lanes) * a.exact(r * r, lanes), lanes) + r + f32(1.0, lanes)
    power = T.shift_left(n + const(127, "int32", lanes), const(23, "int32", lanes))
    return a.exact(y, lanes) * T.reinterpret(power, dtype=typed("float32", lanes))


def _sigmoid_product(a: Arithmetic, x: Expr, z: Expr, lanes: int) -> Expr:
    decay = a.exact(_exp(a, f32(0.0, lanes) - z, lanes), lanes)
    return a.divide(x, f32(1.0, lanes) + decay, lanes)


def _relu2(a: Arithmetic, g: Expr, lanes: int) -> Expr:
    zero = f32(0.0, lanes)
    positive = T.Select(g > zero, g, a.exact(g * zero, lanes))
    return a.exact(positive * positive, lanes)


def _silu(a: Arithmetic, g: Expr, lanes: int) -> Expr:
    return _sigmoid_product(a, g, g, lanes)


def _gelu_tanh(a: Arithmetic, g: Expr, lanes: int) -> Expr:
    cube = a.exact(a.exact(g * g, lanes) * g, lanes)
    inner = g + a.exact(cube * f32(numerics.GELU_TANH_C1, lanes), lanes)
    return _sigmoid_product(a, g, a.exact(inner * f32(numerics.GELU_TANH_C0, lanes), lanes), lanes)


def _gelu_erf(a: Arithmetic, g: Expr, lanes: int) -> Expr:
    zero = f32(0.0, lanes)
    magnitude = T.Select(g > zero, g, zero - g)
    z = a.exact(magnitude * f32(numerics.SQRT_HALF, lanes), lanes)
    slope = a.exact(z * f32(numerics.ERF_P, lanes), lanes)
    t = a.divide(f32(1.0, lanes), f32(1.0, lanes) + slope, lanes)
    p = f32(numerics.ERF_COEFFICIENTS[0], lanes)
    for c in numerics.ERF_COEFFICIENTS[1:]:
        p = a.exact(p * t, lanes) + f32(c, lanes)
    decay = a.exact(_exp(a, zero - a.exact(z * z, lanes), lanes), lanes)
    tail = a.exact(a.exact(a.exact(p, lanes) * t, lanes) * decay, lanes)
    half = a.exact(g * f32(0.5, lanes), lanes)
    return half * T.Select(g > zero, f32(2.0, lanes) - tail, tail)


GATES: dict[str, Gate] = {
    "relu2": _relu2,
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "gelu_erf": _gelu_erf,
}
