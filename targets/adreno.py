"""Target adreno: Qualcomm Adreno GPUs, in Android apps."""

from __future__ import annotations

from bitcompile.targets import android
from bitcompile.targets.opencl import opencl_target
from bitcompile.targets.tir.opencl.schedule import Schedule, Schedules

# Neighbouring items read neighbouring words of a tile, and a work-group keeps its activations
# in the on-chip local memory (Snapdragon OpenCL programming guide, "Local memory").
SCHEDULES = Schedules(
    decode=Schedule(rows=1, tiles=1, slices=8, stage=64),
    prefill=Schedule(rows=2, tiles=8, batch=8, blocks=2, stage=16),
)

ADRENO = opencl_target(
    "adreno",
    SCHEDULES,
    android.TRIPLE,
    "ONNX Runtime plugin (.so, .a) with OpenCL kernels for Adreno, and CPU kernels",
)
