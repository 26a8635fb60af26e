"""GGUF files written with the gguf package's own writer, from tiny checkpoints of transformers.

Nothing here is shared with the front end: names come from the package's map, I2_S is packed from
the documented order by index, and query and key rows are permuted as llama.cpp's
converter does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

I2_S, Q2_0 = 36, 42
TAIL = 32
SUB_NORMS = {
    "self_attn.attn_sub_norm": "self_attn.inner_attn_ln",
    "mlp.ffn_sub_norm": "mlp.ffn_layernorm",
}
"""transformers' names to those the package's map knows."""
ORDERS = {"k128": (32, 128), "k64": (16, 64)}
"""Distance of the four columns of a byte, and columns of a block."""


def i2s_bytes(weight: np.ndarray, scale: float, order: str) -> np.ndarray:
    """An I2_S tensor of ternary ``[N, K]``: int8 ``[N K / 4 + 32]``."""
    N, K = weight.shape
    n, k = np.indices((N, K))
    if order == "n4":
        byte, field = n // 4 * K + k, n % 4
    else:
        distance, block = ORDERS[order]
        i = n * K + k
        byte, field = i // block * distance + i % distance, i % block // distance
    packed = np.zeros(N * K // 4, np.uint8)
    for f in range(4):
        packed[byte[field == f]] |= ((weight[field == f] + 1) << (6 - 2 * f)).astype(np.uint8)
    tail = np.frombuffer(np.float32(scale).tobytes() + b"\xaa" * (TAIL - 4), np.uint8)
    return np.concatenate([packed, tail]).view(np.int8)


def q2_bytes(weight: np.ndarray, scale: Any, columns: int) -> np.ndarray:
    """A Q2_0 tensor of ternary ``[N, K]``, one block at a time: uint8 ``[N, bytes of a row]``."""
    spread = np.broadcast_to(spread_scale(scale, weight.shape), weight.shape)
    blocks = bytearray()
    for codes, scales in zip(
        (weight + 1).reshape(-1, columns), spread.reshape(-1, columns), strict=True
    ):
        blocks += np.float16(scales[0]).tobytes()
        for i in range(0, columns, 4):
            blocks.append(sum(int(codes[i + j]) << 2 * j for j in range(4)))
    return np.frombuffer(bytes(blocks), np.uint8).reshape(len(weight), -1)


def spread_scale(scale: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A scalar, or ``[N, G]``, as one float32 a weight."""
    values = np.asarray(scale, np.float32)
    return values if values.ndim == 0 else np.repeat(values, shape[1] // values.shape[1], axis=1)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as llama.cpp's converter stores them, one at a time."""
    D = len(rows) // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for i in range(D // 2):
            for half in range(2):
                result[head * D + 2 * i + half] = rows[head * D + half * (D // 2) + i]
    return result


def write(
    path: Path,
    model: Any,
    architecture: str,
    ternary: Mapping[str, tuple[np.ndarray, Any]],
    kind: Any = "k128",
    *,
    table: Any = Type.F16,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    extra: Mapping[str, np.ndarray] | None = None,
    edit: Callable[[str, np.ndarray], np.ndarray] = lambda _, data: data,
) -> Path:
    """Write ``model`` (transformers) as ``architecture``.

    ``ternary``: module name to int8 ``[N, K]`` and scale, or scales ``[N, G]``. ``kind``: an order
    of I2_S, columns of a block of Q2_0, or a type of the package. ``table``: type of the embedding.
    ``edit`` may change a tensor's stored bytes.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_parameters(writer, config)
    metadata(writer)
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(architecture, gguf.MODEL_ARCH.BITNET)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = {name: value for name, value in model.state_dict().items() if "_scale" not in name}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        stored = f"{_stored_name(names, module)}.{leaf}"
        weight = leaf == "weight" and module in ternary
        values = ternary[module][0] if weight else value.detach().float().numpy()
        if leaf == "bias" and module in ternary:
            values = values * np.float32(ternary[module][1])  # transformers scales the sum
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            key = module.endswith("k_proj")
            heads = config.num_key_value_heads if key else config.num_attention_heads
            values = permuted(values, heads)
        if weight:
            _add_ternary(writer, stored, values, ternary[module][1], kind, edit)
        elif values.ndim == 2:
            _add(writer, stored, values, table)
        else:
            writer.add_tensor(stored, values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored_name(names: Any, module: str) -> str:
    for ours, known in SUB_NORMS.items():
        module = module.replace(ours, known)
    if module == "lm_head":
        return "output"
    found = names.get_name(module)
    assert found is not None, module
    return str(found)


def _add_parameters(writer: gguf.GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> None:
    if kind == Type.F32:
        writer.add_tensor(name, values)
    elif kind == Type.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _add_ternary(
    writer: gguf.GGUFWriter,
    name: str,
    weight: np.ndarray,
    scale: Any,
    kind: Any,
    edit: Callable[[str, np.ndarray], np.ndarray],
) -> None:
    if isinstance(kind, str):
        data = edit(name, i2s_bytes(weight, scale, kind))
        writer.add_tensor(name, data, raw_shape=weight.shape, raw_dtype=I2_S)
        return
    if type(kind) is int:
        data = edit(name, q2_bytes(weight, scale, kind))
        writer.add_tensor(name, data.view(np.int8), raw_shape=weight.shape, raw_dtype=Q2_0)
        return
    values = weight.astype(np.float32) * spread_scale(scale, weight.shape)
    if kind in (Type.F16, Type.F32):
        _add(writer, name, values, kind)
        return
    data = edit(name, gguf.quants.quantize(values, kind))
    writer.add_tensor(name, data, raw_dtype=kind)


def ternary_of(model: Any) -> dict[str, tuple[np.ndarray, float]]:
    """int8 weight and scale of each ternary layer of ``checkpoints.make``'s model, DIRECT form."""
    from transformers.integrations.bitnet import AutoBitLinear

    return {
        name: (
            module.weight.detach().numpy().astype(np.int8, copy=True),
            float(module.weight_scale.item()),
        )
        for name, module in model.named_modules()
        if isinstance(module, AutoBitLinear)
    }


def byte_level(tokenizer_json: Path, pre: str) -> Callable[[gguf.GGUFWriter], None]:
    """Metadata of a byte-level BPE tokenizer, from its tokenizer.json."""
    document = json.loads(tokenizer_json.read_text())
    vocabulary = document["model"]["vocab"]
    special = {token["content"] for token in document["added_tokens"]}
    vocabulary = {**vocabulary, **{t["content"]: t["id"] for t in document["added_tokens"]}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(True)

    return add


def rope_factors(config: Any) -> np.ndarray:
    """What llama.cpp's converter writes to rope_freqs.weight for llama3 scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    D = config.head_dim
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return np.asarray((plain / scaled).numpy())
