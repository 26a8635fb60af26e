"""What ``custom_ops/csrc/cuda_launch.h`` launches, for ctypes."""

from __future__ import annotations

import ctypes

NO_GATE = -1
GATES = ("relu2", "silu", "gelu_tanh", "gelu_erf")
"""In the order of the operators' numbers."""


class LinearJob(ctypes.Structure):
    """``bc_linear``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "gamma", "w", "w_scale", "bias", "residual", "y")),
        *((name, ctypes.c_int32) for name in
          ("M", "N", "K", "type_x", "type_y", "gate_in", "gate_out", "group_size")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("early", "quantised", "step", "tile", "split")),
    ]  # fmt: skip


class TableJob(ctypes.Structure):
    """``bc_table``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "table", "scale", "y")),
        *((name, ctypes.c_int32) for name in ("M", "V", "K", "type_x", "bits", "block", "early")),
    ]  # fmt: skip
