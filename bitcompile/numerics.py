"""The numerics of ternary inference in NumPy: what every kernel must reproduce.

float32 throughout, one rounding per written operation, no fused multiply-add. Integer results are
exact; float results are bit-identical wherever only ``+ - * / sqrt`` and rounding appear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]

_f = np.float32
AMAX_FLOOR = _f(1e-5)
"""Smallest absolute maximum a row is quantised with (transformers, integrations/bitnet.py)."""
HEAD_LIMIT = _f(16256.0)
"""Largest magnitude of a head activation, 127 * 128 (see :func:`quantize_head_activations`)."""


def quantize_activations(x: F32) -> tuple[I8, F32]:
    """Per-token int8 quantisation of ``x`` ``[..., K]``: ``(q int8 [..., K], s float32 [..., 1])``.

    ``r = fl(1 / max(max|x|, 1e-5)); s = fl(r * 127); q = clamp(rint(fl(x * s)), -128, 127)``, half
    to even: what ``127 / t`` computes in torch (BitNet b1.58, arXiv 2402.17764; transformers
    ``ActQuant``). A row that holds NaN or Inf gets ``s = NaN`` and ``q = 0``.
    """
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    safe = np.where(finite, x, _f(0))
    amax = np.maximum(np.abs(safe).max(axis=-1, keepdims=True), AMAX_FLOOR)
    s = (_f(1) / amax) * _f(127)
    q = np.clip(np.rint(safe * s), -128, 127).astype(np.int8)
    return q, np.where(finite, s, _f(np.nan)).astype(np.float32)


def integer_matmul(q: I8, weight: I8) -> I32:
    """``acc[..., n] = sum_k weight[n, k] * q[..., k]``, exact, int32 ``[..., N]``.

    BLAS in floats is exact here: every partial sum is an integer below 2**24 for float32 (K up to
    131,072), below 2**53 for float64.
    """
    wide: type[np.float32] | type[np.float64] = np.float32
    if q.shape[-1] > 1 << 17:
        wide = np.float64
    product: npt.NDArray[Any] = np.matmul(q.astype(wide), weight.astype(wide).T)
    return product.astype(np.int32)


def ternary_matmul(x: F32, weight: I8, w_scale: F32, group_size: int = 0) -> F32:
    """A ternary layer without bias, for x ``[..., K]`` and weight int8 ``[N, K]``.

    With one scale a row, ``w_scale`` float32 ``[N, 1]``:
    ``y[n] = fl(acc[n]) * fl(w_scale[n] / s)``. With one per group of ``group_size`` columns,
    ``[N, G]``: ``y[n] = t[n] * fl(1 / s)``, where ``t[n]`` gathers
    ``fl(w_scale[n, j] * fl(acc[n, j]))`` over the groups j in order.
    """
    q, s = quantize_activations(x)
    scale = np.asarray(w_scale, np.float32)
    if group_size == 0:
        return integer_matmul(q, weight).astype(np.float32) * (scale.reshape(-1) / s)
    total: F32 = np.zeros((*q.shape[:-1], weight.shape[0]), np.float32)
    for j in range(scale.shape[1]):
        span = slice(j * group_size, (j + 1) * group_size)
        acc = integer_matmul(q[..., span], weight[:, span]).astype(np.float32)
        total = np.add(total, scale[:, j] * acc, dtype=np.float32)
    return total * (_f(1) / s)


def pairwise_sum(values: F32) -> F32:
    """Sums ``[..., 1]`` of ``values`` ``[..., K]`` by a binary tree over neighbours.

    ``p[j] = p[2 j] + p[2 j + 1]`` until one is left; a zero is the neighbour of a last value that
    has none. Any aligned power of two of neighbours is a subtree of its own, whatever computes it:
    a vector, a thread, a warp (N. J. Higham, "The accuracy of floating point summation", 1993).
    """
    p = np.asarray(values, np.float32)
    while p.shape[-1] > 1:
        p = np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, p.shape[-1] % 2)])
        p = np.add(p[..., 0::2], p[..., 1::2], dtype=np.float32)
    return p


def rms_norm(x: F32, gamma: F32, eps: float) -> F32:
    """RMSNorm over the last axis, with the summation order fixed.

    ``y = (x * fl(1 / sqrt(fl(total / K) + eps))) * gamma``, where ``total`` is the
    :func:`pairwise_sum` of the squares.
    """
    x = np.asarray(x, np.float32)
    total = pairwise_sum(x * x)
    rstd = _f(1) / np.sqrt(total / _f(x.shape[-1]) + _f(eps))
    y: F32 = (x * rstd) * np.asarray(gamma, np.float32)
    return y


# exp(r) on |r| <= ln(2)/2 + rounding, Cephes expf (netlib.org/cephes, single/expf.c), Horner.
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
LOG2E = 1.44269504088896341
LN2_HI = 0.693359375
LN2_LO = -2.12194440e-4
EXP_MIN, EXP_MAX = -87.0, 88.0


def exp(x: F32) -> F32:
    """exp by range reduction and the Cephes polynomial; the argument is clamped to [-87, 88]."""
    x = np.clip(np.asarray(x, np.float32), _f(EXP_MIN), _f(EXP_MAX))
    n = np.rint(x * _f(LOG2E))
    r = (x - n * _f(LN2_HI)) - n * _f(LN2_LO)
    p = np.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + _f(c)
    y = ((p * (r * r)) + r) + _f(1)
    with np.errstate(invalid="ignore"):
        exponent = (np.nan_to_num(n).astype(np.int32) + 127) << 23
    result: F32 = (y * exponent.view(np.float32)).astype(np.float32)
    return result


def sigmoid_product(x: F32, z: F32) -> F32:
    """``x * sigmoid(z) = x / (1 + exp(-z))``."""
    return x / (_f(1) + exp(-z))


def relu2(x: F32) -> F32:
    """Squared ReLU (arXiv 2109.08668); NaN stays NaN."""
    positive = np.where(x > 0, x, x * _f(0))
    y: F32 = positive * positive
    return y


def silu(x: F32) -> F32:
    """``x * sigmoid(x)`` (arXiv 1702.03118)."""
    return sigmoid_product(x, x)


GELU_TANH_C0, GELU_TANH_C1 = 1.5957691216057308, 0.044715
"""2 * sqrt(2 / pi) and the cubic's factor: ``gelu_tanh(x) = x * sigmoid(C0 * (x + C1 * x**3))``."""


