"""What ``import bitcompile`` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bitcompile

HEAVY = ("torch", "tvm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers",
         "onnxruntime_genai", "tokenizers", "huggingface_hub", "ziglang")  # fmt: skip


def test_the_public_names() -> None:
    assert bitcompile.__all__ == ["__version__", "build", "export", "load", "session_options"]
    for name in bitcompile.__all__:
        assert getattr(bitcompile, name)
    assert bitcompile.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitcompile.nothing


@pytest.mark.parametrize("statement", ["import bitcompile", "import bitcompile.cli"])
def test_import_is_cheap(statement: str) -> None:
    code = f"{statement}; import sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
