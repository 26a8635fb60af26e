"""Target ios: 64-bit iPhones and iPads, a static library for apps to link."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitcompile.packing import CPU_TILE
from bitcompile.runtime import host_mismatch
from bitcompile.target import Kernel, Target
from bitcompile.targets.arm import NAMES, compile_arm
from bitcompile.targets.toolchain import missing_build_tools

TRIPLE = "aarch64-ios.15.0"
LIBRARY = "libbitcompile_ops.a"


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.linking import IOS as SYSTEM

    return compile_arm(TRIPLE, LIBRARY, SYSTEM)


def _header(_: Path) -> Mapping[str, Path]:
    from bitcompile.targets.tir.linking import CSRC

    return {"include/bitcompile.h": CSRC / "bitcompile.h"}


IOS = Target(
    name="ios",
    device="cpu",
    host=TRIPLE,
    isas=NAMES,
    layouts=(CPU_TILE.id,),
    library=LIBRARY,
    emits="ONNX Runtime plugin as a static library (.a) for iOS 15 or newer",
    compile=_compile,
    can_run_here=lambda: host_mismatch(TRIPLE),
    can_build_here=missing_build_tools,
    embeds=_header,
    guide=("swift", "c_static"),
)