def gelu_tanh(x: F32) -> F32:
    """GELU, tanh form (arXiv 1606.08415), through ``0.5 (1 + tanh u) = sigmoid(2u)``."""
    x = np.asarray(x, np.float32)
    u = (x + ((x * x) * x) * _f(GELU_TANH_C1)) * _f(GELU_TANH_C0)
    return sigmoid_product(x, u)


ERF_P = 0.3275911
ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""erf(z) = 1 - t (a1 + t (a2 + ...)) exp(-z**2), t = 1/(1 + p z): Abramowitz-Stegun 7.1.26."""
SQRT_HALF = 0.70710678118654752


def gelu_erf(x: F32) -> F32:
    """GELU, erf form (arXiv 1606.08415); |error| of the erf below 2e-7."""
    x = np.asarray(x, np.float32)
    z = np.abs(x) * _f(SQRT_HALF)
    t = _f(1) / (_f(1) + z * _f(ERF_P))
    p = np.full_like(t, ERF_COEFFICIENTS[0])
    for c in ERF_COEFFICIENTS[1:]:
        p = p * t + _f(c)
    tail = (p * t) * exp(-(z * z))  # 1 - erf(|x| / sqrt 2)
    half = x * _f(0.5)
    y: F32 = half * np.where(x > 0, _f(2) - tail, tail)
    return y


ACTIVATIONS: dict[str, Callable[[F32], F32]] = {
    "relu2": relu2,
    "silu": silu,
    "gelu_erf": gelu_erf,
    "gelu_tanh": gelu_tanh,
}
"""Gate activations of a gated feed-forward network, by the name an attribute gives."""


def quantize_weight_absmean(weight: F32) -> tuple[I8, np.float32]:
    """Per-tensor absmean ternary quantisation (arXiv 2402.17764): ``(w int8, scale)``.

    ``a = max(mean|W|, 1e-5); w = clamp(rint(W * fl(1 / a)), -1, 1); scale = a``, float32.
    """
    weight = np.asarray(weight, np.float32)
    alpha = np.maximum(np.abs(weight).mean(dtype=np.float32), AMAX_FLOOR)
    w = np.clip(np.rint(weight * (_f(1) / alpha)), -1, 1).astype(np.int8)
    return w, alpha


def quantize_table(table: F32, bits: int, block: int) -> tuple[npt.NDArray[np.uint8], F32]:
    """Blockwise quantisation of an embedding or head table ``[V, K]``.

    Returns ``codes`` uint8 ``[V, B, block * bits / 8]`` with ``B = ceil(K / block)`` and ``scale``
    float32 ``[V, B, 1]``; value = (code - 2**(bits - 1)) * scale. 4-bit codes lie two a byte, low
    nibble first: the form ``com.microsoft::GatherBlockQuantized`` reads. 8-bit scales map the
    largest magnitude to 127; 4-bit ones, where a step is coarse, minimise the squared error.
    """
    V, K = table.shape
    blocks = -(-K // block)
    padded = np.zeros((V, blocks * block), np.float32)
    padded[:, :K] = table
    values = padded.reshape(V, blocks, block)
    if bits == 8:
        scale = np.abs(values).max(axis=-1) / _f(127)
        whole = _rounded(values, scale, 127)
    else:
        whole, scale = _least_squares(values, bits)
    codes = (whole + _f(2 ** (bits - 1))).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return codes, scale[..., None].astype(np.float32)


def _rounded(values: F32, scale: F32, limit: int, lowest: int | None = None) -> F32:
    """``values / scale`` as integers (in float32) from ``lowest`` (default ``-limit``) to limit."""
    safe = np.where(scale == 0, _f(1), scale)
    whole = np.rint(values / safe[..., None])
    clipped: F32 = np.clip(whole, -limit if lowest is None else lowest, limit)
    return clipped


CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
"""Shares of a block's extreme value that the search maps to the end of the integer range."""


