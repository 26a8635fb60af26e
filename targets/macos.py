"""Target macos: Apple silicon."""

from __future__ import annotations

from pathlib import Path

from bitcompile.packing import CPU_TILE
from bitcompile.runtime import host_mismatch
from bitcompile.target import Kernel, Target
from bitcompile.targets.arm import NAMES, compile_arm, header_and_archive
from bitcompile.targets.toolchain import missing_build_tools

TRIPLE = "aarch64-macos.11.0"
"""macOS 11: the first on Apple silicon."""
LIBRARY = "libbitcompile_ops.dylib"


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.linking import MACOS as SYSTEM

    return compile_arm(TRIPLE, LIBRARY, SYSTEM)


MACOS = Target(
    name="macos",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=(CPU_TILE.id,),
    library=LIBRARY,
    emits="ONNX Runtime plugin (.dylib, .a) for macOS 11 or newer on Apple silicon",
    compile=_compile,
    can_run_here=lambda: host_mismatch(TRIPLE),
    can_build_here=missing_build_tools,
    embeds=header_and_archive,
    guide=("python", "genai", "c", "c_static"),
)
