"""Reading and editing a graph: the few helpers that the passes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from bitcompile.opset import DOMAIN, VERSION, Attribute, is_absent

MICROSOFT = "com.microsoft"
_VERSIONS = {DOMAIN: VERSION, MICROSOFT: 1}
ABSENT = "absent"
"""Name of the rank-0 zero that stands for every absent optional input."""


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node of this kind that computes ``value``, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_op(node, op_type, domain) else None


def is_op(node: ir.Node, op_type: str, domain: str = "") -> bool:
    """Whether ``node`` is this operator."""
    return node.op_type == op_type and node.domain == domain


def describe(value: ir.Value | None) -> str:
    """What computes a value, for a message."""
    node = value.producer() if value is not None else None
    if node is not None:
        return node.op_type
    return f"{value.name!r}" if value is not None else "nothing"


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node; None for anything else."""
    return ir.convenience.get_const_tensor(value) if value is not None else None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element; None for anything else."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def absent(value: ir.Value | None) -> bool:
    """Whether an optional input is the rank-0 zero that means it is not there."""
    tensor = constant(value)
    return tensor is not None and tensor.shape.rank() == 0 and is_absent(tensor.numpy())


def shared(value: ir.Value | None) -> str | None:
    """Why ``value`` cannot vanish into its one user; None if it can."""
    if value is None:
        return "it is missing"
    if value.is_graph_output():
        return f"{value.name!r} is an output of the model"
    if len(value.uses()) != 1:
        return f"{value.name!r} has {len(value.uses())} uses"
    return None


def dims(value: ir.Value | None) -> tuple[int | str, ...] | None:
    """The shape of a value, numbers and names; None unless all of it is known."""
    if value is None or value.shape is None:
        return None
    known: list[int | str] = []
    for dim in value.shape:
        size = dim if isinstance(dim, int) else dim.value
        if size is None:
            return None
        known.append(size)
    return tuple(known)


def attributes(node: ir.Node) -> dict[str, Attribute]:
    """The attributes of a node of our domain as plain values."""
    return {name: attr.value for name, attr in node.attributes.items()}


def packing_of(node: ir.Node) -> dict[str, Attribute]:
    """How the ternary weights of a node are stored and used."""
    get = node.attributes
    return {
        "layout": get.get_string("layout", "i2"),
        "group_size": get.get_int("group_size", 0),
        "act_bits": get.get_int("act_bits", 8),
    }


def new_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
    name: str | None = None,
) -> ir.Node:
    """A node that is not in the graph yet; its domain is imported."""
    if domain:
        graph.opset_imports.setdefault(domain, _VERSIONS[domain])
    attrs = ir.convenience.convert_attributes(attributes or {})
    return ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs, name=name)


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new constant of the graph; a number is added to a name that is taken."""
    unique, number = name, 2
    while unique in graph.initializers:
        unique, number = f"{name}.{number}", number + 1
    tensor.name = unique
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def array(graph: ir.Graph, name: str, values: object, dtype: type = np.int64) -> ir.Value:
    """A small constant; one of this name and value is used again."""
    data: np.ndarray[Any, Any] = np.asarray(values, dtype)
    known = graph.initializers.get(name)
    if known is not None and known.const_value is not None:
        tensor = known.const_value
        if tensor.dtype == ir.tensor(data).dtype and np.array_equal(tensor.numpy(), data):
            return known
    return initializer(graph, name, ir.tensor(data))


def absent_input(graph: ir.Graph) -> ir.Value:
    """The graph's constant for absent optional inputs."""
    return array(graph, ABSENT, 0.0, np.float32)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` take the place, name, type and shape of ``old``, and erase what died of it."""
    new.name, new.type = old.name, old.type
    new.shape = old.shape.copy() if old.shape is not None else None
    redirect(graph, old, new)


def redirect(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let the users of ``old`` read ``new``, and erase what died of it."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    erase(graph, old.producer())


def erase(graph: ir.Graph, node: ir.Node | None) -> None:
    """Remove ``node`` if nothing reads it, and then those before it that only it read."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node.graph is not graph:
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        waiting += [value.producer() for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
