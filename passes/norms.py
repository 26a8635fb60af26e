"""Reading an RMSNormalization that is to vanish into the operator after it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitcompile.passes import graph as edit


def norm_of(value: ir.Value | None) -> ir.Node | None:
    """The RMSNormalization that computes ``value``, if one does."""
    return edit.made_by(value, "RMSNormalization")


def epsilon(norm: ir.Node) -> float:
    """Its eps, as the float32 it is computed with."""
    return float(np.float32(norm.attributes.get_float("epsilon", 1e-5)))


def over_rows(norm: ir.Node) -> bool:
    """Whether it norms along the last axis alone."""
    shape = norm.inputs[0].shape if norm.inputs[0] is not None else None
    axis = norm.attributes.get_int("axis", -1)
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def unfusable(norm: ir.Node, size: int) -> str | None:
    """Why a norm over rows of ``size`` cannot vanish into its user; None if it can."""
    if (reason := edit.shared(norm.outputs[0])) is not None:
        return f"the normalised {reason}"
    if not over_rows(norm):
        axis = norm.attributes.get_int("axis", -1)
        return f"RMSNormalization starts at axis {axis}, not at the last"
    gamma = edit.dims(norm.inputs[1])
    if gamma != (size,):
        return f"the norm's weight has shape {gamma}, not ({size},)"
    return None
