"""Float weights that are ternary as they stand: the rule, and an unpacked checkpoint end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitcompile
from bitcompile import verification
from bitcompile.errors import InputError
from bitcompile.frontends.exact import exactly_ternary
from bitcompile.frontends.gguf import GgufWeights, Metadata
from bitcompile.frontends.gguf_file import GgufFile
from bitcompile.frontends.huggingface import load
from bitcompile.packing import GROUP_SIZES, PackedTernary
from tests import gguf_files
from tests.checkpoints import DIRECT, Recipe, cosine, eager, make

GROUP = 128
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 1}


def spread(scale: np.ndarray, size: int, K: int) -> np.ndarray:
    return np.repeat(scale, size, axis=1)[:, :K]


@pytest.mark.parametrize("size", [0, *GROUP_SIZES])
@pytest.mark.parametrize("K", [300, 512])
def test_the_largest_groups_that_share_a_scale_are_taken(size: int, K: int) -> None:
    rng = np.random.default_rng(size)
    weight = rng.integers(-1, 2, (5, K)).astype(np.float32)
    weight[:, ::16] = 1  # no group is of zeros alone
    scale = rng.uniform(0.01, 1, (5, -(-K // size) if size else 1)).astype(np.float32)
    packed = exactly_ternary(weight * spread(scale, size or K, K))
    assert packed is not None
    assert packed.group_size == size
    assert (packed.ternary() == weight).all()
    assert (packed.scale == scale).all()


def test_zeros_are_ternary_and_signs_are_kept() -> None:
    packed = exactly_ternary(np.array([[0, 0, 0], [-0.5, 0.5, -0.0]], np.float32))
    assert packed is not None
    assert (packed.ternary() == [[0, 0, 0], [-1, 1, 0]]).all()
    assert (packed.scale == [[0], [0.5]]).all()


@pytest.mark.parametrize("change", [np.float32(1e-3), np.float32(1.0000001), np.float32(2)])
def test_one_other_value_is_enough_to_refuse(change: np.float32) -> None:
    weight = np.random.default_rng(0).integers(-1, 2, (4, 300)).astype(np.float32)
    weight[2, 290:] = 1  # the last group, of whatever size, holds the changed one and others
    assert exactly_ternary(weight) is not None
    weight[2, 299] = change
    assert exactly_ternary(weight) is None


# --- a checkpoint as the Bonsai models are published unpacked -----------------------------------


class Quantised(torch.nn.Module):
    """A float linear layer whose activations are quantised per token, as kernels do."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * s).round().clamp(-128, 127) / s
        return torch.nn.functional.linear(q, self.weight)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A Qwen3 checkpoint without quantization_config; the model; weights and scales of groups."""
    path = tmp_path_factory.mktemp("exact") / "unpacked"
    model = make(Recipe("Qwen3ForCausalLM", DIRECT, SIZES, torch.float16), path)
    state = load_file(path / "model.safetensors")
    rng, ternary = np.random.default_rng(3), {}
    for name, (weight, _) in gguf_files.ternary_of(model).items():
        N, K = weight.shape
        scale = rng.uniform(0.02, 0.1, (N, K // GROUP)).astype(np.float16).astype(np.float32)
        values = torch.from_numpy(weight * spread(scale, GROUP, K))
        state[f"{name}.weight"] = values.half()
        del state[f"{name}.weight_scale"]
        ternary[name] = weight, scale
        model.set_submodule(name, Quantised(values))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return path, model, ternary


def test_an_unpacked_checkpoint_is_built(
    unpacked: tuple[Path, Any, dict[str, Any]], tmp_path: Path
) -> None:
    """Groups found, operators verified, the logits those of quantised activations."""
    path, model, _ = unpacked
    artifact = bitcompile.build(path, out=tmp_path / "out", head="float", logits="all")
    nodes = artifact.manifest["verification"]["nodes"]
    assert {node["op"] for node in nodes} == {"BitLinear", "BitGLU"}
    assert all(node["exact"] for node in nodes if node["op"] == "BitLinear")
    run = bitcompile.load(artifact.path)
    ids = np.random.default_rng(1).integers(0, 97, (1, 20))
    measured = verification.step(run, ids, verification.empty_caches(run))
    with eager():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert cosine(measured, expected) >= 0.9999


def test_q2_0_and_unpacked_floats_are_the_same_weights(
    unpacked: tuple[Path, Any, dict[str, Any]], tmp_path: Path
) -> None:
    path, model, ternary = unpacked
    state = load_file(path / "model.safetensors")
    config = model.config
    source = type("Model", (), {"config": config, "state_dict": lambda _: dict(state)})()
    gguf_files.write(tmp_path / "m.gguf", source, "qwen3", ternary, GROUP)
    file = GgufFile(str(tmp_path / "m.gguf"))
    converted = GgufWeights(file, Metadata(file), None)
    for name, (weight, scale) in ternary.items():
        theirs = converted.ternary(name, *weight.shape)
        ours = exactly_ternary(state[f"{name}.weight"].float().numpy())
        for packed in (ours, theirs):
            assert isinstance(packed, PackedTernary)
            assert packed.group_size == GROUP
            assert (packed.ternary() == weight).all()
            assert (packed.scale == scale).all()


def test_a_plain_float_checkpoint_is_refused(
    unpacked: tuple[Path, Any, dict[str, Any]], tmp_path: Path
) -> None:
    path, _, _ = unpacked
    state = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = torch.randn_like(state[name].float()).half()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(InputError, match=r"up_proj.weight is not ternary .*quantization_config"):
        load(str(tmp_path))
