"""Fuse a norm into the projection after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitcompile.opset import DOMAIN
from bitcompile.passes import graph as edit
from bitcompile.passes.norms import epsilon, norm_of, unfusable
from bitcompile.passing import Rewrite


@dataclass(frozen=True)
class NormedLinear:
    """A norm and the projection that reads it."""

    norm: ir.Node
    linear: ir.Node


class FuseNormBitLinear(Rewrite[NormedLinear]):
    """``BitLinear(RMSNormalization(x, gamma), ...)`` -> ``NormBitLinear(x, gamma, ...)``.

    Refuses when something else reads the normalised value (computing the norm twice costs more
    than it saves), it is an output of the model, or the norm is not one weight over the last axis.
    """

    name: ClassVar[str] = "fuse-norm-bit-linear"

    def pattern(self, node: ir.Node) -> NormedLinear | None:
        """Match at the projection."""
        norm = norm_of(node.inputs[0]) if edit.is_op(node, "BitLinear", DOMAIN) else None
        return NormedLinear(norm, node) if norm is not None else None

    def check(self, match: NormedLinear) -> str | None:
        """See the class."""
        return unfusable(match.norm, match.linear.attributes.get_int("K", 0))

    def rewrite(self, graph: ir.Graph, match: NormedLinear) -> None:
        """See the class."""
        fused = edit.new_node(
            graph,
            "NormBitLinear",
            [*match.norm.inputs[:2], *match.linear.inputs[1:]],
            {**edit.attributes(match.linear), "eps": epsilon(match.norm)},
            domain=DOMAIN,
            name=match.linear.name,
        )
        graph.insert_after(match.linear, fused)
        edit.replace(graph, match.linear.outputs[0], fused.outputs[0])
