"""How exporters write per-token int8 quantisation: read back as ``q * scale``.

The largest magnitude of a row, floored at 1e-5, is its *peak*; ``127 / peak`` is the scale that is
multiplied before rounding. Whatever is neither equal to that nor different by a last rounding only
raises :class:`Unlike` with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitcompile.numerics import AMAX_FLOOR
from bitcompile.passes import graph as edit
from bitcompile.passes.constants import Array, constant_value

LEVELS = 127
"""Largest integer a row is quantised to."""
_EXACT = (
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
)
"""Types that hold -128..127 exactly and in which products keep float32's precision."""
_DEPTH = 16


class Unlike(Exception):  # noqa: N818 it is an answer, not a failure
    """Why a value is not what a reader looks for."""


class _NoPeak(Unlike):
    """There is no largest magnitude in a value at all."""


@dataclass(frozen=True)
class Peak:
    """``max(max|x|, floor)`` of each row of x."""

    x: ir.Value
    floor: float | None = None


@dataclass(frozen=True)
class Scale:
    """``coefficient * peak ** power``; coefficient float64, one number or one per column."""

    coefficient: npt.NDArray[np.float64]
    peak: Peak | None = None
    power: int = 0

    def times(self, other: Scale) -> Scale:
        """The product; raises Unlike if the two are of different peaks."""
        if self.peak is not None and other.peak is not None and self.peak != other.peak:
            raise Unlike(
                f"it is scaled by the largest magnitudes of {self.peak.x.name!r} and of "
                f"{other.peak.x.name!r} or with different floors"
            )
        with np.errstate(all="ignore"):
            product = self.coefficient * other.coefficient
        return Scale(product, self.peak or other.peak, self.power + other.power)

    def inverse(self) -> Scale:
        """One over it."""
        with np.errstate(all="ignore"):
            return Scale(1 / self.coefficient, self.peak, -self.power)


ONE = Scale(np.ones(1))


@dataclass(frozen=True)
class Quantized:
    """``q * scale``, where q is x quantised per token to -127..127."""

    x: ir.Value
    peak: Peak
    scale: Scale


def is_rounded(value: ir.Value | None) -> bool:
    """Whether a Round lies just before ``value``: it may be a quantised activation."""
    waiting = [(value, 0)]
    while waiting:
        current, depth = waiting.pop()
        node = current.producer() if current is not None else None
        if node is None or node.domain or depth > _DEPTH:
            continue
        if node.op_type == "Round":
            return True
        if node.op_type in ("Clip", "Cast", "CastLike", "Identity"):
            waiting.append((node.inputs[0], depth + 1))
        elif node.op_type in ("Mul", "Div", "Min", "Max"):
            # The operand that shrinks to one number a row is the scale, which rounds nothing.
            waiting += [(operand, depth + 4) for operand in node.inputs]
    return False


def quantized(value: ir.Value | None) -> Quantized:
    """Read ``value`` as a quantised activation; raises Unlike."""
    top, scale = value, ONE
    node = plain(value).producer() if value is not None else None
    if node is not None and edit.is_op(node, "Div") and is_rounded(node.inputs[0]):
        top, scale = node.inputs[0], scale_of(node.inputs[1]).inverse()
    elif node is not None and edit.is_op(node, "Mul"):
        for one, other in (node.inputs, tuple(reversed(node.inputs))):
            if is_rounded(one):
                top, scale = one, scale_of(other)
                break
    x, peak = _rounded(top)
    if scale.peak is not None and scale.peak != peak:
        raise Unlike("it is divided by another scale than it was multiplied by")
    return Quantized(x, peak, replace(scale, peak=peak))


def _rounded(value: ir.Value | None) -> tuple[ir.Value, Peak]:
    """x and its peak, of ``Clip(Round(x * 127 / peak))`` in any order."""
    rounded, current = False, value
    for _ in range(_DEPTH):
        node = current.producer() if current is not None else None
        if node is None or node.domain:
            break
        if node.op_type in ("Cast", "CastLike", "Identity"):
            _check_cast(node, rounded)
        elif node.op_type in ("Clip", "Min", "Max"):
            _check_bounds(node)
        elif node.op_type == "Round":
            rounded = True
        else:
            break
        current = _data(node)
    if not rounded:
        raise Unlike(f"activations come from {edit.describe(value)}, not from per-token rounding")
    return _scaled(current)


