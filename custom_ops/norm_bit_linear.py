"""NormBitLinear: RMSNorm (a pre-norm or a sub-layer norm) and BitLinear in one read of x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitcompile import numerics
from bitcompile.custom_ops import bit_linear, bodies
from bitcompile.opset import Attribute, Input, OpDef

GAMMA = Input("gamma", "float", "weight of the norm [K]")


def _reference(inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> numerics.F32:
    normed = numerics.rms_norm(inputs["x"], inputs["gamma"], float(attributes["eps"]))
    return bit_linear.linear_reference(normed, inputs, attributes)


def _body(attributes: Mapping[str, Attribute]) -> str:
    names = [i.name for i in NORM_BIT_LINEAR.inputs]
    text = bodies.rms_norm() + bodies.linear_body(attributes, x="normed")
    return bodies.function("NormBitLinear", names, (*bodies.LINEAR_ATTRIBUTES, "eps"), text)


NORM_BIT_LINEAR = OpDef(
    name="NormBitLinear",
    doc="BitLinear of RMSNorm(x, gamma, eps)",
    inputs=(
        bit_linear.X,
        GAMMA,
        bit_linear.W,
        bit_linear.W_SCALE,
        bit_linear.BIAS,
        bit_linear.RESIDUAL,
    ),
    attributes={**bit_linear.ATTRIBUTES, "eps": None},
    reference=_reference,
    output_shape=bit_linear.linear_shape,
    body=_body,
    structural=("layout", "group_size"),
    weights=(bit_linear.W_OF_LINEAR,),
)
