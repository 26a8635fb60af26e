"""Reports of artifacts, .onnx files and checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile import inspection
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, ToolchainError
from bitcompile.inspection import format_report, inspect, inspect_graph
from tests import artifacts
from tests.graphs import Build, decoder

C = artifacts.CONFIG
QKV = (C.heads + 2 * C.kv_heads) * C.head_size
TERNARY_ROWS = C.layers * (QKV + C.hidden + 2 * C.ffn + C.hidden)
TERNARY = C.layers * (
    (QKV + 2 * C.ffn) * C.hidden + C.heads * C.head_size * C.hidden + C.ffn * C.hidden
)
KEYS = {
    "kind",
    "source",
    "ops",
    "nodes_per_layer",
    "bytes",
    "parameters",
    "bits_per_ternary_weight",
    "compression",
    "compression_total",
    "inputs",
    "outputs",
    "weights",
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("inspection") / "out")


def test_a_fused_decoder_is_counted_exactly(artifact: Artifact) -> None:
    """Sizes that fill whole tiles: two bits a weight and a float32 a row, a byte a head weight."""
    report = inspect(artifact.path)
    assert report.keys() >= KEYS
    assert report["nodes_per_layer"] == 4
    assert report["ops"]["bitcompile::BitGLU"] == C.layers
    assert report["parameters"]["ternary"] == TERNARY
    assert report["bytes"]["ternary"] == TERNARY // 4 + 4 * TERNARY_ROWS
    assert report["bytes"]["total"] == sum(report["bytes"][kind] for kind in inspection.KINDS)
    assert report["parameters"]["head"] == C.vocab * C.hidden
    bits = 8 * report["bytes"]["ternary"] / TERNARY
    assert report["bits_per_ternary_weight"] == pytest.approx(bits)
    assert report["compression"]["vs_fp32"] == pytest.approx(32 / bits)
    assert report["compression"]["vs_bf16"] == pytest.approx(16 / bits)
    assert 1 < report["compression_total"]["vs_fp32"] < report["compression"]["vs_fp32"]


def test_an_artifact_and_its_model_agree(artifact: Artifact) -> None:
    of_artifact, of_model = inspect(artifact.path), inspect(artifact.model)
    for key in KEYS - {"kind", "source"}:
        assert of_artifact[key] == of_model[key], key
    assert of_artifact["files"]["model.onnx"] == artifact.model.stat().st_size


def test_an_artifact_needs_no_onnx(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)
    assert inspect(artifact.path)["nodes_per_layer"] == 4
    with pytest.raises(ToolchainError, match=r"bitcompile\[build\]"):
        inspect(artifact.model)


def test_a_portable_graph_has_more_nodes(artifact: Artifact) -> None:
    report = inspect_graph(decoder(C))
    assert report["nodes_per_layer"] > 4
    assert report["parameters"]["ternary"] == TERNARY
    assert report["parameters"]["head"] == C.vocab * C.hidden  # one tied table
    assert report["bytes"]["head"] == 2 * C.vocab * C.hidden


def test_a_graph_without_our_operators_has_no_ternary_bytes() -> None:
    b = Build()
    x = b.input("x", ["n", 8])
    y = b.op("MatMul", x, b.const("w", np.ones((8, 4), np.float32)), name="y", shape=["n", 4])
    report = inspect_graph(b.model(y))
    assert report["bits_per_ternary_weight"] is None
    assert report["compression"] == {"vs_fp32": None, "vs_bf16": None}
    assert report["nodes_per_layer"] is None
    assert report["bytes"] == {"ternary": 0, "head": 128, "other": 0, "total": 128}
    assert "MatMul" in format_report({"kind": "onnx", "source": "y", **report})


def _checkpoint(folder: Path, tensors: dict[str, np.ndarray[Any, Any]], **config: object) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["BitNetForCausalLM"], "num_hidden_layers": 1, **config})
    )
    return folder


TABLE: dict[str, np.ndarray[Any, Any]] = {
    "model.embed_tokens.weight": np.zeros((8, 16), np.float16)
}
BITNET = {"quant_method": "bitnet"}


def test_a_packed_checkpoint(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    packed: dict[str, np.ndarray[Any, Any]] = {f"{name}.weight": np.zeros((4, 16), np.uint8),
              f"{name}.weight_scale": np.zeros(1, np.float16)}  # fmt: skip
    folder = _checkpoint(tmp_path / "c", {**TABLE, **packed}, quantization_config=BITNET)
    report = inspect(folder)
    assert report.keys() >= KEYS
    assert report["bytes"] == {"ternary": 66, "head": 256, "other": 0, "total": 322}
    assert report["parameters"]["ternary"] == 4 * 4 * 16
    assert "BitNetForCausalLM" in format_report(report)


def test_master_weights_become_ternary_only_where_the_config_says_so(tmp_path: Path) -> None:
    weights: dict[str, np.ndarray[Any, Any]] = {
        **TABLE,
        "model.layers.0.mlp.up_proj.weight": np.zeros((4, 16), np.float32),
    }
    online = inspect(_checkpoint(tmp_path / "a", weights, quantization_config=BITNET))
    assert online["bytes"]["ternary"] == 4 * 64
    plain = inspect(_checkpoint(tmp_path / "b", weights))
    assert plain["bytes"] == {"ternary": 0, "head": 256, "other": 256, "total": 512}


def test_what_cannot_be_inspected_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no protobuf at all")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputError, match="not a readable ONNX model"):
        inspect(tmp_path / "x.onnx")
    for path in (tmp_path / "x.txt", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="nothing to inspect"):
            inspect(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 4),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"),
        lambda folder: (folder / "model.safetensors").write_bytes(
            b"\x08" + b"\0" * 7 + b'{"a":{}}'
        ),
    ],
)
def test_damaged_checkpoints_are_input_errors(tmp_path: Path, damage: object) -> None:
    folder = _checkpoint(tmp_path / "c", TABLE)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(InputError):
        inspect(folder)


def test_one_layer_has_no_count_between_attentions() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    assert inspection.nodes_per_layer(graph) is None
