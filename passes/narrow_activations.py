"""Activations in 16 bits, for targets whose attention has no other kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import onnx_ir as ir

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError
from bitcompile.opset import DOMAIN
from bitcompile.passes import graph as edit
from bitcompile.passing import Pass, Record

WIDE = ir.DataType.FLOAT
TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
TYPED = ("x", "residual")
"""Inputs of our operators that have the activations' type; scales and norms stay float32."""
SCALED = ("HeadLinear", "GatherBlockQuantized")
"""Operators whose result has the type of their float32 scales."""
MADE = ("ConstantOfShape", "RandomNormal", "RandomUniform", "EyeLike", "DequantizeLinear")
"""Operators whose result type no input decides."""


class NarrowActivations(Pass):
    """Every float32 value between operators, and every float32 input and output -> 16 bits.

    Constants that share a type with an activation follow it; the scales, norms and biases of our
    operators stay float32, as do logits from a quantised head. Logits of a bfloat16 graph are
    widened again: most readers of them have no such type. Raises InputError for an operator with a
    subgraph or one that makes floats from nothing: neither is rewritten here.
    """

    name: ClassVar[str] = "narrow-activations"

    def __init__(self, activations: str = "float16") -> None:
        self.narrow = TYPES[activations]

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        graph = model.graph
        count = 0
        for entry in graph.inputs:
            count += self._narrow_type(entry)
        narrowed: dict[ir.Value, ir.Value] = {}
        for node in tuple(graph):
            _refuse(node)
            for i in _inputs(node):
                value = node.inputs[i]
                if value is not None and value.is_initializer() and value.dtype == WIDE:
                    if value not in narrowed:
                        narrowed[value] = self._narrowed(graph, value)
                    node.replace_input_with(i, narrowed[value])
            self._attributes(node)
            if node.op_type in SCALED:
                count += self._cast_after(graph, node)
                continue
            for result in node.outputs:
                count += self._narrow_type(result)
        if self.narrow == TYPES["bfloat16"]:
            _widen_logits(graph)
        return Record(self.name, count)

    def _narrow_type(self, value: ir.Value) -> bool:
        if value.dtype != WIDE:
            return False
        value.type = ir.TensorType(self.narrow)
        return True

    def _narrowed(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """A copy of a constant in 16 bits, made when it is read."""
        tensor = edit.constant(value)
        if tensor is None:
            raise InputError(f"{value.name} is not a constant: give the model its weights")
        name = f"{value.name}.{self.narrow.name.lower()}"
        if tensor.size == 1:
            return edit.initializer(graph, name, self._converted(tensor))

        def convert() -> ir.TensorProtocol:
            return self._converted(tensor)

        shape = ir.Shape(list(tensor.shape.numpy()))
        return edit.initializer(graph, name, ir.LazyTensor(convert, dtype=self.narrow, shape=shape))

    def _converted(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(self.narrow.numpy()), dtype=self.narrow)

    def _attributes(self, node: ir.Node) -> None:
        """Casts to float32 and constants of it change what they make."""
        if edit.is_op(node, "Cast") and node.attributes.get_int("to", 0) == WIDE:
            node.attributes["to"] = ir.AttrInt64("to", int(self.narrow))
        if edit.is_op(node, "Constant") and node.outputs[0].dtype == WIDE:
            made = edit.constant(node.outputs[0])
            if made is None:
                raise InputError(f"{node.name}: a constant without a value")
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", self._converted(made))

    def _cast_after(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Hand a float32 result on in 16 bits; as an output of the model it stays."""
        result = node.outputs[0]
        uses: list[Any] = list(result.uses())
        if not uses:
            return False
        cast = edit.new_node(graph, "Cast", [result], {"to": int(self.narrow)})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(self.narrow), result.shape
        graph.insert_after(node, cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        return True


def _refuse(node: ir.Node) -> None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for a in node.attributes.values()):  # fmt: skip
        raise InputError(f"{node.name}: {node.op_type} holds a graph, which has no 16-bit form")
    floats = any(value.dtype == WIDE for value in node.outputs)
    if node.op_type in MADE and floats:
        raise InputError(f"{node.name}: {node.op_type} makes float32, which has no 16-bit form")


def _inputs(node: ir.Node) -> list[int]:
    """The inputs that have the activations' type."""
    if node.domain == DOMAIN:
        names = [i.name for i in OPS[node.op_type].inputs]
        return [i for i, name in enumerate(names) if name in TYPED]
    return [] if node.op_type in SCALED else list(range(len(node.inputs)))


def _widen_logits(graph: ir.Graph) -> None:
    """A float32 copy of 16-bit logits takes their place and their name."""
    for i, logits in enumerate(graph.outputs):
        if logits.name != "logits" or logits.dtype == WIDE:
            continue
        cast = edit.new_node(graph, "Cast", [logits], {"to": int(WIDE)})
        wide = cast.outputs[0]
        wide.type, wide.shape, wide.name = ir.TensorType(WIDE), logits.shape, logits.name
        logits.name = "logits.narrow"
        graph.append(cast)
        graph.outputs[i] = wide
