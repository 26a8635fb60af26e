"""Recognise ternary layers that an exporter wrote in standard operators."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitcompile.opset import DOMAIN
from bitcompile.packing import PORTABLE, PackedTernary
from bitcompile.passes import graph as edit
from bitcompile.passes.constants import Array, constant_value, root
from bitcompile.passes.fake_quantization import (
    LEVELS,
    Peak,
    Scale,
    Unlike,
    columns,
    is_rounded,
    quantized,
    scale_of,
)
from bitcompile.passing import Rewrite

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter keeps the path of the module a node comes from."""
_STORED = re.compile(r"\.(weight|w|kernel|bias|weight_scale|scale|weight_packed)$")


@dataclass(frozen=True)
class Layer:
    """A ternary layer as it was read, and the last value of what it replaces."""

    x: ir.Value
    weight: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    end: ir.Value


@dataclass(frozen=True)
class Product:
    """A product with a constant that might be a ternary layer's."""

    node: ir.Node

    @cached_property
    def layer(self) -> Layer | str:
        """The layer, or why it is none."""
        try:
            return _read(self.node)
        except Unlike as unlike:
            return str(unlike)


class RecognizeBitLinear(Rewrite[Product]):
    """``act_scale * w_scale * (quantise(x) @ W) + bias`` -> ``BitLinear(x)``.

    Matches MatMul, Gemm and MatMulInteger whose activations are rounded per token, or whose
    constant weight is ternary. ``quantise`` is ``Clip(Round(x * 127 / max(max|x|, 1e-5)))``, with
    products, quotients and reciprocals in any order (:mod:`bitcompile.passes.fake_quantization`);
    W holds 0 and one magnitude a row, in any type and however it is dequantised; scales stand in
    W, on the activations or behind the product, and a bias between or after them.

    The integers are those of the pattern, except that ``x / (peak / 127)`` and ``x * (127 / peak)``
    round once more than ``x * (1 / peak * 127)``: there an integer may be one step off where x lies
    within a last bit of half a step. Refuses with the first thing that differs: another floor,
    number of levels, clamp, axis or rounding, an element type other than float32, a weight that
    is not ternary or not constant, a scale that is missing.
    """

    name: ClassVar[str] = "recognize-bit-linear"

    def pattern(self, node: ir.Node) -> Product | None:
        """Match at the product."""
        if node.domain or node.op_type not in ("MatMul", "Gemm", "MatMulInteger"):
            return None
        if is_rounded(node.inputs[0]) or _looks_ternary(node):
            return Product(node)
        return None

    def check(self, match: Product) -> str | None:
        """See the class."""
        return match.layer if isinstance(match.layer, str) else None

    def rewrite(self, graph: ir.Graph, match: Product) -> None:
        """See the class: at the place of the last node, its quantisation erased when unused."""
        layer = match.layer
        if isinstance(layer, str):
            raise ValueError("rewrite needs a match that check accepted")
        N, K = layer.weight.shape
        stem, absent = _stem(match.node), edit.absent_input(graph)
        packed = PackedTernary.pack(layer.weight, layer.scale)
        bias = absent
        if layer.bias is not None:
            bias = edit.initializer(graph, f"{stem}.bias_row", ir.tensor(layer.bias))
        node = edit.new_node(
            graph,
            "BitLinear",
            [
                layer.x,
                edit.initializer(graph, f"{stem}.weight_packed", ir.tensor(packed.data)),
                edit.initializer(graph, f"{stem}.weight_scales", ir.tensor(packed.scale)),
                bias,
                absent,
            ],
            {"K": K, "N": N, "layout": PORTABLE.id, "group_size": 0, "act_bits": 8},
            domain=DOMAIN,
            name=match.node.name,
        )
        end = layer.end.producer()
        if end is None:
            raise ValueError("a layer ends with a node")
        graph.insert_after(end, node)
        edit.replace(graph, layer.end, node.outputs[0])


