"""Merge projections that read the same activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitcompile.opset import DOMAIN
from bitcompile.packing import PORTABLE
from bitcompile.passes import graph as edit
from bitcompile.passes.activations import gated_product
from bitcompile.passing import Rewrite


@dataclass(frozen=True)
class Siblings:
    """BitLinear nodes of one ``x``, in the order their rows are to have."""

    x: ir.Value
    nodes: tuple[ir.Node, ...]


class MergeProjections(Rewrite[Siblings]):
    """``BitLinear_i(x, w_i)`` -> ``Split(BitLinear(x, [w_1; w_2; ...]))``.

    x is quantised once, and one kernel walks all rows: q, k, v in the order attention takes them;
    gate before up. Rows carry their own scale, so results keep their bits. Projections with
    different users (attention and a parallel feed-forward network, say) form separate groups.
    Refuses when layouts, group sizes or activation bits differ, the layout is not the portable
    one (whose rows can be joined), a residual is already added, or a weight is not constant.
    """

    name: ClassVar[str] = "merge-projections"

    def pattern(self, node: ir.Node) -> Siblings | None:
        """Match at the first sibling of a group."""
        x = node.inputs[0] if edit.is_op(node, "BitLinear", DOMAIN) else None
        if x is None:
            return None
        users = [
            use.node
            for use in x.uses()
            if use.idx == 0 and edit.is_op(use.node, "BitLinear", DOMAIN)
        ]
        roles = {user: _role(user, users) for user in users}
        group = [user for user in users if roles[user][0] is roles[node][0]]
        if len(group) < 2 or group[0] is not node:
            return None
        return Siblings(x, tuple(sorted(group, key=lambda user: roles[user][1])))

    def check(self, match: Siblings) -> str | None:
        """See the class."""
        packings = [edit.packing_of(node) for node in match.nodes]
        for key in ("layout", "group_size", "act_bits"):
            values = list(dict.fromkeys(str(packing[key]) for packing in packings))
            if len(values) > 1:
                return f"siblings differ in {key}: {', '.join(values)}"
        if packings[0]["layout"] != PORTABLE.id:
            return f"rows of layout {packings[0]['layout']} cannot be joined, only {PORTABLE.id}"
        for node in match.nodes:
            if not edit.absent(node.inputs[4]):
                return f"{node.name} already adds residual {edit.describe(node.inputs[4])}"
            if any(edit.constant(value) is None for value in node.inputs[1:4]):
                return f"the weight of {node.name} is not constant"
        return None

    def rewrite(self, graph: ir.Graph, match: Siblings) -> None:
        """See the class."""
        rows = [node.attributes.get_int("N", 0) for node in match.nodes]
        merged = edit.new_node(
            graph,
            "BitLinear",
            [match.x, *_joined(graph, match.nodes, rows), edit.absent_input(graph)],
            {**edit.attributes(match.nodes[0]), "N": sum(rows)},
            domain=DOMAIN,
            name=joined_name([str(node.name) for node in match.nodes]),
        )
        sizes = edit.array(graph, f"split_{'_'.join(map(str, rows))}", rows)
        split = edit.new_node(
            graph, "Split", [merged.outputs[0], sizes], {"axis": -1}, outputs=len(rows)
        )
        producer = match.x.producer()
        if producer is None:
            graph.insert_before(graph[0], [merged, split])
        else:
            graph.insert_after(producer, [merged, split])
        _type_like(merged.outputs[0], match.nodes[0].outputs[0], sum(rows))
        merged.outputs[0].name = joined_name([str(node.outputs[0].name) for node in match.nodes])
        for node, part in zip(match.nodes, split.outputs, strict=True):
            edit.replace(graph, node.outputs[0], part)


def _role(node: ir.Node, siblings: Sequence[ir.Node]) -> tuple[object, int]:
    """``(user, position)``: the node or value that takes this projection, and as which input."""
    outputs = [sibling.outputs[0] for sibling in siblings]
    for use in node.outputs[0].uses():
        if edit.is_op(use.node, "GroupQueryAttention", edit.MICROSOFT) and use.idx < 3:
            return use.node, use.idx
        if edit.is_op(use.node, "Split"):
            return use.node, 0  # merged already, by the model or by us
    for sibling in siblings:
        for use in sibling.outputs[0].uses():
            product = gated_product(use.node.outputs[0])
            if product is None or product.gate not in outputs or product.up not in outputs:
                continue
            if node.outputs[0] in (product.gate, product.up):
                return use.node.outputs[0], int(node.outputs[0] is product.up)
    return None, outputs.index(node.outputs[0])


def _joined(
    graph: ir.Graph, nodes: Sequence[ir.Node], rows: Sequence[int]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Weight, scale and bias of the merged projection."""
    weights = [tensor for node in nodes if (tensor := edit.constant(node.inputs[1])) is not None]
    scales = [tensor for node in nodes if (tensor := edit.constant(node.inputs[2])) is not None]
    scale = np.concatenate(
        [tensor.numpy().reshape(n, -1) for tensor, n in zip(scales, rows, strict=True)]
    )
    w, s = (joined_name([_name(node.inputs[i]) for node in nodes]) for i in (1, 2))
    bias = edit.absent_input(graph)
    if not all(edit.absent(node.inputs[3]) for node in nodes):
        parts = [_bias(node, n) for node, n in zip(nodes, rows, strict=True)]
        bias = edit.initializer(graph, f"{w}.bias", ir.tensor(np.concatenate(parts)))
    return (
        edit.initializer(graph, w, _stacked(weights)),
        edit.initializer(graph, s, ir.tensor(scale)),
        bias,
    )


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""


def _bias(node: ir.Node, rows: int) -> np.ndarray:
    tensor = edit.constant(node.inputs[3])
    if tensor is None or edit.absent(node.inputs[3]):
        return np.zeros(rows, np.float32)
    return np.asarray(tensor.numpy(), np.float32)


def _stacked(parts: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """The rows of all parts, joined only when somebody reads them."""
    shapes = [part.shape.numpy() for part in parts]
    shape = ir.Shape([sum(rows for rows, _ in shapes), shapes[0][1]])
    return ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([part.numpy() for part in parts])),
        dtype=ir.DataType.UINT8,
        shape=shape,
    )


def _type_like(value: ir.Value, like: ir.Value, size: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape[:-1], size])


def joined_name(names: Sequence[str]) -> str:
    """One name for several: ``a.q_proj.w``, ``a.k_proj.w``, ``a.v_proj.w`` -> ``a.qkv_proj.w``."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) != 1:
        return "+".join(names)
    return ".".join(_joined_part(list(dict.fromkeys(part))) for part in zip(*split, strict=True))


def _joined_part(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    stems, ends = zip(*(part.partition("_")[::2] for part in parts), strict=True)
    if len(set(ends)) != 1:
        return "+".join(parts)
    stem = ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems)
    return f"{stem}_{ends[0]}" if ends[0] else stem
