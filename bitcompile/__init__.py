"""bitcompile: ternary (BitNet, 1.58-bit) models into exact, fast ONNX Runtime artifacts."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitcompile import nn as nn
    from bitcompile.pipeline import build, export
    from bitcompile.runtime import load, session_options

__version__ = _version("bitcompile")
__all__ = ["__version__", "build", "export", "load", "session_options"]

_HOMES = {
    "build": "bitcompile.pipeline",
    "export": "bitcompile.pipeline",
    "load": "bitcompile.runtime",
    "session_options": "bitcompile.runtime",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import bitcompile`` is cheap."""
    from importlib import import_module

    if name == "nn":  # needs torch
        return import_module("bitcompile.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitcompile' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
