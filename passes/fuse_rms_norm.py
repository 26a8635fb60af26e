"""Name the root-mean-square normalisation that an exporter wrote out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitcompile.passes import graph as edit
from bitcompile.passing import Rewrite


@dataclass(frozen=True)
class WrittenNorm:
    """``result = gamma * (x / Sqrt(mean + eps))``."""

    result: ir.Node
    x: ir.Value
    gamma: ir.Value
    mean: ir.Node
    eps: ir.Value


class FuseRmsNorm(Rewrite[WrittenNorm]):
    """``gamma * (x * Reciprocal(Sqrt(ReduceMean(Pow(x, 2)) + eps)))`` -> ``RMSNormalization``.

    Factors and addends in either order, ``x / Sqrt(...)`` for the product with the reciprocal,
    ``x * x`` for the power. Refuses when eps is not a constant, gamma is not a constant ``[K]``,
    the mean is not over the last axis alone, or x is not float32.
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def pattern(self, node: ir.Node) -> WrittenNorm | None:
        """Match at the product with gamma."""
        for unit, gamma in _orders(node, "Mul"):
            for x, root in _ratio(unit):
                sqrt = edit.made_by(root, "Sqrt")
                for moment, eps in _orders(_before(sqrt), "Add"):
                    mean = edit.made_by(moment, "ReduceMean")
                    if mean is not None and _is_square(mean.inputs[0], x):
                        return WrittenNorm(node, x, gamma, mean, eps)
        return None

    def check(self, match: WrittenNorm) -> str | None:
        """See the class."""
        if edit.scalar(match.eps) is None:
            return f"eps {edit.describe(match.eps)} is not a constant"
        shape, gamma = edit.dims(match.x), edit.dims(match.gamma)
        if edit.constant(match.gamma) is None or shape is None or gamma != shape[-1:]:
            return f"gamma {edit.describe(match.gamma)} of shape {gamma} is not a constant [K]"
        axes = edit.constant(match.mean.inputs[1]) if len(match.mean.inputs) > 1 else None
        last = axes.numpy().tolist() if axes is not None else None
        if last not in ([-1], [len(shape) - 1]) or not match.mean.attributes.get_int("keepdims", 1):
            return f"the mean is over axes {last}, not over the last with its dimension kept"
        if match.x.dtype != ir.DataType.FLOAT:
            return f"x is {match.x.dtype}, not float32"
        return None

    def rewrite(self, graph: ir.Graph, match: WrittenNorm) -> None:
        """See the class."""
        norm = edit.new_node(
            graph,
            "RMSNormalization",
            [match.x, match.gamma],
            {"axis": -1, "epsilon": edit.scalar(match.eps), "stash_type": 1},
        )
        graph.insert_after(match.result, norm)
        edit.replace(graph, match.result.outputs[0], norm.outputs[0])


def _orders(node: ir.Node | None, op_type: str) -> list[tuple[ir.Value, ir.Value]]:
    """The two inputs of a commutative node, both ways round; nothing if it is another node."""
    if node is None or not edit.is_op(node, op_type):
        return []
    a, b = node.inputs
    return [(a, b), (b, a)] if a is not None and b is not None else []


def _ratio(value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """``(x, root)`` of ``x * Reciprocal(root)`` or ``x / root``."""
    found = _orders(value.producer(), "Div")[:1]
    for x, inverse in _orders(value.producer(), "Mul"):
        reciprocal = edit.made_by(inverse, "Reciprocal")
        if reciprocal is not None and reciprocal.inputs[0] is not None:
            found.append((x, reciprocal.inputs[0]))
    return found


def _before(node: ir.Node | None) -> ir.Node | None:
    value = node.inputs[0] if node is not None else None
    return value.producer() if value is not None else None


def _is_square(value: ir.Value | None, x: ir.Value) -> bool:
    power, product = edit.made_by(value, "Pow"), edit.made_by(value, "Mul")
    if power is not None:
        return power.inputs[0] is x and edit.scalar(power.inputs[1]) == 2.0
    return product is not None and tuple(product.inputs) == (x, x)
