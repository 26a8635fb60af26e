"""The operators of domain ``bitcompile``, one file each."""

from __future__ import annotations

from bitcompile.custom_ops.bit_glu import BIT_GLU
from bitcompile.custom_ops.bit_linear import BIT_LINEAR
from bitcompile.custom_ops.head_linear import HEAD_LINEAR
from bitcompile.custom_ops.norm_bit_linear import NORM_BIT_LINEAR
from bitcompile.opset import OpDef

OPS: dict[str, OpDef] = {op.name: op for op in (BIT_LINEAR, NORM_BIT_LINEAR, BIT_GLU, HEAD_LINEAR)}

__all__ = ["OPS"]
