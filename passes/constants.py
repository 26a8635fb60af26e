"""Reading a constant that an exporter left as a computation: casts, transposes, dequantisation.

Only operators whose result is no larger than their inputs are computed, so that a damaged graph
cannot ask for more memory than its own tensors take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitcompile.passes import graph as edit

Array = npt.NDArray[Any]
DEPTH = 32
"""Longest chain of nodes that is followed."""
JOINED = 1024
"""Elements that Concat may join: shapes, not weights."""


def constant_value(value: ir.Value | None) -> Array | None:
    """The array ``value`` always holds; None if an input decides it, or a node we do not compute.

    An initializer that is also an input of the graph can be overridden, so it is no constant.
    """
    with np.errstate(all="ignore"):
        return _evaluate(value, {}, DEPTH)


def root(value: ir.Value | None) -> ir.Value | None:
    """The largest tensor that a constant is computed from; None if ``value`` is no constant."""
    waiting: list[ir.Value | None] = [value]
    best: ir.Value | None = None
    seen: set[ir.Value] = set()
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if edit.constant(current) is not None and not current.is_graph_input():
            best = current if best is None or _size(current) > _size(best) else best
        elif node is not None and computable(node) and len(seen) <= DEPTH**2:
            waiting += node.inputs
        else:
            return None
    return best


def computable(node: ir.Node) -> bool:
    """Whether :func:`constant_value` computes this operator."""
    return not node.domain and (node.op_type in _OPERATORS or node.op_type == "CastLike")


def _size(value: ir.Value) -> int:
    tensor = edit.constant(value)
    return tensor.size if tensor is not None else 0


def _evaluate(
    value: ir.Value | None, known: dict[ir.Value, Array | None], depth: int
) -> Array | None:
    if value is None or value.is_graph_input():
        return None
    if value not in known:
        known[value] = _compute(value, known, depth)
    return known[value]


def _compute(value: ir.Value, known: dict[ir.Value, Array | None], depth: int) -> Array | None:
    tensor = edit.constant(value)
    if tensor is not None:
        return np.asarray(tensor.numpy())
    node = value.producer()
    if node is None or depth == 0 or not computable(node):
        return None
    if node.op_type == "CastLike":
        data, like = _evaluate(node.inputs[0], known, depth - 1), node.inputs[1]
        to = like.dtype if like is not None else None
        return _cast(data, to) if data is not None and to is not None else None
    inputs: list[Array | None] = []
    for given in node.inputs:
        data = _evaluate(given, known, depth - 1)
        if data is None and given is not None:
            return None
        inputs.append(data)
    try:
        return _OPERATORS[node.op_type](node, inputs)
    except (ValueError, TypeError, IndexError, KeyError):
        return None  # a node whose inputs do not fit together is not ours to report


def _cast(data: Array, to: ir.DataType) -> Array:
    return data.astype(to.numpy())


def _cast_node(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return _cast(inputs[0], ir.DataType(node.attributes.get_int("to", 0)))


def _transpose(node: ir.Node, inputs: Sequence[Any]) -> Array:
    default = tuple(reversed(range(inputs[0].ndim)))
    return np.asarray(np.transpose(inputs[0], node.attributes.get_ints("perm", default)))


def _reshape(node: ir.Node, inputs: Sequence[Any]) -> Array:
    data, shape = inputs[0], [int(size) for size in inputs[1]]
    if not node.attributes.get_int("allowzero", 0):
        shape = [data.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return np.asarray(data.reshape(shape))


def _axes(node: ir.Node, inputs: Sequence[Any]) -> tuple[int, ...] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(axis) for axis in inputs[1].reshape(-1)) or None
    return tuple(node.attributes.get_ints("axes", ())) or None


def _unsqueeze(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return np.asarray(np.expand_dims(inputs[0], _axes(node, inputs) or ()))


def _squeeze(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return np.asarray(np.squeeze(inputs[0], _axes(node, inputs)))


def _concat(node: ir.Node, inputs: Sequence[Any]) -> Array:
    if sum(data.size for data in inputs) > JOINED:
        raise ValueError("larger than its inputs")
    return np.concatenate(inputs, axis=node.attributes.get_int("axis", 0))


def _reduction(compute: Callable[..., Any]) -> Callable[[ir.Node, Sequence[Any]], Array]:
    def reduce(node: ir.Node, inputs: Sequence[Any]) -> Array:
        axes = _axes(node, inputs)
        if axes is None and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
            return np.asarray(inputs[0])
        keep = bool(node.attributes.get_int("keepdims", 1))
        return np.asarray(compute(inputs[0], axis=axes, keepdims=keep), inputs[0].dtype)

    return reduce


def _elementwise(compute: Callable[..., Any]) -> Callable[[ir.Node, Sequence[Any]], Array]:
    def apply(node: ir.Node, inputs: Sequence[Any]) -> Array:
        if len(inputs) > 1:
            _no_larger(inputs)
        return np.asarray(compute(*inputs), inputs[0].dtype)

    return apply


def _no_larger(inputs: Sequence[Any]) -> None:
    """Raise ValueError if broadcasting makes more than the largest input."""
    shape = np.broadcast_shapes(*(data.shape for data in inputs))
    if all(data.shape != shape for data in inputs):
        raise ValueError(f"broadcast to {shape}")


def _divide(a: Array, b: Array) -> Any:
    if a.dtype.kind in "iu":
        raise TypeError("integers divide towards zero in ONNX, downwards in NumPy")
    return a / b


def _clip(node: ir.Node, inputs: Sequence[Any]) -> Array:
    data, bounds = inputs[0], [*inputs[1:], None, None]
    for bound, limit in ((bounds[0], np.maximum), (bounds[1], np.minimum)):
        if bound is not None:
            data = limit(data, bound.reshape(()))
    return np.asarray(data, inputs[0].dtype)


def _dequantize(node: ir.Node, inputs: Sequence[Any]) -> Array:
    """``(x - zero_point) * scale``, per tensor, per slice of an axis, or per block of it."""
    x, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros_like(scale)
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    scale, zero = (_spread(part, x, axis, block) for part in (scale, zero))
    return np.asarray((x.astype(np.float32) - zero.astype(np.float32)) * scale, inputs[1].dtype)


def _spread(part: Array, x: Array, axis: int, block: int) -> Array:
    if part.size == 1:
        return part.reshape(())
    if block:
        repeated = np.repeat(part, block, axis=axis) if block <= x.shape[axis] else part
        return np.take(repeated, range(x.shape[axis]), axis=axis)
    shape = [1] * x.ndim
    shape[axis] = part.size
    return part.reshape(shape)


def _same(node: ir.Node, inputs: Sequence[Any]) -> Array:
    return np.asarray(inputs[0])


_OPERATORS: dict[str, Callable[[ir.Node, Sequence[Any]], Array]] = {
    "Identity": _same,
    "Cast": _cast_node,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Clip": _clip,
    "DequantizeLinear": _dequantize,
    "Abs": _elementwise(np.abs),
    "Neg": _elementwise(np.negative),
    "Sign": _elementwise(np.sign),
    "Sqrt": _elementwise(np.sqrt),
    "Round": _elementwise(np.rint),
    "Reciprocal": _elementwise(lambda x: x.dtype.type(1) / x),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Pow": _elementwise(np.power),
    "Max": _elementwise(lambda *parts: np.maximum.reduce(np.broadcast_arrays(*parts))),
    "Min": _elementwise(lambda *parts: np.minimum.reduce(np.broadcast_arrays(*parts))),
    "ReduceMax": _reduction(np.max),
    "ReduceMin": _reduction(np.min),
    "ReduceMean": _reduction(np.mean),
    "ReduceSum": _reduction(np.sum),
}