def _check_cast(node: ir.Node, rounded: bool) -> None:
    to = node.outputs[0].dtype
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    if node.op_type == "Identity" or source == to:
        return
    if rounded or to not in _EXACT:
        raise Unlike(f"activations are cast to {to.name if to else 'an unknown type'}")


def _data(node: ir.Node) -> ir.Value | None:
    """The operand of Clip, Min, Max, Round or Cast that is no bound."""
    if node.op_type in ("Min", "Max"):
        return next((v for v in node.inputs if constant_value(v) is None), None)
    return node.inputs[0]


def _check_bounds(node: ir.Node) -> None:
    """Raise Unlike if a bound can change what lies in -127..127 already."""
    low, high = -math.inf, math.inf
    if node.op_type == "Clip":
        bounds = [*node.inputs[1:], None, None]
        low = _number(bounds[0], low)
        high = _number(bounds[1], high)
    else:
        bounds = [v for v in node.inputs if constant_value(v) is not None]
        if len(node.inputs) != 2 or len(bounds) != 1:
            raise Unlike(f"{node.op_type} of {len(node.inputs)} values is not a bound")
        bound = _number(bounds[0], math.nan)
        low, high = (bound, high) if node.op_type == "Max" else (low, bound)
    if not (low <= -LEVELS and high >= LEVELS):
        raise Unlike(f"activations are clamped to {low:g}..{high:g}, not to -128..127")


def _number(value: ir.Value | None, default: float) -> float:
    if value is None:
        return default
    data = constant_value(value)
    if data is None or data.size != 1:
        raise Unlike(f"bound {edit.describe(value)} is not one constant")
    return float(data.reshape(()))


def _scaled(value: ir.Value | None) -> tuple[ir.Value, Peak]:
    """x and its peak, of ``x * (127 / peak)`` or ``x / (peak / 127)``."""
    node = plain(value).producer() if value is not None else None
    candidates: list[tuple[ir.Value | None, ir.Value | None, bool]] = []
    if node is not None and edit.is_op(node, "Mul"):
        candidates = [(*node.inputs, False), (*reversed(node.inputs), False)]  # type: ignore[list-item]
    elif node is not None and edit.is_op(node, "Div"):
        candidates = [(*node.inputs, True)]  # type: ignore[list-item]
    reason: Unlike = _NoPeak(
        f"what is rounded comes from {edit.describe(value)}, not from x times a scale of its row"
    )
    for x, factor, divides in candidates:
        try:
            scale = scale_of(factor)
        except _NoPeak:
            continue
        except Unlike as unlike:
            reason = unlike
            continue
        if x is not None and scale.peak is not None:
            return _same_row(plain(x), scale.inverse() if divides else scale)
    raise reason


def _same_row(x: ir.Value, scale: Scale) -> tuple[ir.Value, Peak]:
    """x and its peak, if ``x * scale`` is what BitLinear rounds."""
    if x.dtype != ir.DataType.FLOAT:
        raise Unlike(f"x is {x.dtype.name if x.dtype else 'of an unknown type'}, not FLOAT")
    peak = scale.peak
    if peak is None or peak.x is not x:
        other = peak.x.name if peak is not None else "nothing"
        raise Unlike(f"{x.name!r} is scaled by the largest magnitude of {other!r}")
    if scale.power != -1:
        raise Unlike(f"x is scaled by the largest magnitude to the power of {scale.power}")
    if peak.floor is None:
        raise Unlike("the largest magnitude has no floor; BitLinear's is 1e-05")
    if not math.isclose(peak.floor, float(AMAX_FLOOR), rel_tol=1e-5):
        raise Unlike(f"the largest magnitude has floor {peak.floor:g}; BitLinear's is 1e-05")
    if scale.coefficient.size != 1 or not math.isclose(scale.coefficient[0], LEVELS, rel_tol=1e-6):
        raise Unlike(f"the largest magnitude becomes {scale.coefficient[0]:g}, not {LEVELS}")
    return x, peak


