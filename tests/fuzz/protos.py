"""Spoiled ONNX models that still parse: nodes, tensors and types that say something else."""

from __future__ import annotations

from random import Random
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from tests.fuzz.edits import integer, small

KINDS = (
    "op", "drop", "repeat", "rename", "input", "output", "domain", "attribute", "kind",
    "dims", "type", "data", "opset", "shape", "element", "initializer", "function",
)  # fmt: skip
OPS = (
    "MatMul", "Mul", "Div", "Clip", "Round", "Abs", "ReduceMax", "Cast", "Reshape", "Gemm", "If",
    "BitLinear", "NormBitLinear", "Constant", "Transpose", "", "Identity", "Unknown",
)  # fmt: skip
TYPES = (AttributeProto.INT, AttributeProto.FLOATS, AttributeProto.STRING, AttributeProto.TENSOR,
         AttributeProto.GRAPH)  # fmt: skip


def spoil_proto(draw: Random, proto: onnx.ModelProto) -> bytes:
    """``proto`` after one to four edits, serialised."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for _ in range(draw.choice((1, 1, 2, 4))):
        _apply(result, draw.choice(KINDS), draw.randrange(1 << 16), integer(draw))
    return bytes(result.SerializeToString())


def _apply(model: onnx.ModelProto, kind: str, which: int, value: int) -> None:
    graph = model.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)] or ["x"]
    if kind == "opset" and model.opset_import:
        model.opset_import[which % len(model.opset_import)].version = small(value)
    elif kind == "function" and len(graph.node) > 1:
        made = model.functions.add(name=graph.node[0].op_type, domain=graph.node[-1].domain)
        made.node.extend(graph.node[:2])
        made.input.extend(graph.node[0].input)
        made.opset_import.extend(model.opset_import)
    elif kind in ("dims", "type", "data", "initializer") and graph.initializer:
        index = which % len(graph.initializer)
        _tensor(graph, kind, index, value, names)
    elif kind in ("shape", "element"):
        values = [*graph.input, *graph.output, *graph.value_info]
        if values:
            _value(values[which % len(values)].type.tensor_type, kind, value)
    elif graph.node:
        _node(graph, kind, which % len(graph.node), value, names)


def _tensor(graph: Any, kind: str, index: int, value: int, names: list[str]) -> None:
    tensor: TensorProto = graph.initializer[index]
    if kind == "dims":
        if tensor.dims and value % 3:
            tensor.dims[value % len(tensor.dims)] = small(value)
        else:
            tensor.dims.append(small(value))
    elif kind == "type":
        tensor.data_type = value % 30
    elif kind == "data":
        tensor.raw_data = tensor.raw_data[: value % 50] + bytes([value % 256]) * (value % 7)
    elif value % 2:
        tensor.name = names[value % len(names)]
    else:
        del graph.initializer[index]


def _value(tensor_type: Any, kind: str, value: int) -> None:
    if kind == "element":
        tensor_type.elem_type = value % 30
    elif not tensor_type.shape.dim or value % 5 == 0:
        tensor_type.shape.dim.add(dim_value=small(value))
    else:
        tensor_type.shape.dim[value % len(tensor_type.shape.dim)].dim_value = small(value)


def _node(graph: Any, kind: str, index: int, value: int, names: list[str]) -> None:
    node = graph.node[index]
    if kind == "op":
        node.op_type = OPS[value % len(OPS)]
    elif kind == "drop":
        del graph.node[index]
    elif kind == "repeat":
        graph.node.add().CopyFrom(node)
    elif kind == "rename":
        node.name = names[value % len(names)]
    elif kind == "domain":
        node.domain = ("", "bitcompile", "com.microsoft", "ai.onnx", "else")[value % 5]
    elif kind == "input":
        if node.input and value % 4:
            node.input[value % len(node.input)] = ("", *names)[value % (len(names) + 1)]
        elif node.input and value % 8:
            node.input.pop()
        else:
            node.input.append(names[value % len(names)])
    elif kind == "output" and node.output:
        node.output[value % len(node.output)] = ("", *names)[value % (len(names) + 1)]
    elif node.attribute:
        attribute = node.attribute[value % len(node.attribute)]
        if kind == "attribute":
            attribute.i = small(value)
        else:
            attribute.type = TYPES[value % len(TYPES)]
