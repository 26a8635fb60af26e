"""Target android: arm64-v8a, API level 24 and newer, 4 and 16 KiB pages, without an NDK."""

from __future__ import annotations

from pathlib import Path

from bitcompile.packing import CPU_TILE
from bitcompile.runtime import host_mismatch
from bitcompile.target import Kernel, Target
from bitcompile.targets.arm import NAMES, compile_arm, header_and_archive
from bitcompile.targets.toolchain import missing_build_tools

TRIPLE = "aarch64-linux-android.24"
"""API level 24 (Android 7): the oldest that onnxruntime-android supports."""
LIBRARY = "libbitcompile_ops.so"


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.linking import ANDROID as SYSTEM

    return compile_arm(TRIPLE, LIBRARY, SYSTEM)


ANDROID = Target(
    name="android",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=(CPU_TILE.id,),
    library=LIBRARY,
    emits="ONNX Runtime plugin (.so, .a) for Android arm64-v8a, API level 24 or newer",
    compile=_compile,
    can_run_here=lambda: host_mismatch(TRIPLE),
    can_build_here=missing_build_tools,
    embeds=header_and_archive,
    guide=("android", "c_static"),
)