def scale_of(value: ir.Value | None, depth: int = 0) -> Scale:
    """Read ``value`` as constants times a power of one peak; raises Unlike."""
    known = constant_value(value)
    if known is not None:
        return Scale(columns(known))
    node = plain(value).producer() if value is not None else None
    if node is None or node.domain or depth > _DEPTH:
        raise _NoPeak(f"{edit.describe(value)} is no scale")
    match node.op_type:
        case "Mul":
            return scale_of(node.inputs[0], depth + 1).times(scale_of(node.inputs[1], depth + 1))
        case "Div":
            bottom = scale_of(node.inputs[1], depth + 1)
            return scale_of(node.inputs[0], depth + 1).times(bottom.inverse())
        case "Reciprocal":
            return scale_of(node.inputs[0], depth + 1).inverse()
        case "Clip" | "Max":
            return _floored(node, depth)
        case "Add":
            _refuse_added(node, depth)
        case "ReduceMax" | "Unsqueeze":
            return Scale(np.ones(1), Peak(_largest_magnitude(node)), 1)
    raise _NoPeak(f"{edit.describe(value)} is no scale")


def columns(data: Array) -> npt.NDArray[np.float64]:
    """A constant that is one number, or one a column: flat, float64; raises Unlike."""
    if data.dtype.kind not in "fiu" and data.dtype.name != "bfloat16":
        raise _NoPeak(f"a constant of type {data.dtype} is no scale")
    if data.size == 0 or data.size != (data.shape[-1] if data.ndim else 1):
        raise _NoPeak(f"a constant of shape {list(data.shape)} is no scale of columns")
    return np.asarray(data, np.float64).reshape(-1)


def _floored(node: ir.Node, depth: int) -> Scale:
    """``max(scale, floor)``, as a floor of the peak."""
    data = _data(node)
    inner = scale_of(data, depth + 1)
    if inner.peak is None:
        raise _NoPeak(f"{node.op_type} is no scale")
    bounds = [v for v in node.inputs if v is not None and v is not data]
    low = node.inputs[1] if node.op_type == "Clip" else (bounds[0] if bounds else None)
    floor = _number(low, -math.inf)
    if node.op_type == "Clip" and len(node.inputs) > 2:
        high = _number(node.inputs[2], math.inf)
        if high < float(np.finfo(np.float32).max):
            raise Unlike(f"the largest magnitude is clamped to {high:g}")
    if inner.power != 1 or inner.coefficient.size != 1 or inner.coefficient[0] <= 0:
        raise Unlike("the scale is clamped, not the largest magnitude")
    if inner.peak.floor is not None:
        raise Unlike("the largest magnitude has two floors")
    return replace(inner, peak=replace(inner.peak, floor=floor / float(inner.coefficient[0])))


def _refuse_added(node: ir.Node, depth: int) -> None:
    for one, other in (node.inputs, tuple(reversed(node.inputs))):
        added = constant_value(other)
        if added is not None and added.size == 1 and scale_of(one, depth + 1).peak is not None:
            raise Unlike(
                f"{float(added.reshape(())):g} is added to the largest magnitude; BitLinear "
                "takes 1e-05 as its floor"
            )


def _largest_magnitude(node: ir.Node) -> ir.Value:
    """x of ``ReduceMax(Abs(x), -1)``, its dimension kept; raises Unlike."""
    kept, reduce = False, node
    if node.op_type == "Unsqueeze":
        before = edit.made_by(node.inputs[0], "ReduceMax")
        if before is None or not _last(node, node.outputs[0]):
            raise _NoPeak("Unsqueeze is no scale")
        kept, reduce = True, before
    source = reduce.inputs[0]
    magnitude = edit.made_by(plain(source), "Abs") if source is not None else None
    if magnitude is None or magnitude.inputs[0] is None:
        raise Unlike(f"the largest value is that of {edit.describe(source)}, not of a magnitude")
    if not _last(reduce, source):
        raise Unlike("the largest magnitude is not that of each row: it is not over axis -1 alone")
    if bool(reduce.attributes.get_int("keepdims", 1)) == kept:
        raise Unlike("the largest magnitude's axis is not kept as one of size 1")
    return plain(magnitude.inputs[0])


def _last(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether ``node`` works on the last axis of ``value`` alone."""
    axes = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size != 1:
        return False
    axis = int(axes.reshape(()))
    shape = value.shape if value is not None else None
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def plain(value: ir.Value) -> ir.Value:
    """``value`` before nodes that change nothing: Identity, and Cast to the same type."""
    while (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if node.domain or node.op_type not in ("Identity", "Cast", "CastLike") or source is None:
            break
        if node.op_type != "Identity" and (source.dtype is None or source.dtype != value.dtype):
            break
        value = source
    return value
