"""Lowering: weights into a target's layout, and the plugin that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    import onnx_ir as ir

    chosen = choose_layout(target, wanted)
    library, kernels = target.compile()
    moved: set[str] = set()  # a weight may be shared by several nodes
    for node in graph.graph:
        if node.domain != DOMAIN or not OPS[node.op_type].weights:
            continue
        op = OPS[node.op_type]
        attributes = op.complete({name: a.value for name, a in node.attributes.items()})
        inputs = op.named(node.inputs)
        source = layout(str(attributes["layout"]))
        group_size = int(attributes["group_size"])
        if group_size and not target.grouped:
            raise UsageError(
                f"{op.name} {node.name} has a scale per {group_size} columns; target {target.name} "
                "has kernels for a scale per row only: choose another target"
            )
        for weight in op.weights:
            value = inputs[weight.data]
            if any(v is None or v.const_value is None for v in (value, inputs[weight.scale])):
                raise InputError(
                    f"{op.name} {node.name}: its weight is computed by the graph, not a constant, "
                    "so it cannot be packed: export the model with its weights as initializers"
                )
            scale = inputs[weight.scale]
            if value.name not in moved:
                _repack(value, source, chosen, weight.shape(attributes))
                moved.add(value.name)
            if group_size and scale.name not in moved:
                stored = source.decode_scale(
                    scale.const_value.numpy(), *weight.shape(attributes), group_size
                )
                _replace(scale, chosen.encode_scale(stored, group_size))
                moved.add(scale.name)
        node.attributes["layout"] = ir.AttrString("layout", chosen.id)
    return Lowered(graph, target, chosen.id, library, kernels)


def _repack(value: ir.Value, source: Layout, chosen: Layout, shape: tuple[int, int]) -> None:
    """Replace the constant by the same weights in another layout."""
    assert value.const_value is not None
    no_scale = np.ones((shape[0], 1), np.float32)  # it stays where it is, an input of the node
    packed = PackedTernary(value.const_value.numpy(), no_scale, source, shape)
    _replace(value, packed.to(chosen).data)


def _replace(value: ir.Value, array: np.ndarray[Any, Any]) -> None:
    import onnx_ir as ir

    value.const_value = ir.Tensor(array, name=value.name)
    value.shape = value.const_value.shape