def _read(node: ir.Node) -> Layer:
    """The layer whose product is ``node``; raises Unlike."""
    activations = quantized(node.inputs[0])
    if node.op_type != "MatMulInteger" and node.outputs[0].dtype != ir.DataType.FLOAT:
        raise Unlike(f"the product is {node.outputs[0].dtype}, not FLOAT")
    weight, magnitude = _ternary(_weight(node))
    scale = activations.scale.times(Scale(magnitude))
    bias = None
    if node.op_type == "Gemm":
        scale = scale.times(Scale(np.array([node.attributes.get_float("alpha", 1.0)])))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            beta = node.attributes.get_float("beta", 1.0)
            bias = _gemm_bias(node.inputs[2], scale) * beta
    followed = _follow(node.outputs[0], _Sum(scale, bias), activations.peak, len(weight))
    rows = _float32(followed.sum.scale.coefficient * LEVELS, len(weight)).reshape(-1, 1)
    if not np.isfinite(rows).all():
        raise Unlike("a weight scale is not finite")
    total = followed.sum.bias
    row = None if total is None else _float32(total, len(weight))
    return Layer(activations.x, weight, rows, row, followed.end)


def _float32(numbers: npt.NDArray[np.float64], N: int) -> npt.NDArray[np.float32]:
    """One number, or one per row, as one per row."""
    with np.errstate(over="ignore"):
        return np.broadcast_to(numbers.astype(np.float32), (N,)).copy()


# --- weights ------------------------------------------------------------------------------------


def _weight(node: ir.Node) -> Array:
    """The constant weight ``[N, K]`` of a product; raises Unlike."""
    data = constant_value(node.inputs[1])
    if data is None:
        raise Unlike(f"its weight comes from {edit.describe(node.inputs[1])}, not from a constant")
    if data.ndim != 2 or data.size == 0:
        raise Unlike(f"its weight has shape {list(data.shape)}, not [K, N]")
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            raise Unlike("Gemm transposes the activations")
        return data if node.attributes.get_int("transB", 0) else data.T
    if node.op_type == "MatMulInteger":
        data = data.astype(np.int32) - _zero_points(node, data.shape[1])
    return data.T


def _zero_points(node: ir.Node, N: int) -> Array:
    """Zero point of the weight of a MatMulInteger, int32; raises Unlike."""
    points = [constant_value(v) for v in node.inputs[2:] if v is not None]
    if any(point is None for point in points):
        raise Unlike("a zero point is not constant")
    a, b = (*[np.asarray(p, np.int32).reshape(-1) for p in points], *[np.zeros(1, np.int32)] * 2)[
        :2
    ]
    if a.any() or b.size not in (1, N):
        raise Unlike("activations have a zero point, or the weight one per row of K")
    return np.asarray(b)


