"""Target x86: x86-64 Linux, one plugin with AVX-512, AVX-VNNI, AVX2 and portable kernels."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitcompile.packing import CPU_TILE, T5_TILE
from bitcompile.target import Kernel, Target
from bitcompile.targets.machine import cpu_flags, last_level_cache
from bitcompile.targets.toolchain import missing_build_tools

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa

TRIPLE = "x86_64-linux-gnu.2.17"
"""glibc 2.17 (2012): every Linux that onnxruntime supports."""
NAMES = ("avx512-vbmi", "avx512-vnni", "avx-vnni", "avx2", "portable")
LIBRARY = "libbitcompile_ops.so"
LAYOUTS = (CPU_TILE.id, T5_TILE.id)
T5_NEEDS = {"avx512vbmi", "avx512_vnni"}
"""As Linux names them."""


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir import presets
    from bitcompile.targets.tir.plugin import build_plugin, cache_dir, kernel_table

    schedules = presets.for_this_cpu(cache_dir() / presets.NAME)

    def isas() -> Sequence[Isa]:
        from bitcompile.targets.tir.x86 import ISAS

        return presets.tuned(ISAS, schedules)

    library = build_plugin(isas, TRIPLE, LAYOUTS, LIBRARY, "cpu_x86.c", schedules=schedules)
    return library, kernel_table(NAMES, LAYOUTS)


def _auto_layout(size: int) -> tuple[str, str]:
    """t5 where this CPU decodes it fast and weights come from memory, else i2."""
    cache = last_level_cache()
    if not T5_NEEDS.issubset(cpu_flags()):
        return CPU_TILE.id, "t5 is fast with AVX-512 VBMI and VNNI, which this CPU has not"
    if size <= cache:
        return CPU_TILE.id, f"{size >> 20} MiB of weights fit the {cache >> 20} MiB of cache"
    return T5_TILE.id, f"{size >> 20} MiB of weights exceed the {cache >> 20} MiB of cache"


def _can_run_here() -> str | None:
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return None
    return f"needs x86-64 Linux; this is {platform.machine()} {platform.system()}"


X86 = Target(
    name="x86",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=LAYOUTS,
    library=LIBRARY,
    emits="ONNX Runtime plugin (.so) for x86-64 Linux, glibc 2.17 or newer",
    compile=_compile,
    can_run_here=_can_run_here,
    can_build_here=missing_build_tools,
    auto_layout=_auto_layout,
)
