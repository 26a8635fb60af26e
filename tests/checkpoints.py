"""Tiny random checkpoints made with transformers itself, and how to run what comes of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import (
    AutoBitLinear,
    BitLinear,
    pack_weights,
    replace_with_bitnet_linear,
)
from transformers.quantizers.base import HfQuantizer

from bitcompile.custom_ops import OPS

TINY = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 48,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DIRECT = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
INVERSE: dict[str, Any] = {}
ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}


@dataclass(frozen=True)
class Recipe:
    """What to make: a transformers class, its configuration, the weight form and float type."""

    architecture: str
    form: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


def make(recipe: Recipe, path: Path, seed: int = 0) -> Any:
    """Write the checkpoint to ``path``; returns transformers' float32 model of the same values."""
    build = getattr(transformers, recipe.architecture)
    quantization = {"quant_method": "bitnet", **recipe.form}
    torch.manual_seed(seed)
    model = build(build.config_class(**{**TINY, **recipe.config})).eval()
    config = transformers.BitNetQuantConfig(**recipe.form)
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert, model._keep_in_fp32_modules
    )
    replace_with_bitnet_linear(model, skipped, config)
    _fill(model, recipe)
    path.mkdir(parents=True)
    values = {**model.config.to_dict(), "quantization_config": quantization}
    values["architectures"] = [recipe.architecture]
    (path / "config.json").write_text(json.dumps(values))
    (path / "tokenizer.json").write_text("{}")
    save_file(_stored(model, recipe), path / "model.safetensors", metadata={"format": "pt"})
    return model


def _fill(model: Any, recipe: Recipe) -> None:
    """Random values, rounded to the stored type, in every parameter and ternary buffer."""
    for module in model.modules():
        if isinstance(module, AutoBitLinear | BitLinear):
            _fill_linear(module, recipe)
    for name, parameter in list(model.named_parameters()):
        spread = 1.0 if "embed" in name or "lm_head" in name else 0.2
        offset = 1.0 if "norm" in name else 0.0
        if parameter.is_meta or "norm" in name or "embed" in name or "lm_head" in name:
            value = _rounded(torch.randn(parameter.shape) * spread + offset, recipe.dtype)
            parent, _, leaf = name.rpartition(".")
            new = torch.nn.Parameter(value, requires_grad=False)
            setattr(model.get_submodule(parent), leaf, new)
    model.tie_weights()


def _fill_linear(module: Any, recipe: Recipe) -> None:
    N, K = module.out_features, module.in_features
    ternary = torch.randint(-1, 2, (N, K)).float()
    scale = _rounded(torch.rand(1) * 0.2 + 0.05, recipe.dtype)
    if isinstance(module, BitLinear):
        module.weight = torch.nn.Buffer(pack_weights(ternary.clone()))
        module.weight_scale = torch.nn.Buffer(_rounded(1 / scale, recipe.dtype))
        module.dtype = torch.float32
    elif module.online_quant:
        master = _rounded(torch.randn(N, K) * 0.3, recipe.dtype)
        module.weight = torch.nn.Parameter(master, requires_grad=False)
    else:
        module.weight = torch.nn.Parameter(ternary, requires_grad=False)
        module.weight_scale = torch.nn.Buffer(scale)
    if module.bias is not None:
        bias = _rounded(torch.randn(N), recipe.dtype)
        kind = torch.nn.Buffer if isinstance(module, BitLinear) else torch.nn.Parameter
        module.bias = kind(bias)


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).float()


def _stored(model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint holds it: packed weights, ``dtype`` for the rest."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, AutoBitLinear) and not module.online_quant:
            state[f"{name}.weight"] = pack_weights(module.weight.detach().clone())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {
        name: value if value.dtype == torch.uint8 else value.detach().to(recipe.dtype).clone()
        for name, value in state.items()
    }


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run transformers' ``@torch.compile`` helpers as written, without a compiler."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def reference_logits(model: Any, ids: list[list[int]]) -> np.ndarray:
    """transformers' logits ``[B, S, V]``, float32, without a cache."""
    with eager():
        logits = model(input_ids=torch.tensor(ids)).logits
    return np.asarray(logits.numpy())


def session(graph: ir.Model) -> Any:
    """An onnxruntime session of a portable graph, through the function bodies of its operators."""
    import onnx.parser
    import onnxruntime

    proto = ir.to_proto(graph)
    body = OPS["BitLinear"].body({"layout": "i2", "group_size": 0})
    proto.functions.append(onnx.parser.parse_function(body))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def step(session: Any, ids: list[list[int]], cache: dict[str, Any]) -> np.ndarray:
    """Feed tokens ``[B, S]``; returns logits ``[B, S, V]`` and updates ``cache`` in place."""
    inputs = session.get_inputs()
    past = cache or {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in inputs
        if i.name.startswith("past")
    }
    length = next(iter(past.values())).shape[2] + len(ids[0])
    feeds = {
        "input_ids": np.array(ids, np.int64),
        "attention_mask": np.ones((len(ids), length), np.int64),
        **past,
    }
    logits, *present = session.run(None, feeds)
    cache.update(zip([name for name in feeds if name.startswith("past")], present, strict=True))
    return np.asarray(logits)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays taken as vectors."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
