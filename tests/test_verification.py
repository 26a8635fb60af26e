"""Verification: that good artifacts pass, and that each kind of fault is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitcompile import verification
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, ToolchainError, VerificationError
from bitcompile.verification import verify
from tests import artifacts


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("verification") / "out")


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Artifact:
    return Artifact.open(shutil.copytree(artifact.path, tmp_path / "out"))


OPERATORS = 3 * artifacts.CONFIG.layers + 1


def test_the_plugin_is_bit_exact(artifact: Artifact) -> None:
    report = verify(artifact)
    assert len(report.nodes) == OPERATORS
    assert all(node.exact for node in report.nodes)
    assert report.cosine is not None
    assert report.cosine >= verification.COSINE
    assert report.skipped is None
    assert report.to_dict()["summary"] == report.summary


def test_every_variant_is_bit_exact(artifact: Artifact) -> None:
    isas = verification.variants(artifact)
    assert isas
    for isa in isas:
        report = verify(artifact, isa=isa)
        assert report.isa == isa
        assert all(node.exact for node in report.nodes)


def test_an_unknown_variant_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ToolchainError, match="cannot load the plugin"):
        verify(artifact, isa="z80")


def test_the_fallback_functions_agree(artifact: Artifact) -> None:
    said: list[str] = []
    report = verify(artifact, said.append, plugin=False)
    assert len(report.nodes) == OPERATORS
    assert report.cosine is None
    assert report.skipped is not None
    assert any("layer.0.qkv" in text for text in said)


@pytest.mark.parametrize("head", ["q4", "float"])
def test_other_heads_agree(head: str, tmp_path: Path) -> None:
    report = verify(artifacts.write(tmp_path / "out", head=head, logits="all"), plugin=False)
    assert len(report.nodes) == OPERATORS - (head == "float")


def test_one_wrong_element_is_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verification._reference

    def off_by_one_step(op: Any, inputs: Any, attributes: Any) -> Any:
        y = real(op, inputs, attributes).copy()
        if op.name == "NormBitLinear":
            y[4, 7] *= 1.01
        return y

    monkeypatch.setattr(verification, "_reference", off_by_one_step)
    with pytest.raises(VerificationError, match=r"NormBitLinear 'layer.0.qkv' .*\[4, 7\].* 1 of"):
        verify(artifact, plugin=False)


def test_a_wrong_accumulator_is_found() -> None:
    """One integer step of a linear operator is outside its tolerance, which is zero."""
    import onnx_ir as ir

    node = ir.Node("bitcompile", "BitLinear", [], name="n")
    good = np.arange(1, 13, dtype=np.float32).reshape(3, 4) * np.float32(1000)
    attributes: dict[str, Any] = {"N": 4, "K": 8}
    assert verification._compare(node, attributes, good, good, plugin=True).exact
    for wrong in (np.nextafter(good, np.float32(0)), np.where(good > 2000, np.nan, good)):
        with pytest.raises(VerificationError, match="is wrong"):
            verification._compare(node, attributes, wrong.astype(np.float32), good, plugin=True)


def test_nan_rows_must_agree() -> None:
    import onnx_ir as ir

    node = ir.Node("bitcompile", "BitGLU", [], name="n")
    good = np.ones((2, 3), np.float32)
    poisoned = np.where([[True], [False]], np.float32(np.nan), good)
    attributes: dict[str, Any] = {"N": 3, "K": 8, "activation": "silu"}
    assert verification._compare(node, attributes, poisoned, poisoned, plugin=True).exact
    for measured, expected in ((good, poisoned), (poisoned, good)):
        with pytest.raises(VerificationError, match=r"element \[0, 0\]"):
            verification._compare(node, attributes, measured, expected, plugin=True)


def test_the_reference_in_blocks_is_the_reference(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verify(artifact, plugin=False)
    monkeypatch.setattr(verification, "CHUNK", 48)  # leaves a tail of the 128, 64 and 260 rows
    assert verify(artifact, plugin=False).nodes == whole.nodes


def test_an_artifact_of_another_definition_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misfit(*_: object) -> None:
        raise ValueError("shapes (1,2) (3,4)")

    monkeypatch.setattr(verification, "_reference", misfit)
    with pytest.raises(VerificationError, match=r"layer\.0\.qkv.*build the artifact again"):
        verify(artifact, plugin=False)


def test_another_weight_is_found(copy: Artifact) -> None:
    """A changed file is refused by its hash."""
    with (copy.path / "model.onnx.data").open("r+b") as file:
        file.write(b"\x55")
    with pytest.raises(InputError, match="corrupted"):
        verify(copy)


def test_a_differing_whole_model_is_found(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verification._evaluate

    def noisy(artifact: Artifact, plugin: bool) -> Any:
        results = real(artifact, plugin=False)
        noise = np.random.default_rng(0).standard_normal(results[0].shape).astype(np.float32)
        return [results[0] + (noise if plugin else 0), *results[1:]]

    monkeypatch.setattr(verification, "_evaluate", noisy)
    with pytest.raises(VerificationError, match="whole model differs"):
        verification._compare_whole(artifact)


def test_a_model_too_big_to_unpack_is_skipped(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verification._too_big(artifact) is None
    monkeypatch.setattr(verification, "FALLBACK_LIMIT", 1000)
    reason = verification._too_big(artifact)
    assert reason is not None
    assert "would unpack" in reason


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("BITCOMPILE_ISA", "mine")
    with verification._isa("theirs"):
        assert os.environ["BITCOMPILE_ISA"] == "theirs"
    with verification._isa(None):
        assert os.environ["BITCOMPILE_ISA"] == "mine"
    assert os.environ["BITCOMPILE_ISA"] == "mine"
