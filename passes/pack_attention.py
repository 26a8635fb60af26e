"""Hand attention its merged projection whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitcompile.passes import graph as edit
from bitcompile.passing import Rewrite

HEAD_MULTIPLE = 16
"""ONNX Runtime rotates packed heads of a multiple of this size only."""


@dataclass(frozen=True)
class Attention:
    """A GroupQueryAttention with separate query, key and value."""

    node: ir.Node


class PackAttention(Rewrite[Attention]):
    """``GroupQueryAttention(q, k, v, ...)`` -> the same of ``(qkv, _, _)``.

    Where ``q, k, v = Split(qkv)``. Refuses, and stays correct with three inputs, when q, k, v are
    not exactly the three parts of one Split and read by this node alone, when their sizes are not
    ``num_heads`` and twice ``kv_num_heads`` heads, or when the head size is not a multiple of 16.
    """

    name: ClassVar[str] = "pack-attention"

    def pattern(self, node: ir.Node) -> Attention | None:
        """Match an attention that still has its key."""
        if not edit.is_op(node, "GroupQueryAttention", edit.MICROSOFT) or node.inputs[1] is None:
            return None
        return Attention(node)

    def check(self, match: Attention) -> str | None:
        """See the class."""
        node = match.node
        split = edit.made_by(node.inputs[0], "Split")
        if split is None:
            return f"query comes from {edit.describe(node.inputs[0])}, not from a merged projection"
        if tuple(split.outputs) != tuple(node.inputs[:3]):
            return (
                f"query, key and value are not the {len(split.outputs)} parts of one Split in order"
            )
        sizes = edit.constant(split.inputs[1]) if len(split.inputs) > 1 else None
        if sizes is None or split.attributes.get_int("axis", 0) not in (-1, 2):
            return "the Split has no constant sizes on its last axis"
        for value in split.outputs:
            if (reason := edit.shared(value)) is not None:
                return reason
        return _heads(node, [int(size) for size in sizes.numpy()])

    def rewrite(self, graph: ir.Graph, match: Attention) -> None:
        """See the class."""
        node = match.node
        split = edit.made_by(node.inputs[0], "Split")
        packed = split.inputs[0] if split is not None else None
        new = edit.new_node(
            graph,
            "GroupQueryAttention",
            [packed, None, None, *node.inputs[3:]],
            {name: attr.value for name, attr in node.attributes.items()},
            domain=edit.MICROSOFT,
            outputs=len(node.outputs),
            name=node.name,
        )
        graph.insert_after(node, new)
        for old, fresh in zip(node.outputs, new.outputs, strict=True):
            edit.replace(graph, old, fresh)


def _heads(node: ir.Node, sizes: list[int]) -> str | None:
    """Why parts of these sizes are not whole heads that can be packed."""
    counts = [node.attributes.get(name) for name in ("num_heads", "kv_num_heads")]
    if any(count is None or count.type != ir.AttributeType.INT for count in counts):
        return "num_heads and kv_num_heads are not two integers"
    heads, kv_heads = (count.as_int() for count in counts if count is not None)
    size = sizes[0] // heads if heads else 0
    if sizes != [heads * size, kv_heads * size, kv_heads * size]:
        return f"parts of {sizes} are not {heads} query and twice {kv_heads} key heads of one size"
    if size % HEAD_MULTIPLE:
        return f"head size {size} is not a multiple of {HEAD_MULTIPLE}"
    return None
