"""Lowering: weights into a target's layout, and the plugin that reads them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
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


def choose_layout(
    target: Target, wanted: str = AUTO, size: int = 0, group_sizes: Iterable[int] = ()
) -> tuple[Layout, str]:
    """The layout a build uses, and why: the target's choice, or the family or id asked for.

    ``size``: bytes of the model's ternary weights at 2 bits each; ``group_sizes``: columns that
    share a scale (0: rows), of all of them. Raises UsageError if the target has no kernels for it
    or it cannot hold the groups.
    """
    if wanted == AUTO:
        return _automatic(target, size, group_sizes)
    chosen = next((layout(i) for i in target.layouts if wanted in (i, i.split("_")[0])), None)
    if chosen is None:
        raise UsageError(
            f"target {target.name} has no layout {wanted!r}; it reads {', '.join(target.layouts)}"
        )
    for group_size in group_sizes:
        if not chosen.holds(group_size):
            raise UsageError(
                f"layout {chosen.id} cannot hold a scale per {group_size} columns: "
                "build with --layout i2"
            )
    return chosen, "asked for"


def _automatic(target: Target, size: int, group_sizes: Iterable[int]) -> tuple[Layout, str]:
    """The target's choice, or its first layout where that cannot hold the groups."""
    id, reason = target.layouts[0], "the target's first"
    if target.auto_layout is not None:
        id, reason = target.auto_layout(size)
    narrow = [g for g in group_sizes if not layout(id).holds(g)]
    if narrow:
        return layout(target.layouts[0]), f"{id} cannot hold a scale per {narrow[0]} columns"
    return layout(id), reason


def lower(graph: ir.Model, target: Target, wanted: str = AUTO) -> Lowered:
    """Repack every ternary weight of ``graph`` (in place) and compile the target's plugin.

    Raises InputError for a weight that is not constant or not ternary, UsageError for a layout the
    target does not have, ToolchainError if the plugin cannot be compiled.
    """
    import onnx_ir as ir

    chosen, reason = choose_layout(target, wanted, *_survey(graph))
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
    return Lowered(graph, target, chosen.id, library, kernels, reason)


def _survey(graph: ir.Model) -> tuple[int, set[int]]:
    """Bytes of all ternary weights at 2 bits each (a shared one counts once), and group sizes."""
    sizes: dict[str, int] = {}
    group_sizes: set[int] = set()
    for node in graph.graph:
        if node.domain != DOMAIN or not OPS[node.op_type].weights:
            continue
        op = OPS[node.op_type]
        attributes = op.complete({name: a.value for name, a in node.attributes.items()})
        inputs = op.named(node.inputs)
        group_sizes.add(int(attributes["group_size"]))
        for weight in op.weights:
            sizes[str(inputs[weight.data].name)] = prod(weight.shape(attributes)) // 4
    return sum(sizes.values()), group_sizes


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
