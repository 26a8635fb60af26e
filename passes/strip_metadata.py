"""Remove what an exporter leaves in a graph and nobody needs to run it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from bitcompile.passing import Pass, Record

PRODUCER = "bitcompile"
_SMALL = 16
"""Elements up to which equal constants become one (all the absent inputs, axes, sizes)."""


class StripMetadata(Pass):
    """A graph -> the same without stack traces, notes, dead nodes, and opsets it does not use.

    Removes metadata and documentation of the model, its nodes and values, unused nodes,
    initializers and opset imports, and joins equal small constants. Never refuses.
    """

    name: ClassVar[str] = "strip-metadata"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        steps = (
            common.ClearMetadataAndDocStringPass(),
            common.RemoveUnusedNodesPass(),
            common.DeduplicateInitializersPass(size_limit=_SMALL),
            common.RemoveUnusedOpsetsPass(),
        )
        count = sum(step(model).modified for step in steps)
        model.metadata_props.clear()
        model.doc_string = None
        model.producer_name, model.producer_version = PRODUCER, None
        model.graph.name = PRODUCER
        for value in _values(model.graph):
            value.metadata_props.clear()
            value.doc_string = None
            if value.const_value is not None:
                value.const_value.metadata_props.clear()
        return Record(self.name, count)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs),
    ]
