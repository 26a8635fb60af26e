"""BitGLU: a whole gated feed-forward network with ternary projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitcompile import numerics
from bitcompile.custom_ops import bit_linear, bodies
from bitcompile.opset import Attribute, Input, OpDef, Shape, Weight, is_absent


def _reference(inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> numerics.F32:
    F, eps = int(attributes["F"]), float(attributes["eps"])
    gate_up, down = BIT_GLU.weights
    normed = numerics.rms_norm(inputs["x"], inputs["gamma_in"], eps)
    both = bit_linear.product(normed, gate_up, inputs, attributes)
    hidden = numerics.ACTIVATIONS[str(attributes["activation"])](both[..., :F]) * both[..., F:]
    if attributes["sub_norm"]:
        hidden = numerics.rms_norm(hidden, inputs["gamma_sub"], eps)
    y = bit_linear.product(hidden, down, inputs, attributes)
    if not is_absent(inputs["residual"]):
        y = y + inputs["residual"]
    return y.astype(np.float32)


def _shape(inputs: Mapping[str, Shape], attributes: Mapping[str, Attribute]) -> Shape:
    return (*inputs["x"][:-1], int(attributes["N"]))


_ACTIVATION_BODIES = {
    "relu2": "  a_pos = Relu (gate)\n  act = Mul (a_pos, a_pos)\n",
    "silu": (
        bodies.constant("a_one", 1.0) + "  a_neg = Neg (gate)\n"
        "  a_exp = Exp (a_neg)\n"
        "  a_den = Add (a_one, a_exp)\n"
        "  act = Div (gate, a_den)\n"
    ),
    "gelu_tanh": '  act = Gelu <approximate: string = "tanh"> (gate)\n',
    "gelu_erf": '  act = Gelu <approximate: string = "none"> (gate)\n',
}


def _body(attributes: Mapping[str, Attribute]) -> str:
    """BitGLU through the functions of NormBitLinear and BitLinear, which are attached beside it."""
    shared = "layout: string = @layout, group_size: int = @group_size, act_bits: int = @act_bits"
    second = "NormBitLinear" if attributes["sub_norm"] else "BitLinear"
    gamma = "gamma_sub, " if attributes["sub_norm"] else ""
    eps = ", eps: float = @eps" if attributes["sub_norm"] else ""
    text = (
        bodies.constant("g_none", 0.0)
        + f"  both = bitcompile.NormBitLinear <K: int = @K, N: int = @F2, {shared},"
        " eps: float = @eps> (x, gamma_in, w_gate_up, s_gate_up, g_none, g_none)\n"
        "  gate, up = Split <axis: int = -1, num_outputs: int = 2> (both)\n"
        + _ACTIVATION_BODIES[str(attributes["activation"])]
        + "  hidden = Mul (act, up)\n"
        f"  y = bitcompile.{second} <K: int = @F, N: int = @N, {shared}{eps}>"
        f" (hidden, {gamma}w_down, s_down, g_none, residual)\n"
    )
    return bodies.function(
        "BitGLU", [i.name for i in BIT_GLU.inputs], list(BIT_GLU.attributes), text
    )


BIT_GLU = OpDef(
    name="BitGLU",
    doc="norm, quantise once, gate and up, act(gate) * up, optional sub-norm, quantise, down",
    inputs=(
        bit_linear.X,
        Input("gamma_in", "float", "weight of the norm before the network [K]"),
        Input("w_gate_up", "uint8", "packed gate rows, then up rows [2F, K]"),
        Input("s_gate_up", "float", "their scales [2F, 1]"),
        Input("gamma_sub", "float", "weight of the norm before down [F]", optional=True),
        Input("w_down", "uint8", "packed [N, F]"),
        Input("s_down", "float", "its scales [N, 1]"),
        bit_linear.RESIDUAL,
    ),
    attributes={
        **bit_linear.ATTRIBUTES,
        "F": None,
        "F2": None,
        "eps": None,
        "activation": None,
        "sub_norm": None,
    },
    reference=_reference,
    output_shape=_shape,
    body=_body,
    structural=("layout", "group_size", "activation", "sub_norm"),
    weights=(
        Weight("w_gate_up", "s_gate_up", "F2", "K"),
        Weight("w_down", "s_down", "N", "F"),
    ),
)
