"""Target mali: Arm Mali and Immortalis GPUs, in Android apps."""

from __future__ import annotations

from bitcompile.targets import android
from bitcompile.targets.opencl import opencl_target
from bitcompile.targets.tir.opencl.schedule import Schedule, Schedules

# Local memory is ordinary cached memory there: none, but for the sum over a work-group. An item
# reads 16 bytes, 64 weights, at a time (Arm Mali GPU OpenCL Developer Guide, "Kernel code").
SCHEDULES = Schedules(
    decode=Schedule(rows=4, tiles=1, slices=16),
    prefill=Schedule(rows=4, tiles=4, batch=4, blocks=4),
)

MALI = opencl_target(
    "mali",
    SCHEDULES,
    android.TRIPLE,
    "ONNX Runtime plugin (.so, .a) with OpenCL kernels for Mali, and CPU kernels",
)
