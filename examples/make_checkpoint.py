"""Write a randomly weighted ternary checkpoint in the packed Hugging Face form.

    python examples/make_checkpoint.py --preset tiny --out /tmp/tiny
    python examples/make_checkpoint.py --preset 2b-4t --out /tmp/random-2b

It has the shapes, files and sizes of a trained BitNet model, with other weights in every layer, so
it shows what a build costs and how fast the artifact is. It says nothing sensible.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

PRESETS: dict[str, dict[str, Any]] = {
    "2b-4t": {  # microsoft/bitnet-b1.58-2B-4T
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
LAYERS_PER_SHARD = 8
"""Keeps a shard of the largest preset below 160 MB."""
TABLE_ROWS = 4096
"""Rows of the embedding that are drawn at a time, so that float32 values stay few."""
NONZERO = 2 / 3
"""Share of the ternary weights that are not 0, if -1, 0 and 1 are equally likely."""

Tensors = dict[str, torch.Tensor]


def configuration(preset: dict[str, Any]) -> dict[str, Any]:
    """config.json of a BitNet model with packed weights whose scale multiplies."""
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        },
        **preset,
    }


def packed_linear(rng: np.random.Generator, name: str, N: int, K: int) -> Tensors:
    """One random ternary ``[N, K]`` layer: uint8 ``[N/4, K]`` and the scale that keeps variance.

    Byte ``[r, k]`` holds the codes ``w + 1`` of rows ``r + i N/4`` in bits ``2i..2i+1``.
    """
    four_codes = [a + 4 * b + 16 * c + 64 * d for a, b, c, d in np.ndindex(3, 3, 3, 3)]
    packed = np.array(four_codes, np.uint8)[rng.integers(0, 81, (N // 4, K), np.uint8)]
    scale = torch.tensor([(NONZERO * K) ** -0.5], dtype=torch.bfloat16)
    return {f"{name}.weight": torch.from_numpy(packed), f"{name}.weight_scale": scale}


def norm(rng: np.random.Generator, size: int) -> torch.Tensor:
    """Weights of an RMSNorm near 1, bfloat16 ``[size]``."""
    return torch.from_numpy(rng.uniform(0.8, 1.2, size)).to(torch.bfloat16)


def layer(rng: np.random.Generator, index: int, config: dict[str, Any]) -> Tensors:
    """All tensors of one decoder layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    prefix = f"model.layers.{index}."
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.attn_sub_norm": hidden,
        "mlp.ffn_sub_norm": inner,
    }
    tensors = {f"{prefix}{name}.weight": norm(rng, size) for name, size in norms.items()}
    for name, (N, K) in linears.items():
        tensors |= packed_linear(rng, prefix + name, N, K)
    return tensors


def table(rng: np.random.Generator, rows: int, width: int) -> torch.Tensor:
    """The embedding, bfloat16 ``[rows, width]``, also the head."""
    values = torch.empty(rows, width, dtype=torch.bfloat16)
    for start in range(0, rows, TABLE_ROWS):
        part = values[start : start + TABLE_ROWS]
        part.copy_(torch.from_numpy(rng.standard_normal(tuple(part.shape), np.float32)) * 0.02)
    return values


def layers(rng: np.random.Generator, indices: range, config: dict[str, Any]) -> Tensors:
    """All tensors of several decoder layers."""
    return {name: t for index in indices for name, t in layer(rng, index, config).items()}


def ends(rng: np.random.Generator, config: dict[str, Any]) -> Tensors:
    """The embedding and the last norm."""
    hidden = config["hidden_size"]
    return {
        "model.norm.weight": norm(rng, hidden),
        "model.embed_tokens.weight": table(rng, config["vocab_size"], hidden),
    }


def shards(rng: np.random.Generator, config: dict[str, Any]) -> Iterator[Tensors]:
    """The tensors of each file in turn."""
    count = config["num_hidden_layers"]
    for start in range(0, count, LAYERS_PER_SHARD):
        yield layers(rng, range(start, min(start + LAYERS_PER_SHARD, count)), config)
    yield ends(rng, config)


def write_weights(out: Path, config: dict[str, Any], seed: int) -> int:
    """Write every shard and the index; returns the bytes of all tensors."""
    rng = np.random.default_rng(seed)
    count = -(-config["num_hidden_layers"] // LAYERS_PER_SHARD) + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards(rng, config), start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard is drawn
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def write_tokenizer(out: Path) -> None:
    """A byte-level BPE tokenizer whose tokens are the special ones and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main() -> None:
    """Parse the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Write a randomly weighted packed checkpoint.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error("--layers must be at least 1")
    config = configuration(PRESETS[arguments.preset])
    if arguments.layers is not None:
        config["num_hidden_layers"] = arguments.layers
    try:
        arguments.out.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{arguments.out} exists: choose another folder")
    (arguments.out / "config.json").write_text(json.dumps(config, indent=1))
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (arguments.out / "generation_config.json").write_text(json.dumps(tokens))
    write_tokenizer(arguments.out)
    total = write_weights(arguments.out, config, arguments.seed)
    print(f"{arguments.out}: {config['num_hidden_layers']} layers, {total / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
