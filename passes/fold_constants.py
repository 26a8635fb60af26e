"""Compute small constants that an exporter left as nodes."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bitcompile.passes import graph as edit
from bitcompile.passes.constants import computable, constant_value
from bitcompile.passing import Pass, Record

LIMIT = 64
"""Elements of a constant that is worth a node less: shapes, axes, bounds; never a weight."""


class FoldConstants(Pass):
    """``Op(constant, ...)`` -> constant, where no input or result has more than 64 elements.

    So that other passes see the axes, shapes and bounds they ask about. Left as they are: outputs
    of the model, operators that :mod:`bitcompile.passes.constants` does not compute, subgraphs.
    """

    name: ClassVar[str] = "fold-constants"

    def apply(self, model: ir.Model) -> Record:
        """Every node once, in graph order: what a node reads has been folded before."""
        count = 0
        for node in tuple(model.graph):
            if node.graph is model.graph and _foldable(node):
                count += _fold(model.graph, node)
        return Record(self.name, count)


def _foldable(node: ir.Node) -> bool:
    if not computable(node) or node.outputs[0].is_graph_output():
        return False
    data = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    return all(value is None or _small(value) for value in data)


def _small(value: ir.Value) -> bool:
    tensor = edit.constant(value)
    return tensor is not None and tensor.size <= LIMIT


def _fold(graph: ir.Graph, node: ir.Node) -> int:
    old = node.outputs[0]
    data = constant_value(old)
    if data is None or data.size > LIMIT:
        return 0
    edit.redirect(graph, old, edit.initializer(graph, str(old.name), ir.tensor(data)))
    return 1
