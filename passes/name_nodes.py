"""Give nodes and their results short names that say where in the model they stand."""

from __future__ import annotations

import re
from typing import ClassVar

import onnx_ir as ir

from bitcompile.passing import Pass, Record

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|past_key_values)\.(\d+)\.")
_ROLES = {
    "GroupQueryAttention": "attention",
    "BitGLU": "ffn",
    "HeadLinear": "head",
    "FusedMatMul": "head",
    "GatherBlockQuantized": "embed",
}
_STORAGE = re.compile(r"^(w|weight|scale|bias|gamma|packed|q\d)(_\w+)?$")
"""Last parts of an initializer's name that tell how it is stored, not what it is."""


class NameNodes(Pass):
    """``node_linear_83`` -> ``layer.3.qkv``, from the names of the initializers a node reads.

    ``model.layers.3.self_attn.qkv_proj.weight`` gives ``layer.3.qkv``; attention, feed-forward
    network, head and embedding have fixed names; a node without a named weight is called after
    its operator. A name that is taken gets a number. Inputs, outputs and initializers keep theirs.
    """

    name: ClassVar[str] = "name-nodes"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        graph, count = model.graph, 0
        kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
        taken = {value.name for value in kept if value.name}
        for node in graph:
            name = _unique(_name(node), taken)
            taken.add(name)
            count += node.name != name
            node.name = name
            for i, value in enumerate(node.outputs):
                if value not in kept and value.name:
                    value.name = name if i == 0 else _unique(f"{name}.{i}", taken)
                    taken.add(value.name)
        return Record(self.name, count)


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}.{number}", number + 1
    return unique


def _name(node: ir.Node) -> str:
    names = [
        value.name
        for value in node.inputs
        if value is not None and value.name and (value.is_initializer() or value.is_graph_input())
    ]
    layer = next((found[1] for name in names if (found := _LAYER.search(name))), None)
    prefix = f"layer.{layer}." if layer is not None else ""
    return prefix + (_ROLES.get(node.op_type) or _role(node, names))


def _role(node: ir.Node, names: list[str]) -> str:
    """The module a node's weight belongs to (the last one named), else the operator."""
    modules = [name.split(".") for name in names if "." in name]
    if not modules:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.op_type).lower()
    chosen = modules[1] if node.op_type == "NormBitLinear" and len(modules) > 1 else modules[0]
    while len(chosen) > 1 and _STORAGE.match(chosen[-1]):
        chosen = chosen[:-1]
    return chosen[-1].removesuffix("_proj")
