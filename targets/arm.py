"""Target arm: AArch64 Linux, one plugin with i8mm, dotprod and plain NEON kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitcompile.packing import CPU_TILE
from bitcompile.runtime import host_mismatch
from bitcompile.target import Kernel, Target
from bitcompile.targets.toolchain import missing_build_tools

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa
    from bitcompile.targets.tir.linking import System

TRIPLE = "aarch64-linux-gnu.2.17"
"""glibc 2.17: the first with AArch64."""
NAMES = ("i8mm", "dotprod", "neon")
LIBRARY = "libbitcompile_ops.so"
LAYOUTS = (CPU_TILE.id,)


def _isas() -> Sequence[Isa]:
    from bitcompile.targets.tir.arm import ISAS

    return ISAS


def compile_arm(triple: str, library: str, system: System) -> tuple[Path, tuple[Kernel, ...]]:
    """``Target.compile`` of every AArch64 target."""
    from bitcompile.targets.tir.plugin import build_plugin, kernel_table

    made = build_plugin(_isas, triple, LAYOUTS, library, "cpu_arm.c", system)
    return made, kernel_table(NAMES, LAYOUTS)


def header_and_archive(library: Path) -> Mapping[str, Path]:
    """``Target.embeds`` of targets whose apps may link the plugin into a library of their own."""
    from bitcompile.targets.tir.linking import CSRC
    from bitcompile.targets.tir.plugin import static_library

    archive = static_library(library)
    return {"include/bitcompile.h": CSRC / "bitcompile.h", archive.name: archive}


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.linking import LINUX

    return compile_arm(TRIPLE, LIBRARY, LINUX)


ARM = Target(
    name="arm",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=LAYOUTS,
    library=LIBRARY,
    emits="ONNX Runtime plugin (.so) for AArch64 Linux, glibc 2.17 or newer",
    compile=_compile,
    can_run_here=lambda: host_mismatch(TRIPLE),
    can_build_here=missing_build_tools,
)