def _least_squares(values: F32, bits: int) -> tuple[F32, F32]:
    """Integers and scale of each block ``[..., block]`` with the least squared error found.

    The value of largest magnitude goes to the negative end of the range (which has one integer
    more), clipped by each of ``CLIPS``; the scale is then refitted, ``sum(x q) / sum(q q)``.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    at = np.abs(values).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(values, at, axis=-1)[..., 0]
    best_q = np.zeros_like(values)
    best_scale = np.zeros_like(extreme)
    best_gain = np.zeros_like(extreme)
    for clip in CLIPS:
        q = _rounded(values, extreme * _f(clip / low), high, low)
        product = np.einsum("...k,...k->...", values, q)
        square = np.maximum(np.einsum("...k,...k->...", q, q), _f(1))
        gain = product * product / square  # error = sum(x x) - gain
        better = gain > best_gain
        best_q = np.where(better[..., None], q, best_q)
        best_scale = np.where(better, product / square, best_scale)
        best_gain = np.where(better, gain, best_gain)
    return best_q, best_scale


def table_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Signed integer values ``[V, B, block]`` of a table from :func:`quantize_table`."""
    if bits == 4:
        pairs = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1)
    return codes.astype(np.int32) - (1 << (bits - 1))


def quantize_head_activations(x: F32) -> tuple[I32, F32]:
    """15-bit quantisation of head activations ``[..., K]``: ``(q int32, s float32 [..., 1])``.

    ``r = fl(1 / max(max|x|, 1e-5)); s = fl(r * 16256); q = rint(fl(x * s))``. A kernel splits
    ``q = 128 hi + lo`` into two int8 values, so that logits carry the table's error alone and the
    product stays exact in int32. A row that holds NaN or Inf gets ``s = NaN``, ``q = 0``.
    """
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    safe = np.where(finite, x, _f(0))
    amax = np.maximum(np.abs(safe).max(axis=-1, keepdims=True), AMAX_FLOOR)
    s = (_f(1) / amax) * HEAD_LIMIT
    q = np.rint(safe * s).astype(np.int32)
    return q, np.where(finite, s, _f(np.nan)).astype(np.float32)


HEAD_LANES = 16
"""Partial sums of a head row: lane l takes the bytes whose index modulo 64 is in [4l, 4l + 4)."""


def head_matmul(x: F32, codes: npt.NDArray[np.uint8], scale: F32, bits: int) -> F32:
    """``y[..., v] = (1 / s) * sum_b scale[v, b] * sum_k q[..., b, k] * (code[v, b, k] - zero)``.

    Each block's sums are exact integers in 16 lanes; lanes gather ``fl(scale * fl(acc))`` over the
    blocks in order and are joined by halving (8, 4, 2, 1).
    """
    q, s = quantize_head_activations(x)
    values = table_codes(codes, bits)
    V, B, block = values.shape
    q = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, B * block - q.shape[-1])])
    chunk = 64 * 8 // bits  # weights in 64 bytes
    lanes = (-1, block // chunk, HEAD_LANES, chunk // HEAD_LANES)
    rows = q.reshape(-1, B, block)
    f = np.zeros((rows.shape[0], V, HEAD_LANES), np.float32)
    for b in range(B):
        product = np.einsum(
            "mclj,vclj->mvl",
            rows[:, b].astype(np.float64).reshape(lanes),
            values[:, b].astype(np.float64).reshape(lanes),
            optimize=True,
        )
        f = f + scale[None, :, b] * product.astype(np.float32)
    h = HEAD_LANES
    while h > 1:
        h //= 2
        f = f[..., :h] + f[..., h:]
    y = f[..., 0].reshape(*q.shape[:-1], V)
    return (y * (_f(1) / s)).astype(np.float32)
