"""Target cuda: NVIDIA GPUs from Ampere on, through ONNX Runtime's CUDA provider on x86-64 Linux."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bitcompile.cuda_driver import Card
from bitcompile.errors import ToolchainError
from bitcompile.packing import CUDA_TILE
from bitcompile.target import Kernel, Target
from bitcompile.targets.toolchain import missing_build_tools
from bitcompile.targets.x86 import LIBRARY, TRIPLE


def _compile() -> tuple[Path, tuple[Kernel, ...]]:
    from bitcompile.targets.tir.cuda.plugin import build_plugin, kernel_table

    return build_plugin(TRIPLE, LIBRARY), kernel_table()


def _can_run_here() -> str | None:
    try:
        Card()
    except ToolchainError as error:
        return str(error)
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return "needs onnxruntime-gpu in the place of onnxruntime"


def _can_build_here() -> str | None:
    from bitcompile.targets.tir.cuda.compiler import missing_compiler

    return missing_build_tools() or missing_compiler()


def _vary(triple: str, choices: Mapping[str, str]) -> Target:
    return replace(CUDA, activations=choices.get("activations", CUDA.activations))


CUDA = Target(
    name="cuda",
    device="cuda",
    host=TRIPLE,
    isas=("sm_90a", "sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_120", "compute_80"),
    layouts=(CUDA_TILE.id,),
    library=LIBRARY,
    emits="ONNX Runtime CUDA plugin (.so) for compute capability 8.0 or newer, x86-64 Linux",
    compile=_compile,
    can_run_here=_can_run_here,
    can_build_here=_can_build_here,
    activations="float16",
    heads=("float", "q8", "q4"),
    guide=("python", "genai", "cuda", "genai_cuda", "c"),
    choices={"activations": ("float16", "bfloat16")},
    vary=_vary,
)
