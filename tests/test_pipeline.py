"""The build as a whole, from a tiny decoder in the front end's place."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitcompile
from bitcompile import verification
from bitcompile.errors import InputError, ToolchainError, UsageError, VerificationError
from bitcompile.frontends import huggingface
from bitcompile.model import Imported
from bitcompile.pipeline import BuildOptions, build
from tests import artifacts


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``build("toy")`` gets a tiny decoder; any other model is refused."""

    def load(source: str, context: int | None = None, progress: Any = None) -> Imported:
        if source != "toy":
            raise InputError(f"no model {source}")
        progress("importing")
        return artifacts.imported(tmp_path / "tokenizer")

    monkeypatch.setattr(huggingface, "load", load)


def left(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if path.name != "tokenizer")


def test_builds_and_verifies(tmp_path: Path) -> None:
    said: list[str] = []
    made = bitcompile.build("toy", out=tmp_path / "out", progress=said.append)
    assert made.path == tmp_path / "out"
    made.check_hashes()
    assert made.manifest["verification"]["cosine"] >= verification.COSINE
    assert made.manifest["inspection"]["nodes_per_layer"] == 4
    assert made.manifest["options"]["head"] == "q8"
    names = [entry["name"] for entry in made.manifest["passes"]]
    assert "fuse-glu" in names
    assert names[-1] == "verify-graph"
    assert said[0] == "importing"
    assert list(left(tmp_path)) == ["out"]


def test_every_choice_reaches_the_graph(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "head": "float",
        "logits": "all",
        "verify": False,
        "dump": tmp_path / "dump",
    }
    made = build("toy", out=tmp_path / "out", **options)
    assert made.manifest["verification"] is None
    assert "bitcompile::HeadLinear" not in made.manifest["inspection"]["ops"]
    assert made.manifest["inspection"]["outputs"]["logits"][1] == "seq"
    dumps = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert dumps[0] == "00-start.txt"
    assert dumps[-1].endswith("verify-graph.txt")
    assert len(dumps) == 1 + len(made.manifest["passes"])


def test_an_artifact_that_fails_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("wrong")

    monkeypatch.setattr(verification, "verify", fail)
    with pytest.raises(VerificationError):
        build("toy", out=tmp_path / "out")
    assert list(left(tmp_path)) == []
    assert build("toy", out=tmp_path / "out", verify=False).manifest["verification"] is None


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        build("not even a model", out=tmp_path / "out")


@pytest.mark.parametrize("package", ["onnx_ir", "torch", "tvm", "ziglang"])
def test_a_missing_build_package_is_named(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ToolchainError, match=r'pip install "bitcompile\[build\]"'):
        build("toy", out=tmp_path / "out")


def test_a_bad_model_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        build("other", out=tmp_path / "out")
    assert list(left(tmp_path)) == []


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"head": "q2"}, "head must be one of q8, q4, float"),
        ({"logits": "none"}, "logits must be one of"),
        ({"layout": "x"}, "layout must be one of"),
        ({"context": 0}, "context must be 1"),
        ({"target": "toaster"}, "unknown target 'toaster'"),
        ({"host": "toaster"}, "host"),
    ],
)
def test_bad_choices_are_usage_errors(tmp_path: Path, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("toy", out=tmp_path / "out", **choice)


def test_build_takes_the_options_and_their_defaults() -> None:
    parameters = inspect.signature(build).parameters
    options = {option.name: option.default for option in dataclasses.fields(BuildOptions)}
    others = {"model", "out", "progress", "example_inputs", "dynamic_shapes"}
    assert {n: p.default for n, p in parameters.items() if n not in others} == options
