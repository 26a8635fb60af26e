"""HeadLinear: the language-model head on the quantised table the embedding also reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitcompile import numerics
from bitcompile.custom_ops import bodies
from bitcompile.opset import Attribute, Input, OpDef, Shape

BLOCK = 128
"""Weights per scale: whole 64-byte chunks at 8 and 4 bits, 3 % and 6 % of scales."""


def _reference(inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> numerics.F32:
    bits = int(attributes["bits"])
    return numerics.head_matmul(inputs["x"], inputs["table"], inputs["scale"], bits)


def _shape(inputs: Mapping[str, Shape], attributes: Mapping[str, Attribute]) -> Shape:
    return (*inputs["x"][:-1], int(attributes["N"]))


def _codes(bits: int) -> str:
    """``h_codes``: signed table values, float ``[V, B, block]``."""
    zero = 1 << (bits - 1)
    if bits == 8:
        return bodies.constant("h_zero", float(zero)) + (
            "  h_f = Cast <to: int = 1> (table)\n  h_codes = Sub (h_f, h_zero)\n"
        )
    return (
        bodies.constant("h_zero", float(zero))
        + bodies.constant("h_nibble", 16)
        + bodies.constant("h_last", [-1])
        + bodies.constant("h_block", [0, 0, -1])
        + "  h_16 = Cast <to: int = 6> (h_nibble)\n"
        "  h_i = Cast <to: int = 6> (table)\n"
        "  h_lo1 = Mod (h_i, h_16)\n"
        "  h_hi1 = Div (h_i, h_16)\n"
        "  h_lo = Unsqueeze (h_lo1, h_last)\n"
        "  h_hi = Unsqueeze (h_hi1, h_last)\n"
        "  h_pair = Concat <axis: int = -1> (h_lo, h_hi)\n"
        "  h_flat = Reshape (h_pair, h_block)\n"
        "  h_f = Cast <to: int = 1> (h_flat)\n"
        "  h_codes = Sub (h_f, h_zero)\n"
    )


def _body(attributes: Mapping[str, Attribute]) -> str:
    """The head in float32 with the kernel's 15-bit activations.

    A stock runtime folds the dequantised table to 4 bytes a weight.
    """
    text = (
        bodies.quantize(float(numerics.HEAD_LIMIT))
        + _codes(int(attributes["bits"]))
        + bodies.constant("h_rows", [0, -1])
        + bodies.constant("h_start", [0])
        + bodies.constant("h_cols", [1])
        + "  h_values = Mul (h_codes, scale)\n"
        "  h_table = Reshape (h_values, h_rows)\n"
        "  h_k = Constant <value_int: int = @K> ()\n"
        "  h_k1 = Unsqueeze (h_k, h_start)\n"
        "  h_cut = Slice (h_table, h_start, h_k1, h_cols)\n"
        "  h_t = Transpose <perm: ints = [1, 0]> (h_cut)\n"
        "  h_y = MatMul (xq, h_t)\n"
        "  y = Div (h_y, s)\n"
    )
    names = [i.name for i in HEAD_LINEAR.inputs]
    return bodies.function("HeadLinear", names, list(HEAD_LINEAR.attributes), text)


HEAD_LINEAR = OpDef(
    name="HeadLinear",
    doc="logits of x against a blockwise 8- or 4-bit table, read in place",
    inputs=(
        Input("x", "float", "hidden states [..., K]"),
        Input("table", "uint8", "codes [N, B, block * bits / 8], B = ceil(K / block)"),
        Input("scale", "float", "scale of each block [N, B, 1], the shape the embedding takes too"),
    ),
    attributes={"K": None, "N": None, "bits": None, "block": BLOCK},
    reference=_reference,
    output_shape=_shape,
    body=_body,
    structural=("bits",),
)
