"""Fold a residual addition into the operator before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitcompile.opset import DOMAIN
from bitcompile.passes import graph as edit
from bitcompile.passing import Rewrite

_OPS = ("BitLinear", "NormBitLinear", "BitGLU")
"""Operators whose last input is a residual."""


@dataclass(frozen=True)
class Residual:
    """``add = Add(r, y)`` and the operator that computes y."""

    add: ir.Node
    linear: ir.Node
    r: ir.Value


class FoldResidual(Rewrite[Residual]):
    """``Add(r, y)``, ``y = Op(..., absent)`` -> ``Op(..., r)``.

    Op is BitLinear, NormBitLinear or BitGLU. The sum keeps its bits: each adds the residual last.
    Where both addends could take the other, the second does. Refuses when y already has a
    residual, something else reads y, or the shapes are not equal (a broadcast) or not known. r
    cannot depend on y: Add alone reads y.
    """

    name: ClassVar[str] = "fold-residual"

    def pattern(self, node: ir.Node) -> Residual | None:
        """Match at the Add; the first addend that can be folded, else the first that might."""
        if not edit.is_op(node, "Add"):
            return None
        found: list[Residual] = []
        for y, r in (tuple(reversed(node.inputs)), node.inputs):
            linear = y.producer() if y is not None else None
            if r is not None and linear and linear.domain == DOMAIN and linear.op_type in _OPS:
                found.append(Residual(node, linear, r))
        foldable = [match for match in found if self.check(match) is None]
        return next(iter(foldable or found), None)

    def check(self, match: Residual) -> str | None:
        """See the class."""
        y = match.linear.outputs[0]
        if not edit.absent(match.linear.inputs[-1]):
            return f"{y.name!r} already has residual {edit.describe(match.linear.inputs[-1])}"
        if (reason := edit.shared(y)) is not None:
            return reason
        if edit.dims(match.r) is None or edit.dims(match.r) != edit.dims(y):
            return f"shapes {edit.dims(match.r)} and {edit.dims(y)} are not known to be equal"
        return None

    def rewrite(self, graph: ir.Graph, match: Residual) -> None:
        """See the class: at the place of the Add, where r is computed."""
        folded = edit.new_node(
            graph,
            match.linear.op_type,
            [*match.linear.inputs[:-1], match.r],
            edit.attributes(match.linear),
            domain=DOMAIN,
            name=match.linear.name,
        )
        graph.insert_after(match.add, folded)
        edit.replace(graph, match.add.outputs[0], folded.outputs[0])
