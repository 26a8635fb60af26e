"""BitLinear: per-token int8 quantisation, ternary matrix product, rescaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitcompile import numerics
from bitcompile.custom_ops.bodies import LINEAR_ATTRIBUTES, function, linear_body
from bitcompile.opset import Attribute, Input, OpDef, Shape, Weight, is_absent
from bitcompile.packing import layout

W_DOC = "packed ternary weight of [N, K] in attribute `layout`"
X = Input("x", "float", "activations [..., K]")
W = Input("w", "uint8", W_DOC)
W_SCALE = Input("w_scale", "float", "scale of each weight row and group of columns")
BIAS = Input("bias", "float", "[N]", optional=True)
RESIDUAL = Input("residual", "float", "[..., N], added last", optional=True)

W_OF_LINEAR = Weight("w", "w_scale", "N", "K")

ATTRIBUTES: Mapping[str, Attribute | None] = {
    "K": None,
    "N": None,
    "layout": "i2",
    "group_size": 0,
    "act_bits": 8,
}


def product(
    x: Any, weight: Weight, inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]
) -> numerics.F32:
    """``ternary_matmul`` of float32 ``x`` ``[..., K]`` with one of a node's weights."""
    N, K = weight.shape(attributes)
    size = int(attributes.get("group_size", 0))
    packing = layout(str(attributes["layout"]))
    codes = packing.decode(inputs[weight.data], N, K)
    scale = packing.decode_scale(inputs[weight.scale], N, K, size)
    return numerics.ternary_matmul(x, codes.astype(np.int8) - np.int8(1), scale, size)


def linear_reference(
    x: Any, inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]
) -> numerics.F32:
    """Product, bias and residual of a node whose (normed) input is ``x``."""
    y = product(x, W_OF_LINEAR, inputs, attributes)
    if not is_absent(inputs["bias"]):
        y = y + inputs["bias"]
    if not is_absent(inputs["residual"]):
        y = y + inputs["residual"]
    return y.astype(np.float32)


def linear_shape(inputs: Mapping[str, Shape], attributes: Mapping[str, Attribute]) -> Shape:
    """``[..., N]`` for x ``[..., K]``."""
    return (*inputs["x"][:-1], int(attributes["N"]))


def _reference(inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> numerics.F32:
    return linear_reference(inputs["x"], inputs, attributes)


def _body(attributes: Mapping[str, Attribute]) -> str:
    names = [i.name for i in BIT_LINEAR.inputs]
    return function("BitLinear", names, LINEAR_ATTRIBUTES, linear_body(attributes))


BIT_LINEAR = OpDef(
    name="BitLinear",
    doc="y = fl(acc) * fl(w_scale / s) + bias + residual, acc = w q in int32 (BitNet b1.58)",
    inputs=(X, W, W_SCALE, BIAS, RESIDUAL),
    attributes=ATTRIBUTES,
    reference=_reference,
    output_shape=linear_shape,
    body=_body,
    structural=("layout", "group_size"),
    weights=(W_OF_LINEAR,),
)
