"""Lowering: weights into a target's layout, and the plugin that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError, UsageError
from bitcompile.model import Lowered
from bitcompile.opset import DOMAIN
from bitcompile.packing import PackedTernary, layout

if TYPE_CHECKING:
    import onnx_ir as ir

    from bitcompile.packing import Layout
    from bitcompile.target import Target

AUTO = "auto"


def choose_layout(target: Target, wanted: str = AUTO) -> Layout:
    """The layout a build uses: the target's preferred one, or the family or id asked for.

    Raises UsageError if the target has no kernels for it.
    """
    for id in target.layouts:
        if wanted in (AUTO, id, id.split("_")[0]):
            return layout(id)
    raise UsageError(
        f"target {target.name} has no layout {wanted!r}; it reads {', '.join(target.layouts)}"
    )


def lower(graph: ir.Model, target: Target, wanted: str = AUTO) -> Lowered:
    """Repack every ternary weight of ``graph`` (in place) and compile the target's plugin.

    Raises InputError for a weight that is not constant or not ternary, UsageError for a layout the
    target does not have, ToolchainError if the plugin cannot be compiled.
    """
    chosen = choose_layout(target, wanted)
    done: set[str] = set()
    for node in graph.graph:
        if node.domain != DOMAIN:
            continue
        op = OPS[node.op_type]
        for weight, scale in op.weights:
            position = [i.name for i in op.inputs].index(weight)
            _repack(node, op.name, position, _shape_of(node, weight), scale, chosen, done)
        if op.weights:
            node.attributes["layout"] = _text_attribute("layout", chosen.id)
    library, kernels = target.compile()
    return Lowered(graph, target, chosen.id, library, kernels)


def _text_attribute(name: str, value: str) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrString(name, value)


def _shape_of(node: ir.Node, weight: str) -> tuple[int, int]:
    """``(N, K)`` of one of a node's weights."""
    rows, columns = {"w": ("N", "K"), "w_gate_up": ("F2", "K"), "w_down": ("N", "F")}[weight]
    return node.attributes[rows].as_int(), node.attributes[columns].as_int()


def _repack(
    node: ir.Node,
    op: str,
    position: int,
    shape: tuple[int, int],
    scale: str,
    chosen: Layout,
    done: set[str],
) -> None:
    import onnx_ir as ir

    value = node.inputs[position]
    if value is None or value.const_value is None:
        raise InputError(f"{op} {node.name}: its weight is not a constant, so it cannot be packed")
    if value.name in done:  # a weight shared by several nodes
        return
    source = layout(node.attributes["layout"].as_string())
    packed = PackedTernary(
        value.const_value.numpy(), np.ones((shape[0], 1), np.float32), source, shape
    )
    tensor = ir.Tensor(packed.to(chosen).data, name=value.name)
    value.const_value = tensor
    value.shape = tensor.shape
    done.add(str(value.name))
