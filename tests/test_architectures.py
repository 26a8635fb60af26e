"""Model families beyond BitNet: built for this machine, against transformers.

The artifact's own kernels run, so these tests also say that the passes and operators fit each
family: `build` verifies every operator against its reference, integers included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitcompile
from bitcompile import verification
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, UsageError
from bitcompile.frontends.huggingface import load
from tests.checkpoints import (
    DIRECT,
    INVERSE,
    ONLINE,
    Recipe,
    cosine,
    eager,
    make,
    reference_logits,
    session,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FALCON = {"rope_type": "default", "rope_theta": 1000042.0}
DECODERS = {
    "Llama3-1.58": Recipe("LlamaForCausalLM", INVERSE, {"rope_parameters": LLAMA3}),
    # Falcon3: heads wider than hidden_size / heads
    "Falcon3-1.58": Recipe(
        "LlamaForCausalLM", INVERSE, {"head_dim": 32, "rope_parameters": FALCON}
    ),
    "Falcon-E packed": Recipe(
        "LlamaForCausalLM", DIRECT, {"rope_parameters": FALCON, "tie_word_embeddings": True}
    ),
    "Falcon-E masters": Recipe("LlamaForCausalLM", ONLINE, {"rope_parameters": FALCON}),
}
EMBEDDING = {**ONLINE, "use_rms_norm": True, "rms_norm_eps": 1e-6}


def remote_bitnet(path: Path) -> Any:
    """A checkpoint as 1bitLLM publishes them; returns transformers' model of the same values."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    recipe = Recipe(
        "BitNetForCausalLM",
        ONLINE,
        {"hidden_act": "silu", "tie_word_embeddings": True, "rope_parameters": rope},
        torch.float16,
    )
    model = make(recipe, path)
    config = json.loads((path / "config.json").read_text())
    for key in ("quantization_config", "rope_parameters"):
        del config[key]
    config |= {
        "architectures": ["BitnetForCausalLM"],
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "weight_bits": 1,
        "input_bits": 8,
    }
    (path / "config.json").write_text(json.dumps(config))
    names = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    _rename(path, names)
    return model


def _rename(path: Path, names: dict[str, str]) -> None:
    """Replace parts of the tensors' names."""
    state = load_file(path / "model.safetensors")
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    save_file(state, path / "model.safetensors")


def build(source: Path, out: Path) -> Artifact:
    """An artifact that computes the checkpoint's own floats outside of its ternary layers."""
    return bitcompile.build(source, out=out, head="float", logits="all")


def check_operators(artifact: Artifact, operators: set[str]) -> None:
    """All ternary layers fused, and every operator bit-equal to its reference.

    A gate with an exponential may differ by a rounding of its activations (verification.TOLERANCE).
    """
    nodes = artifact.manifest["verification"]["nodes"]
    assert {node["op"] for node in nodes} == operators
    assert all(node["exact"] for node in nodes if node["op"] != "BitGLU")


@pytest.mark.parametrize("name", [*DECODERS, "1bitLLM"])
def test_decoder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    model = remote_bitnet(path) if name == "1bitLLM" else make(DECODERS[name], path)
    artifact = build(path, tmp_path / "out")
    tied = model.config.tie_word_embeddings
    sub_norm = {"NormBitLinear", "BitGLU"}
    check_operators(artifact, sub_norm if name == "1bitLLM" else {*sub_norm, "BitLinear"})
    assert tied is (name in ("1bitLLM", "Falcon-E packed"))
    run = bitcompile.load(artifact.path)
    caches = verification.empty_caches(run)
    ids = np.random.default_rng(1).integers(0, 97, (1, 24))
    parts = [verification.step(run, ids[:, :20], caches)]
    parts += [verification.step(run, ids[:, i : i + 1], caches) for i in range(20, 24)]
    expected = reference_logits(model, ids.tolist())
    assert cosine(np.concatenate(parts, axis=1), expected) >= 0.9999


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_encoder(causal: bool, tmp_path: Path) -> None:
    """A norm inside each projection, no head: hidden states, with padding on either side."""
    config = {"head_dim": 16, "is_causal": causal}
    model = make(Recipe("Qwen3Model", EMBEDDING, config), tmp_path / "checkpoint")
    artifact = build(tmp_path / "checkpoint", tmp_path / "out")
    assert artifact.manifest["language"] is None
    run = bitcompile.load(artifact.path)
    ids = np.random.default_rng(0).integers(0, 97, (3, 7))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    states = hidden(run, ids, mask)
    with eager():
        expected = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    valid = mask.astype(bool)
    assert np.isfinite(states).all()
    assert cosine(states[valid], expected[valid]) >= 0.9999
    for row, part in ((1, slice(3, 7)), (2, slice(0, 5))):
        alone = hidden(run, ids[row : row + 1, part], mask[row : row + 1, part])
        assert cosine(alone, states[row : row + 1, part]) >= 0.9999
    changed = ids.copy()
    changed[:, -1] = 96 - changed[:, -1]
    unmoved = (hidden(run, changed, mask) == states).all(axis=-1)[0, :-1]
    assert unmoved.all() == causal


def hidden(run: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    (states,) = run.run(["last_hidden_state"], feeds)
    return np.asarray(states)


def test_an_inner_norm_may_have_its_published_name(tmp_path: Path) -> None:
    recipe = Recipe("LlamaModel", EMBEDDING, {"num_hidden_layers": 1})
    model = make(recipe, tmp_path / "checkpoint")
    _rename(tmp_path / "checkpoint", {"_proj.rms_norm.": "_proj.norm."})
    run = session(load(str(tmp_path / "checkpoint")).graph)
    ids = np.arange(10)[None]
    with eager():
        expected = model(torch.tensor(ids)).last_hidden_state.numpy()
    assert cosine(hidden(run, ids, np.ones_like(ids)), expected) >= 0.9999


def test_an_encoder_has_no_context(tmp_path: Path) -> None:
    make(Recipe("LlamaModel", DIRECT, {"num_hidden_layers": 1}), tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="LlamaModel has no cache"):
        load(str(tmp_path / "checkpoint"), context=8)


def _with(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


REMOTE_REFUSED = {
    "other bits": (_with(weight_bits=2), "weight_bits 2, input_bits 8"),
    "no bits": (lambda config: config.pop("input_bits"), "weight_bits 1, input_bits None"),
    "packed": (_with(quantization_config={"quant_method": "bitnet"}), "and a quantization_config"),
    "no activation": (lambda config: config.pop("hidden_act"), "must give hidden_act"),
    "no base": (lambda config: config.pop("rope_theta"), "must give rope_theta"),
}


@pytest.mark.parametrize("case", REMOTE_REFUSED)
def test_refuses_what_1bitllm_does_not_publish(case: str, tmp_path: Path) -> None:
    change, words = REMOTE_REFUSED[case]
    remote_bitnet(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load(str(tmp_path / "checkpoint"))
