"""Target opencl: any OpenCL 1.2 device. mali and adreno are the same with schedules of their own.

The plugin also holds its host's CPU kernels, which read the same weights: they take what the
device is not given (``--offload``), and everything where there is none (``--fallback``).
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitcompile import calibration
from bitcompile.packing import CPU_TILE
from bitcompile.runtime import host_mismatch
from bitcompile.target import Kernel, Target
from bitcompile.targets import android, arm, x86
from bitcompile.targets.tir.opencl.schedule import Schedule, Schedules
from bitcompile.targets.toolchain import missing_build_tools

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa
    from bitcompile.targets.tir.linking import System

LIBRARY = "libbitcompile_ops.so"
CHOICES = {"offload": ("auto", "prefill", "all", "none"), "fallback": ("cpu", "none")}


@dataclass(frozen=True)
class Host:
    """A system whose processor loads the plugin, and the CPU kernels it gets there."""

    isas: Callable[[], Sequence[Isa]]
    names: tuple[str, ...]
    features: str
    """The C file that knows the CPU's features."""
    system: Callable[[], System]
    guide: tuple[str, ...] = ("python", "genai", "c", "opencl")
    choosing: str = "calibrate"
    """Section of an artifact's README about the choice between CPU and device."""
    embeds: Callable[[Path], Mapping[str, Path]] = x86.X86.embeds


def _x86() -> Sequence[Isa]:
    from bitcompile.targets.tir.x86 import ISAS

    return ISAS


def _arm() -> Sequence[Isa]:
    from bitcompile.targets.tir.arm import ISAS

    return ISAS


def _linux() -> System:
    from bitcompile.targets.tir.linking import LINUX

    return LINUX


def _android() -> System:
    from bitcompile.targets.tir.linking import ANDROID

    return ANDROID


HOSTS: Mapping[str, Host] = {
    x86.TRIPLE: Host(_x86, x86.NAMES, "cpu_x86.c", _linux),
    arm.TRIPLE: Host(_arm, arm.NAMES, "cpu_arm.c", _linux),
    android.TRIPLE: Host(
        _arm,
        arm.NAMES,
        "cpu_arm.c",
        _android,
        ("android", "c_static", "opencl_android"),
        "calibrate_android",
        android.ANDROID.embeds,
    ),
}


def opencl_target(
    name: str,
    schedules: Schedules,
    triple: str,
    emits: str,
    chosen: Mapping[str, str] | None = None,
) -> Target:
    """A target of this family for the host ``triple``, with some of CHOICES chosen."""
    host = HOSTS[triple]
    made = {option: values[0] for option, values in CHOICES.items()} | dict(chosen or {})
    cpu = made["fallback"] == "cpu"
    layouts = (CPU_TILE.id,)

    def compile() -> tuple[Path, tuple[Kernel, ...]]:
        from bitcompile.targets.tir.opencl.plugin import device_code, kernel_table
        from bitcompile.targets.tir.plugin import build_plugin
        from bitcompile.targets.tir.plugin import kernel_table as cpu_table

        code = device_code(name, schedules, made["offload"], cpu)
        isas = host.isas if cpu else tuple
        library = build_plugin(isas, triple, layouts, LIBRARY, host.features, host.system(), code)
        return library, kernel_table(name) + (cpu_table(host.names, layouts) if cpu else ())

    return Target(
        name=name,
        device="opencl",
        host=triple,
        isas=(name, *(host.names if cpu else ())),
        layouts=layouts,
        library=LIBRARY,
        emits=emits,
        compile=compile,
        can_run_here=lambda: host_mismatch(triple) or _missing_driver(),
        can_build_here=missing_build_tools,
        embeds=lambda library: {**host.embeds(library), **(_program(library) if cpu else {})},
        texts=lambda graph: (
            {calibration.FILE: calibration.nodes(graph, name, LIBRARY)} if cpu else {}
        ),
        guide=(*host.guide, *((host.choosing,) if cpu else ())),
        hosts=tuple(other for other in HOSTS if other != triple),
        choices=CHOICES,
        vary=lambda other, choices: opencl_target(name, schedules, other, emits, choices),
    )


def _program(library: Path) -> Mapping[str, Path]:
    return {calibration.PROGRAM: library.with_name(calibration.PROGRAM)}


def _missing_driver() -> str | None:
    """None if this machine has an OpenCL loader."""
    if ctypes.util.find_library("OpenCL"):
        return None
    return "no OpenCL driver (libOpenCL.so): install the GPU's driver, or pocl-opencl-icd"


# No assumption about the device: 4 neighbouring items read 64 neighbouring bytes. As many slices of
# K as a work-group has room for: on a GPU with many cores an item's walk along K is what takes time
# (docs/opencl.md has the measurement).
SCHEDULES = Schedules(
    decode=Schedule(rows=4, tiles=1, slices=64),
    prefill=Schedule(rows=4, tiles=4, batch=4, blocks=4),
)

OPENCL = opencl_target(
    "opencl",
    SCHEDULES,
    x86.TRIPLE,
    "ONNX Runtime plugin (.so) with OpenCL and CPU kernels for Linux and Android",
)
