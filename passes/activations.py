"""How exporters write ``act(gate) * up``: read as a product of factors, in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from bitcompile.passes.graph import MICROSOFT, describe, is_op, made_by, scalar


@dataclass(frozen=True)
class GatedProduct:
    """``act(gate) * up`` and the nodes inside it."""

    activation: str
    gate: ir.Value
    up: ir.Value
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class _Product:
    """``coefficient * factors[0] * factors[1] * ...`` and the Mul nodes that form it."""

    coefficient: float
    factors: tuple[ir.Value, ...]
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class _Factor:
    """What one factor says about the product it stands in.

    The product must be ``coefficient * factor`` times each of ``with_`` times ``up``.
    """

    activation: str
    gate: ir.Value
    with_: tuple[ir.Value, ...] = ()
    coefficient: float = 1.0


def gated_product(value: ir.Value | None) -> GatedProduct | None:
    """Read ``value`` as ``act(gate) * up``; None if it is not one."""
    product = _product(value)
    for factor in product.factors:
        found = _relu2(factor, product) or _silu(factor) or _gelu(factor) or _erf(factor)
        if found is None or not _close(product.coefficient, found.coefficient):
            continue
        rest = list(product.factors)
        for part in (factor, *found.with_):
            if part in rest:
                rest.remove(part)
        if len(rest) == 1 and len(product.factors) == 2 + len(found.with_):
            inside = product.nodes | _between(factor, found.gate)
            for part in found.with_:
                inside |= _between(part, found.gate)
            return GatedProduct(found.activation, found.gate, rest[0], inside)
    return None


def _product(value: ir.Value | None) -> _Product:
    """``value`` with its tree of Mul nodes (and Div by a constant) multiplied out."""
    node = value.producer() if value is not None else None
    if value is None:
        return _Product(1.0, (), frozenset())
    number = scalar(value)
    if number is not None:
        return _Product(number, (), frozenset())
    if node is not None and is_op(node, "Mul"):
        left, right = (_product(v) for v in node.inputs)
        return _Product(
            left.coefficient * right.coefficient,
            left.factors + right.factors,
            left.nodes | right.nodes | {node},
        )
    if node is not None and is_op(node, "Div") and scalar(node.inputs[1]):
        top = _product(node.inputs[0])
        coefficient = top.coefficient / (scalar(node.inputs[1]) or 1.0)
        return _Product(coefficient, top.factors, top.nodes | {node})
    return _Product(1.0, (value,), frozenset())


def _relu2(factor: ir.Value, product: _Product) -> _Factor | None:
    """``Pow(Relu(g), 2)``, or ``Relu(g)`` twice among the factors."""
    power = made_by(factor, "Pow")
    if power is not None and scalar(power.inputs[1]) == 2.0:
        relu = made_by(power.inputs[0], "Relu")
        return _Factor("relu2", _first(relu)) if relu is not None else None
    relu = made_by(factor, "Relu")
    if relu is None:
        return None
    twins = [f for f in product.factors if (n := made_by(f, "Relu")) and n.inputs == relu.inputs]
    return _Factor("relu2", _first(relu), (twins[1],)) if len(twins) == 2 else None


def _silu(factor: ir.Value) -> _Factor | None:
    """``g * Sigmoid(g)`` or ``Swish(g)``."""
    sigmoid = made_by(factor, "Sigmoid")
    if sigmoid is not None:
        return _Factor("silu", _first(sigmoid), (_first(sigmoid),))
    swish = made_by(factor, "Swish")
    if swish is not None and swish.attributes.get_float("alpha", 1.0) == 1.0:
        return _Factor("silu", _first(swish))
    return None


def _gelu(factor: ir.Value) -> _Factor | None:
    """Gelu as one node."""
    node = made_by(factor, "Gelu")
    if node is not None:
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return _Factor("gelu_tanh" if tanh else "gelu_erf", _first(node))
    node = made_by(factor, "Gelu", MICROSOFT)
    if node is not None:
        return _Factor("gelu_erf", _first(node))
    node = made_by(factor, "FastGelu", MICROSOFT)
    if node is not None and len(node.inputs) == 1:
        return _Factor("gelu_tanh", _first(node))
    return None


def _erf(factor: ir.Value) -> _Factor | None:
    """``0.5 g (1 + Erf(g / sqrt 2))`` or ``0.5 g (1 + Tanh(sqrt(2/pi) (g + 0.044715 g^3)))``."""
    inner = _plus_one(factor)
    erf, tanh = made_by(inner, "Erf"), made_by(inner, "Tanh")
    gate, name = None, "gelu_erf"
    if erf is not None:
        scaled = _product(erf.inputs[0])
        if len(scaled.factors) == 1 and _close(scaled.coefficient, math.sqrt(0.5)):
            gate = scaled.factors[0]
    elif tanh is not None:
        gate, name = _cubic(tanh.inputs[0]), "gelu_tanh"
    return _Factor(name, gate, (gate,), 0.5) if gate is not None else None


def _plus_one(value: ir.Value) -> ir.Value | None:
    """``z`` of ``1 + z``."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for one, other in (add.inputs, tuple(reversed(add.inputs))):
        if scalar(one) == 1.0:
            return other
    return None


def _cubic(value: ir.Value | None) -> ir.Value | None:
    """``g`` of ``sqrt(2/pi) (g + 0.044715 g^3)``."""
    outer = _product(value)
    add = made_by(outer.factors[0], "Add") if len(outer.factors) == 1 else None
    if add is None or not _close(outer.coefficient, math.sqrt(2 / math.pi)):
        return None
    for gate, cube in (add.inputs, tuple(reversed(add.inputs))):
        term = _product(cube)
        factors = term.factors
        power = made_by(factors[0], "Pow") if len(factors) == 1 else None
        if power is not None and scalar(power.inputs[1]) == 3.0:
            factors = (_first(power),) * 3
        if factors == (gate,) * 3 and _close(term.coefficient, 0.044715):
            return gate
    return None


def _between(value: ir.Value, gate: ir.Value) -> frozenset[ir.Node]:
    """The nodes that compute ``value`` from ``gate``."""
    node = value.producer()
    if value is gate or node is None or scalar(value) is not None:
        return frozenset()
    inside = frozenset({node})
    for before in node.inputs:
        if before is not None:
            inside |= _between(before, gate)
    return inside


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{describe(node.outputs[0])} has no input")
    return value


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)
