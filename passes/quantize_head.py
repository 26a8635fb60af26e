"""Quantise the embedding table and the language-model head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from bitcompile.custom_ops.head_linear import BLOCK
from bitcompile.errors import InputError
from bitcompile.numerics import F32, quantize_table
from bitcompile.opset import DOMAIN
from bitcompile.packing import Bytes
from bitcompile.passes import graph as edit
from bitcompile.passes.last_logits import LOGITS
from bitcompile.passing import Pass, Record, Refusal

_CHUNK = 1 << 20
"""Table values quantised at a time: bounds the memory beyond the result."""
_BITS = {"q8": 8, "q4": 4}
_IDS = "input_ids"


@dataclass(frozen=True)
class Table:
    """The ``[V, K]`` matrix that an embedding or a head reads."""

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool = False
    """Whether the graph stores it as ``[K, V]``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(V, K)``."""
        first, second = self.tensor.shape.numpy()
        return (second, first) if self.transposed else (first, second)


class QuantizeHead(Pass):
    """``Gather(table, input_ids)`` and ``logits = MatMul(h, Transpose(table))`` share one table.

    ``q8``, ``q4``: ``HeadLinear(h, codes, scale)`` and
    ``Reshape(GatherBlockQuantized(codes, input_ids, scale))``: value = (code - zero) * scale, one
    scale per 128 weights. The reading operators take the same three-dimensional codes, so that
    they stay in the mapped file; only the small result is reshaped (and sliced where 128 does not
    divide K). ``float``: the table in float32, read by Gather and by FusedMatMul as it lies.
    Casts of the table or of the result vanish. Refuses when the head is not a matrix product with
    a constant ``[V, K]``; raises InputError when a table holds NaN or Inf.
    """

    name: ClassVar[str] = "quantize-head"

    def __init__(self, head: str) -> None:
        self.bits = _BITS.get(head)

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        graph = model.graph
        tables = _Tables(graph, self.bits)
        count, refusals = 0, []
        for node in tuple(graph):
            reason = None
            if _is_embedding(node):
                reason = self._embedding(graph, node, tables)
            elif any(value.name == LOGITS and value.is_graph_output() for value in node.outputs):
                reason = self._head(graph, node, tables)
            else:
                continue
            if reason is None:
                count += 1
            else:
                refusals.append(Refusal(node.name or node.op_type, reason))
        return Record(self.name, count, tuple(refusals))

    def _head(self, graph: ir.Graph, node: ir.Node, tables: _Tables) -> str | None:
        if not edit.is_op(node, "MatMul"):
            return f"logits come from {node.op_type}, not from a MatMul"
        table = _table_of(node.inputs[1], transposed=True)
        if table is None:
            return f"head weight {edit.describe(node.inputs[1])} is not a constant matrix"
        hidden = node.inputs[0]
        V, K = table.shape
        if self.bits is None:
            new = edit.new_node(
                graph,
                "FusedMatMul",
                [hidden, tables.floats(table)],
                {"transB": 1, "alpha": 1.0},
                domain=edit.MICROSOFT,
            )
        else:
            codes, scale = tables.quantized(table)
            attributes = {"K": K, "N": V, "bits": self.bits, "block": BLOCK}
            new = edit.new_node(
                graph, "HeadLinear", [hidden, codes, scale], attributes, domain=DOMAIN
            )
        graph.insert_after(node, new)
        edit.replace(graph, node.outputs[0], new.outputs[0])
        return None

    def _embedding(self, graph: ir.Graph, node: ir.Node, tables: _Tables) -> str | None:
        table = _table_of(node.inputs[0], transposed=False)
        if table is None:
            return f"embedding table {edit.describe(node.inputs[0])} is not a constant matrix"
        ends, reason = _float_results(node.outputs[0])
        if reason is not None:
            return reason
        new = self._gather(graph, node, table, tables)
        graph.insert_after(node, new)
        result = new[-1].outputs[0]
        edit.replace(graph, ends[0], result)
        for end in ends[1:]:
            edit.redirect(graph, end, result)
        return None

    def _gather(
        self, graph: ir.Graph, node: ir.Node, table: Table, tables: _Tables
    ) -> list[ir.Node]:
        """The nodes that look a row up; the last one's output is float32 ``[..., K]``."""
        ids = node.inputs[1]
        if self.bits is None:
            return [edit.new_node(graph, "Gather", [tables.floats(table), ids], {"axis": 0})]
        codes, scale = tables.quantized(table)
        gather = edit.new_node(
            graph,
            "GatherBlockQuantized",
            [codes, ids, scale],
            {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "bits": self.bits},
            domain=edit.MICROSOFT,
        )
        at = list(ids.shape) if ids is not None and ids.shape is not None else [None, None]
        blocks = -(-table.shape[1] // BLOCK)
        _typed(gather, [*at, blocks, BLOCK])
        rows = edit.array(graph, "embed_rows", [*[0] * len(at), -1])
        flat = _typed(
            edit.new_node(graph, "Reshape", [gather.outputs[0], rows]), [*at, blocks * BLOCK]
        )
        K = table.shape[1]
        if K % BLOCK == 0:
            return [gather, flat]
        cut = [
            edit.array(graph, name, [value])
            for name, value in (("embed_start", 0), ("embed_width", K), ("embed_axis", -1))
        ]
        return [gather, flat, edit.new_node(graph, "Slice", [flat.outputs[0], *cut])]


class _Tables:
    """The graph's new tables, each made once however many nodes read it."""

    def __init__(self, graph: ir.Graph, bits: int | None) -> None:
        self.graph = graph
        self.bits = bits or 8
        self._quantized: dict[tuple[int, bool], tuple[ir.Value, ir.Value]] = {}
        self._floats: dict[tuple[int, bool], ir.Value] = {}

    def quantized(self, table: Table) -> tuple[ir.Value, ir.Value]:
        """Codes ``[V, B, bytes]`` and scale ``[V, B, 1]``, which embedding and head share."""
        key = id(table.tensor), table.transposed
        if key not in self._quantized:
            codes, scale = quantize_rows(table, self.bits)
            name = table.value.name or "table"
            self._quantized[key] = (
                edit.initializer(self.graph, f"{name}.q{self.bits}", ir.tensor(codes)),
                edit.initializer(self.graph, f"{name}.scale", ir.tensor(scale)),
            )
        return self._quantized[key]

    def floats(self, table: Table) -> ir.Value:
        """The table as float32 ``[V, K]``, converted when somebody reads it."""
        key = id(table.tensor), table.transposed
        if key not in self._floats:
            if table.tensor.dtype == ir.DataType.FLOAT and not table.transposed:
                self._floats[key] = table.value
            else:
                name = f"{table.value.name}.float"
                self._floats[key] = edit.initializer(self.graph, name, _lazy_floats(table))
        return self._floats[key]


def _typed(node: ir.Node, shape: list[Any]) -> ir.Node:
    """Note that the node's output is float32 of this shape."""
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(shape)
    return node


def _lazy_floats(table: Table) -> ir.TensorProtocol:
    def convert() -> ir.TensorProtocol:
        values = table.tensor.numpy()
        return ir.tensor(np.ascontiguousarray(_upright(values, table), np.float32))

    return ir.LazyTensor(convert, dtype=ir.DataType.FLOAT, shape=ir.Shape(list(table.shape)))


def quantize_rows(table: Table, bits: int) -> tuple[Bytes, F32]:
    """:func:`numerics.quantize_table` in chunks of rows, so that no float32 copy ever exists.

    Raises InputError if a value is not finite.
    """
    V, K = table.shape
    blocks = -(-K // BLOCK)
    codes = np.empty((V, blocks, BLOCK * bits // 8), np.uint8)
    scale = np.empty((V, blocks, 1), np.float32)
    values = _upright(table.tensor.numpy(), table)
    step = max(1, _CHUNK // K)
    for start in range(0, V, step):
        rows = slice(start, start + step)
        chunk = np.asarray(values[rows], np.float32)
        if not np.isfinite(chunk).all():
            raise InputError(f"table {table.value.name!r} holds NaN or Inf: it is damaged")
        codes[rows], scale[rows] = quantize_table(chunk, bits, BLOCK)
    return codes, scale


def _upright(values: np.ndarray, table: Table) -> np.ndarray:
    return values.T if table.transposed else values


def _is_embedding(node: ir.Node) -> bool:
    ids = node.inputs[1] if edit.is_op(node, "Gather") else None
    return (
        ids is not None
        and ids.is_graph_input()
        and ids.name == _IDS
        and node.attributes.get_int("axis", 0) == 0
    )


def _table_of(value: ir.Value | None, *, transposed: bool) -> Table | None:
    """The table behind Cast and Transpose; ``transposed`` says how the reader takes it."""
    while value is not None:
        tensor = edit.constant(value)
        if tensor is not None:
            return Table(value, tensor, transposed) if tensor.shape.rank() == 2 else None
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Cast", "Transpose"):
            return None
        if node.op_type == "Transpose":
            transposed ^= list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]
        elif not ir.DataType(node.attributes.get_int("to", 0)).is_floating_point():
            return None
        value = node.inputs[0]
    return None


def _float_results(value: ir.Value) -> tuple[tuple[ir.Value, ...], str | None]:
    """The float32 forms of a looked-up row, or why there is none."""
    if value.dtype == ir.DataType.FLOAT:
        return (value,), None
    users = [use.node for use in value.uses()]
    others = [
        user.op_type
        for user in users
        if not edit.is_op(user, "Cast") or user.outputs[0].dtype != ir.DataType.FLOAT
    ]
    if others or not users:
        return (), f"the embedding is used as {value.dtype} by {', '.join(others) or 'nothing'}"
    return tuple(user.outputs[0] for user in users), None
