"""Verification: that good artifacts pass, and that each kind of fault is found and named."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile import verification
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, UsageError, VerificationError
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


def test_batches_of_a_gpu_are_bit_exact(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as a GPU has kernels for, here by those of the CPU."""
    monkeypatch.setattr(verification, "BATCHES", verification.GPU_BATCHES)
    assert all(node.exact for node in verify(artifact).nodes)


def test_an_unknown_variant_is_refused(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"no variant 'z80' .* choose one of: .*portable"):
        verify(artifact, isa="z80")


def test_the_fallback_functions_agree(artifact: Artifact) -> None:
    said: list[str] = []
    report = verify(artifact, said.append, plugin=False)
    assert len(report.nodes) == OPERATORS
    assert report.cosine is None
    assert report.skipped is not None
    assert report.summary.startswith("without the plugin: functions of ")
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
    node = ir.Node("bitcompile", "BitLinear", [], name="n")
    good = np.arange(1, 13, dtype=np.float32).reshape(3, 4) * np.float32(1000)
    attributes: dict[str, Any] = {"N": 4, "K": 8}
    assert verification._compare(node, attributes, good, good, True, "float32").exact
    for wrong in (np.nextafter(good, np.float32(0)), np.where(good > 2000, np.nan, good)):
        with pytest.raises(VerificationError, match="is wrong"):
            verification._compare(node, attributes, wrong.astype(np.float32), good, True, "float32")


def test_nan_rows_must_agree() -> None:
    node = ir.Node("bitcompile", "BitGLU", [], name="n")
    good = np.ones((2, 3), np.float32)
    poisoned = np.where([[True], [False]], np.float32(np.nan), good)
    attributes: dict[str, Any] = {"N": 3, "K": 8, "activation": "silu"}
    assert verification._compare(node, attributes, poisoned, poisoned, True, "float32").exact
    for measured, expected in ((good, poisoned), (poisoned, good)):
        with pytest.raises(VerificationError, match=r"element \[0, 0\]"):
            verification._compare(node, attributes, measured, expected, True, "float32")


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

    def noisy(artifact: Artifact, feeds: Any, plugin: bool = True) -> Any:
        results = real(artifact, feeds, plugin=False)
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
    monkeypatch.setenv("BITCOMPILE_ISA", "mine")
    with verification._isa("theirs"):
        assert os.environ["BITCOMPILE_ISA"] == "theirs"
    with verification._isa(None):
        assert os.environ["BITCOMPILE_ISA"] == "mine"
    assert os.environ["BITCOMPILE_ISA"] == "mine"


def test_threads_take_turns_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITCOMPILE_ISA", raising=False)
    failures: list[BaseException] = []

    def use(isa: str) -> None:
        try:
            for _ in range(20):
                with verification._isa(isa):
                    time.sleep(0.001)
                    assert os.environ["BITCOMPILE_ISA"] == isa
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(f"isa{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert "BITCOMPILE_ISA" not in os.environ


def test_a_variable_that_somebody_removed_is_no_error() -> None:
    with verification._isa("theirs"):
        del os.environ["BITCOMPILE_ISA"]


# --- where the data lies ------------------------------------------------------------------------


def test_hard_linked_data_is_verified(copy: Artifact, tmp_path: Path) -> None:
    os.link(copy.path / "model.onnx.data", tmp_path / "second name")
    assert len(verify(copy).nodes) == OPERATORS


def test_a_hub_cache_is_verified(copy: Artifact, tmp_path: Path) -> None:
    """Every file is a link to another folder, under another name."""
    cached = tmp_path / "snapshot"
    cached.mkdir()
    for file in copy.path.iterdir():
        blob = file.rename(file.with_name(f"{hash(file.name):x}"))
        (cached / file.name).symlink_to(blob)
    assert len(verify(Artifact.open(cached)).nodes) == OPERATORS


def test_data_that_onnxruntime_would_not_read_is_refused(copy: Artifact, tmp_path: Path) -> None:
    data = copy.path / "model.onnx.data"
    data.rename(tmp_path / "data")
    data.symlink_to(tmp_path / "data")
    with pytest.raises(InputError, match="link to another folder"):
        verify(copy)


def edited(copy: Artifact, change: Any) -> Artifact:
    """The artifact after ``change(graph)``, with its weights inside ``model.onnx``."""
    model = ir.load(copy.model)
    change(model.graph)
    ir.save(ir.external_data.load_to_model(model), copy.model)
    artifacts.seal(copy.path)
    return Artifact.open(copy.path)


def test_data_outside_the_manifest_is_refused(copy: Artifact) -> None:
    shutil.copy(copy.path / "model.onnx.data", copy.path / "other.data")
    model = ir.load(copy.model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor._location = "other.data"
    ir.save(model, copy.model)
    artifacts.seal(copy.path)
    with pytest.raises(InputError, match=r"'other\.data', which bitcompile\.json does not list"):
        verify(Artifact.open(copy.path))


def test_data_too_short_for_its_tensors_is_refused(copy: Artifact) -> None:
    os.truncate(copy.path / "model.onnx.data", 100)
    artifacts.seal(copy.path)
    with pytest.raises(InputError, match="does not hold"):
        verify(Artifact.open(copy.path))


def test_a_model_that_is_no_model_is_refused(copy: Artifact) -> None:
    copy.model.write_bytes(b"\x08\xff")
    artifacts.seal(copy.path)
    with pytest.raises(InputError, match="not a readable ONNX model"):
        verify(Artifact.open(copy.path))


# --- values that are not finite -----------------------------------------------------------------


def poisoned(copy: Artifact, node_name: str, index: int, bad: float) -> Artifact:
    """The artifact with ``bad`` in one constant of a node."""

    def poison(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.name == node_name)
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        data = value.const_value.numpy().copy()
        data.flat[-1] = bad
        value.const_value = ir.tensor(data, name=value.name)

    return edited(copy, poison)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["gamma", "w_scale"])
def test_constants_that_are_not_finite_are_found(copy: Artifact, name: str, bad: float) -> None:
    """Both sides compute NaN, so that only the constant itself can tell."""
    index = ["x", "gamma", "w", "w_scale"].index(name)
    damaged = poisoned(copy, "layer.0.qkv", index, bad)
    with pytest.raises(InputError, match=f"'{name}' of NormBitLinear 'layer.0.qkv' .*not finite"):
        verify(damaged)


def test_nan_in_another_operator_is_found_but_infinity_may_be_meant(tmp_path: Path) -> None:
    made = artifacts.write(tmp_path / "out", head="float")
    gather = next(node for node in ir.load(made.model).graph if node.op_type == "Gather")
    infinite = poisoned(made, str(gather.name), 0, -np.inf)
    verification._check_constants(ir.load(infinite.model))
    with pytest.raises(InputError, match=f"of Gather '{gather.name}' .*not finite"):
        verify(poisoned(made, str(gather.name), 0, np.nan))


# --- group scales -------------------------------------------------------------------------------


def test_group_scales_are_verified_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of groups lie in tiles of 16 rows, the last of which is not full."""
    config = replace(artifacts.CONFIG, hidden=136, ffn=200, group_size=64)
    made = artifacts.write(tmp_path / "out", config=config)
    whole = verify(made, plugin=False)
    monkeypatch.setattr(verification, "CHUNK", 48)
    report = verify(made)
    assert any(n.shape[0] % 16 for n in report.nodes if n.op == "NormBitLinear")
    assert all(node.exact for node in report.nodes)
    assert verify(made, plugin=False).nodes == whole.nodes
