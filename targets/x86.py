"""Target x86: x86-64 Linux, one plugin with AVX-512, AVX-VNNI, AVX2 and portable kernels."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitcompile.packing import CPU_TILE, T5_TILE
from bitcompile.target import Kernel, Target
from bitcompile.targets.toolchain import missing_build_tools

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa

TRIPLE = "x86_64-linux-gnu.2.17"
"""glibc 2.17 (2012): every Linux that onnxruntime supports."""
NAMES = ("avx512-vbmi", "avx512-vnni", "avx-vnni", "avx2", "portable")
LIBRARY = "libbitcompile_ops.so"


def _isas() -> Sequence[Isa]:
    from bitcompile.targets.tir.x86 import ISAS

    return ISAS


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.plugin import build_plugin, kernel_table

    library = build_plugin(_isas, TRIPLE, LIBRARY, "cpu_x86.c")
    return library, kernel_table(NAMES)


def _can_run_here() -> str | None:
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return None
    return f"needs x86-64 Linux; this is {platform.machine()} {platform.system()}"


X86 = Target(
    name="x86",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=(CPU_TILE.id, T5_TILE.id),
    library=LIBRARY,
    emits="ONNX Runtime plugin (.so) for x86-64 Linux, glibc 2.17 or newer",
    compile=_compile,
    can_run_here=_can_run_here,
    can_build_here=missing_build_tools,
)
