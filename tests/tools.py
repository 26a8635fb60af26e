"""Programs a test may need beyond Python packages."""

from __future__ import annotations

import ctypes.util
import os
import shutil
from pathlib import Path

import pytest

STRICT = "BITCOMPILE_REQUIRE_TOOLS"
"""Set where every tool is expected: a missing one is then a failure, not a skip."""


def require(what: str, present: bool) -> None:
    """Skip the running test for want of ``what``, or fail it where all tools are expected."""
    if present:
        return
    if os.environ.get(STRICT):
        pytest.fail(f"{what} is missing, and {STRICT} is set")
    pytest.skip(f"{what} is missing")


def program(name: str) -> str:
    """Path of a program."""
    path = shutil.which(name)
    require(name, path is not None)
    return str(path)


def cuda_compiler() -> None:
    """nvcc, or NVIDIA's compiler from PyPI."""
    from bitcompile.targets.tir.cuda.compiler import missing_compiler

    require("a CUDA compiler", missing_compiler() is None)


def opencl_driver() -> str:
    """Name of the OpenCL loader's library."""
    name = ctypes.util.find_library("OpenCL")
    require("an OpenCL driver (pocl-opencl-icd, ocl-icd-libopencl1)", name is not None)
    return str(name)


def onnxruntime_headers() -> Path:
    """Folder with the real ONNX Runtime C headers."""
    folder = Path(os.environ.get("BITCOMPILE_ORT_HEADERS", "/usr/include/onnxruntime"))
    require("onnxruntime_c_api.h (see .ci/ort-headers)", (folder / "onnxruntime_c_api.h").exists())
    return folder


def embedding_kit(part: str) -> Path:
    """Folder ``aarch64`` or ``android`` with ONNX Runtime for that system."""
    folder = Path(os.environ.get("BITCOMPILE_EMBEDDING_KIT", "build/embedding-kit")) / part
    require(f"{folder} (see .ci/embedding-kit)", folder.is_dir())
    return folder.absolute()


def java_json() -> Path:
    """Android's org.json for a desktop's Java (Debian's libandroid-json-java)."""
    jar = Path("/usr/share/java/com.android.json.jar")
    require(f"{jar} (libandroid-json-java)", jar.exists())
    return jar