def _ternary(data: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Signs int8 ``[N, K]`` and the magnitude of each row; raises Unlike if there are two."""
    wide = np.asarray(data, np.float32)
    if not np.isfinite(wide).all():
        raise Unlike("its weight holds NaN or Inf")
    largest = np.abs(wide).max(axis=1, keepdims=True)
    signs = np.sign(wide).astype(np.int8)
    wrong = (wide != signs * largest).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        values = len(np.unique(wide[row]))
        raise Unlike(f"weight has {values} distinct values in row {row}: it is not ternary")
    magnitude = largest[:, 0].astype(np.float64)
    magnitude[magnitude == 0] = 1.0  # a row of zeros is zero with any scale
    if (magnitude == magnitude[0]).all():
        magnitude = magnitude[:1]
    return signs, magnitude


def _looks_ternary(node: ir.Node) -> bool:
    """Whether the first row of a constant weight holds one magnitude and several weights."""
    source = root(node.inputs[1])
    tensor = edit.constant(source)
    if tensor is None or tensor.size < 16 or tensor.shape.rank() != 2:
        return False
    first = np.abs(np.asarray(tensor.numpy()[:1], np.float32))
    return first.size > 3 and len(np.unique(first[first > 0])) == 1


# --- what follows the product -------------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    """``scale * (q @ weight) + bias``."""

    scale: Scale
    bias: npt.NDArray[np.float64] | None

    @property
    def complete(self) -> bool:
        """Whether the activations' own scale has been divided out."""
        return self.scale.power == 1

    def times(self, factor: Scale) -> _Sum:
        if factor.peak is not None and self.bias is not None:
            raise Unlike("a bias is added before the activations' scale")
        bias = self.bias
        return _Sum(self.scale.times(factor), None if bias is None else bias * factor.coefficient)

    def plus(self, constant: npt.NDArray[np.float64]) -> _Sum:
        if not self.complete:
            raise Unlike("a bias is added before the activations' scale")
        return _Sum(self.scale, constant if self.bias is None else self.bias + constant)


@dataclass(frozen=True)
class _Followed:
    end: ir.Value
    sum: _Sum


def _follow(value: ir.Value, total: _Sum, peak: Peak, N: int) -> _Followed:
    """Take in the scales and the bias that follow, as far as they are a layer's; raises Unlike."""
    best = _Followed(value, total) if total.complete else None
    while edit.shared(value) is None:
        (use,) = value.uses()
        try:
            total = _step(use.node, use.idx, total, N)
        except Unlike:
            if best is None:
                raise
            break
        if total.scale.peak != peak:
            break
        value = use.node.outputs[0]
        if total.complete:
            best = _Followed(value, total)
    if best is None:
        raise Unlike(
            f"its result {value.name!r} is used before it is divided by the activations' scale"
        )
    return best


def _step(node: ir.Node, idx: int, total: _Sum, N: int) -> _Sum:
    """``total`` after ``node``, which reads it as input ``idx``; raises Unlike."""
    if not node.domain:
        if node.op_type in ("Identity", "Cast"):
            if node.outputs[0].dtype == ir.DataType.FLOAT:
                return total
        elif node.op_type == "Mul":
            return total.times(_fits(scale_of(node.inputs[1 - idx]), node, idx, N))
        elif node.op_type == "Div" and idx == 0:
            return total.times(_fits(scale_of(node.inputs[1]), node, idx, N).inverse())
        elif node.op_type == "Add" or (node.op_type == "Sub" and idx == 0):
            other = scale_of(node.inputs[1 - idx])
            if other.peak is None:
                added = _fits(other, node, idx, N).coefficient
                return total.plus(added if node.op_type == "Add" else -added)
    raise Unlike(f"its result is used by {node.op_type} before it is scaled")


def _fits(scale: Scale, node: ir.Node, idx: int, N: int) -> Scale:
    """``scale`` if it keeps the shape ``[..., N]`` of the value it meets; raises Unlike."""
    value, other = node.inputs[idx], node.inputs[1 - idx]
    rank = len(value.shape) if value is not None and value.shape is not None else 1
    wide = other is not None and other.shape is not None and len(other.shape) > rank
    constant = constant_value(other)
    if (
        scale.coefficient.size not in (1, N)
        or wide
        or (constant is not None and constant.ndim > rank)
    ):
        raise Unlike(f"{node.op_type} changes the shape of the result")
    return scale


def _gemm_bias(value: ir.Value, scale: Scale) -> npt.NDArray[np.float64]:
    data = constant_value(value)
    if data is None:
        raise Unlike(f"its bias comes from {edit.describe(value)}, not from a constant")
    if scale.power != 1:
        raise Unlike("a bias is added before the activations' scale")
    return columns(data)


# --- names --------------------------------------------------------------------------------------


def _stem(node: ir.Node) -> str:
    """The name of the module a product belongs to, as far as the file tells."""
    weight = root(node.inputs[1])
    candidates = [str(weight.name) if weight is not None else "", *_scopes(node)]
    path = (node.name or "").strip("/").split("/")[:-1]
    for name in (*candidates, ".".join(path)):
        if "." in name:
            return _STORED.sub("", name)
    return (node.name or node.outputs[0].name or "linear").strip("/").replace("/", ".")


def _scopes(node: ir.Node) -> Sequence[str]:
    """The module paths torch's exporter noted, innermost first."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [name for name in reversed(scopes) if isinstance(name, str)] if scopes else []
