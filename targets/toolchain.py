"""What compiling for a target needs on this machine."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {
    "tvm": "apache-tvm",
    "ziglang": "ziglang",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
}
"""Importable module to the package that brings it."""


def missing_build_tools() -> str | None:
    """None if the build tools are installed, else the missing ones and how to get them."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if not missing:
        return None
    return f'missing {", ".join(missing)}: pip install "bitcompile[build]"'
