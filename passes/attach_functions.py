"""Let a model run without the plugin."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError
from bitcompile.opset import DOMAIN, VERSION, Attribute
from bitcompile.passing import Pass, Record

_CALLS = {"BitGLU": ("NormBitLinear", "BitLinear")}
"""Functions that the body of an operator calls."""


class AttachFunctions(Pass):
    """Each operator of our domain in the graph -> a model-local function of the same name.

    With the plugin, ONNX Runtime runs the kernel; without it, the function. Attributes that a
    node left to their default are written out, as a body reads them. Raises InputError when two
    nodes of one operator differ in an attribute that shapes the body (one file holds one body of
    each name), or an operator is unknown.
    """

    name: ClassVar[str] = "attach-functions"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        shapes: dict[str, dict[str, Attribute]] = {}
        for node in model.graph:
            if node.domain == DOMAIN:
                merged = _complete(node)
                for name in (node.op_type, *_CALLS.get(node.op_type, ())):
                    _agree(shapes, name, merged)
        for name, attributes in shapes.items():
            function = _function(OPS[name].body(attributes))
            model.functions[function.identifier()] = function
        if shapes:
            model.graph.opset_imports[DOMAIN] = VERSION
        return Record(self.name, len(shapes))


def _complete(node: ir.Node) -> dict[str, Attribute]:
    """The attributes of ``node``, with the defaults written into it."""
    if node.op_type not in OPS:
        raise InputError(f"unknown operator {DOMAIN}::{node.op_type}; known: {', '.join(OPS)}")
    merged = OPS[node.op_type].complete({k: a.value for k, a in node.attributes.items()})
    for attribute in ir.convenience.convert_attributes(merged):
        node.attributes[attribute.name] = attribute
    return merged


def _agree(
    shapes: dict[str, dict[str, Attribute]], name: str, attributes: dict[str, Attribute]
) -> None:
    """Note what the body of ``name`` depends on; raise InputError if nodes disagree."""
    wanted = {key: attributes[key] for key in OPS[name].structural}
    known = shapes.setdefault(name, wanted)
    for key, value in wanted.items():
        if known[key] != value:
            raise InputError(
                f"nodes of {name} differ in {key}: {known[key]} and {value}; "
                "one model can hold one form of each operator"
            )


def _function(text: str) -> ir.Function:
    import onnx.parser

    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
