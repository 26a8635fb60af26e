"""Every example runs and shows what it says."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bitcompile
from bitcompile.nn import BitLinear

EXAMPLES = Path(__file__).parents[1] / "examples"
TWIN = 0.02
"""Accuracy a ternary network may lose to its float twin."""


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import their neighbours, as scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The digits artifact and what its example reports."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        digits = importlib.import_module("digits")
    finally:
        sys.path.remove(str(EXAMPLES))
    out = tmp_path_factory.mktemp("examples") / "digits"
    return out, digits.main(["--out", str(out)])


def test_digits(trained: tuple[Path, Any]) -> None:
    out, result = trained
    assert result.different == 0
    assert result.artifact_accuracy == pytest.approx(result.ternary_accuracy)
    assert result.ternary_accuracy > 0.95
    assert result.float_accuracy - result.ternary_accuracy <= TWIN
    report = bitcompile.artifact.Artifact.open(out).manifest["verification"]
    assert all(node["exact"] for node in report["nodes"])
    assert len(report["nodes"]) == 3


def test_encoder() -> None:
    result = importlib.import_module("encoder").main([])
    assert result.different <= 1  # behind a softmax a rounding edge may move
    assert result.accuracy > 0.88
    assert result.ternary_layers == 8


def test_plain_onnxruntime(trained: tuple[Path, Any]) -> None:
    source = (EXAMPLES / "plain_onnxruntime.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "plain_onnxruntime.py"), str(trained[0])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "out  output  float32[1, 10]" in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-3


def test_shared_weights(tmp_path: Path) -> None:
    """A copy of the weights would cost the second session all of them again."""
    model = torch.nn.Sequential(*(BitLinear(4096, 4096, bias=False) for _ in range(2)))
    bitcompile.build(model, example_inputs=torch.randn(1, 4096), out=tmp_path / "o", verify=False)
    result = importlib.import_module("shared_weights").main([str(tmp_path / "o")])
    assert result.weights > 8e6
    assert result.second < result.weights / 4
