"""Let a model run without the plugin."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError
from bitcompile.opset import DOMAIN, VERSION, Attribute, OpDef
from bitcompile.passing import Pass, Record

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_CALLS = {"BitGLU": ("NormBitLinear", "BitLinear")}
"""Functions that the body of an operator calls."""


class AttachFunctions(Pass):
    """Each operator of our domain in the graph -> a model-local function of the same name.

    With the plugin, ONNX Runtime runs the kernel; without it, the function. Attributes that a
    node left to their default are written out, as a body reads them. Bodies compute in float32; in
    a model with narrower activations they convert what they take and give. Raises InputError when
    two nodes of one operator differ in an attribute that shapes the body (one file holds one body
    of each name), or an operator is unknown.
    """

    name: ClassVar[str] = "attach-functions"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        shapes: dict[str, dict[str, Attribute]] = {}
        narrow = False
        for node in model.graph:
            if node.domain == DOMAIN:
                narrow |= node.inputs[0] is not None and node.inputs[0].dtype in _NARROW
                merged = _complete(node)
                for name in (node.op_type, *_CALLS.get(node.op_type, ())):
                    _agree(shapes, name, merged)
        for name, attributes in shapes.items():
            function = _function(OPS[name].body(attributes))
            if narrow:
                _widen(function, OPS[name])
            model.functions[function.identifier()] = function
        if shapes:
            model.graph.opset_imports[DOMAIN] = VERSION
        return Record(self.name, len(shapes))


def _widen(function: ir.Function, op: OpDef) -> None:
    """Take activations of any type as float32, and give a result of the type that came in."""
    x = function.inputs[0]
    first = next(iter(function))
    for i, value in zip(op.inputs, function.inputs, strict=True):
        if i.name not in ("x", "residual"):
            continue
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        cast.outputs[0].name = f"{value.name}_float"
        for use in tuple(value.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, cast.outputs[0])
        function.insert_before(first, cast)
    if any(i.name == "table" for i in op.inputs):
        return  # logits are float32 whatever comes in
    result = function.outputs[0]
    back = ir.Node("", "CastLike", [result, x])
    back.outputs[0].name = "y_narrow"
    function.append(back)
    function.outputs[0] = back.outputs[0]


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
