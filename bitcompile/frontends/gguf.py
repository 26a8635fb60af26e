"""GGUF files with ternary weights (bitnet.cpp, llama.cpp) to the portable form.

The metadata become a transformers configuration of one of :data:`FAMILIES`, the tensors take
transformers' names, and from there the path is that of a Hugging Face checkpoint
(:mod:`bitcompile.frontends.assembly`). Ternary weights are I2_S, TQ1_0, TQ2_0
(:mod:`bitcompile.frontends.gguf_ternary`) or floats of which every value is -s, 0 or s; tables and
norms are any type the ``gguf`` package dequantises.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile.errors import InputError, UsageError
from bitcompile.frontends import gguf_ternary
from bitcompile.frontends.assembly import (
    PACKAGES,
    Progress,
    assemble,
    configuration,
    language_model,
)
from bitcompile.frontends.checkpoint import WeightForm
from bitcompile.frontends.gguf_order import Layer, i2s_order
from bitcompile.frontends.surroundings import quiet, require_packages
from bitcompile.model import Imported
from bitcompile.packing import PackedTernary

if TYPE_CHECKING:
    from bitcompile.frontends.gguf_file import GgufFile

SETTINGS = "the metadata"


@dataclass(frozen=True)
class Family:
    """What ``general.architecture`` stands for."""

    build: str
    """Class of transformers."""
    hidden_act: str
    """Activation of the gate: fixed by the architecture in llama.cpp and bitnet.cpp."""
    permuted: bool = False
    """Query and key rows are in the order of interleaved rotary pairs (see :func:`unpermuted`)."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "silu", permuted=True),
    "qwen2": Family("Qwen2ForCausalLM", "silu"),
    "qwen3": Family("Qwen3ForCausalLM", "silu"),
    "bitnet": Family("BitNetForCausalLM", "silu"),
    "bitnet-25": Family("BitNetForCausalLM", "relu2"),
    "bitnet-b1.58": Family("BitNetForCausalLM", "relu2"),
}
"""By the name in the file. Falcon3, Falcon-E and Llama3-1.58 are ``llama``; the models of 1bitLLM
are ``bitnet``, BitNet b1.58 2B-4T is ``bitnet-b1.58`` and was ``bitnet-25``."""

TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
"""Module within ``model.layers.N`` to name within ``blk.N``."""
TABLES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
INNER_NORM, GGUF_INNER_NORM = ".rms_norm", "_norm_in"
"""Suffix of the norm inside a projection, in transformers and in bitnet.cpp."""
HEADS = "attention.head_count"
ENDS = ("eos", "eot", "eom")
"""Tokens that end a text: of the sequence, the turn, the message."""
DEFAULT_ROPE_BASE = 10000.0
"""What llama.cpp takes for a file without ``rope.freq_base``."""
ROLES = {
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "value": "attn_v",
    "output": "attn_output",
}
"""The weights of a layer that tell the order of I2_S codes (``gguf_order.Layer``)."""
SAMPLED_LAYERS = 8
ROPE_FREQS = "rope_freqs.weight"
"""What the rotary frequencies are divided by: how llama.cpp stores llama3 scaling."""


def load(
    path: str,
    context: int | None = None,
    progress: Progress | None = None,
    *,
    order: str | None = None,
) -> Imported:
    """Convert the GGUF file ``path`` to portable ONNX, as ``huggingface.load`` does a checkpoint.

    ``order``: one of ``gguf_ternary.I2S_ORDERS``, where the file cannot tell. The tokenizer's files
    are temporary: they exist as long as the result's ``language``. Raises InputError for a file
    that is damaged, not supported or ambiguous, UsageError for a context the model does not have or
    an unknown order, ToolchainError if the packages of ``bitcompile[build]`` are missing.
    """
    report = progress or (lambda _: None)
    require_packages(*PACKAGES, "gguf")
    if order is not None and order not in gguf_ternary.I2S_ORDERS:
        raise UsageError(f"I2_S order {order!r} is not one of {', '.join(gguf_ternary.I2S_ORDERS)}")
    folder = Path(tempfile.mkdtemp(prefix="bitcompile-"))
    try:
        with quiet():
            imported = _convert(path, context, report, order, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(imported.language, shutil.rmtree, folder, ignore_errors=True)
    return imported


def _convert(
    path: str, context: int | None, report: Progress, order: str | None, folder: Path
) -> Imported:
    import transformers

    from bitcompile.frontends import gguf_tokenizer
    from bitcompile.frontends.export import export
    from bitcompile.frontends.gguf_file import GgufFile

    report("reading metadata")
    file = GgufFile(path)
    metadata = Metadata(file)
    build = getattr(transformers, metadata.family.build)
    config = configuration(build, metadata.config(), SETTINGS)
    files = gguf_tokenizer.write(file.metadata, folder)
    language = language_model(config, context, metadata.token_ids, files, SETTINGS)
    report("reading weights")
    weights = GgufWeights(file, metadata, order)
    causal = assemble(build, config, weights, metadata.form())
    report("exporting graph")
    graph = export(causal, language.context_length, language.head_size, weights.rope_divisor)
    return Imported(graph=graph, source=file.name, language=language)


class Metadata:
    """The metadata of a file as transformers' configuration; raises InputError if not supported."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.values = file.metadata
        architecture = self.values.get("general.architecture")
        if architecture not in FAMILIES:
            raise InputError(
                f"GGUF architecture {architecture!r} is not supported; supported: "
                f"{', '.join(FAMILIES)}"
            )
        self.architecture = str(architecture)
        self.family = FAMILIES[self.architecture]
        for key in ("pooling_type", "expert_count"):
            if self.get(key):
                raise InputError(
                    f"{self.architecture}.{key} is {self.get(key)}: embedding and expert models "
                    "are not supported as GGUF; use the Hugging Face checkpoint"
                )
        if not self.get("attention.causal", True):
            raise InputError(f"{self.architecture}.attention.causal is false: only causal models")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture, or its default."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        """A number of the architecture; raises InputError if it is none, or there is no default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise InputError(
                f"{self.architecture}.{key} is {value!r}, not a number: damaged metadata, convert "
                "the model again"
            )
        return value

    def config(self) -> dict[str, Any]:
        """What transformers' configuration class of the family takes."""
        hidden, heads = self.number("embedding_length", int), self.number(HEADS, int)
        if heads < 1 or hidden < 1:
            raise InputError(f"{heads} attention heads of {hidden} columns: damaged metadata")
        values = {
            "hidden_size": hidden,
            "intermediate_size": self.number("feed_forward_length", int),
            "num_hidden_layers": self.number("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number(f"{HEADS}_kv", int, heads),
            "head_dim": self._head_size(hidden // heads),
            "max_position_embeddings": self.number("context_length", int),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", float),
            "rope_parameters": self._rope(),
            "vocab_size": self._vocabulary(),
            "hidden_act": self.family.hidden_act,
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.file.tensors,
        }
        window = self.get("attention.sliding_window")
        return {**values, "sliding_window": window} if window else values

    def form(self) -> WeightForm:
        """Which layers are ternary (all but the head), and whether each has a norm."""
        norm = f"blk.0.attn_q{GGUF_INNER_NORM}.weight" in self.file.tensors
        eps = self.number("attention.layer_norm_rms_epsilon", float)
        return WeightForm("autobitlinear", True, False, norm, float(eps), None)

    def token_ids(self, name: str) -> Any:
        """Value of a transformers key such as ``eos_token_id``; end of turn ends a text too."""
        if name == "eos_token_id":
            ids = [self.values.get(f"tokenizer.ggml.{role}_token_id") for role in ENDS]
            return list(dict.fromkeys(i for i in ids if i is not None))
        key = "padding_token_id" if name == "pad_token_id" else name
        return self.values.get(f"tokenizer.ggml.{key}")

    def _head_size(self, default: int) -> int:
        size = self.number("attention.key_length", int, default)
        rotated = self.number("rope.dimension_count", int, size)
        values = self.number("attention.value_length", int, size)
        if rotated != size or values != size:
            raise InputError(
                f"heads of {size} columns with {rotated} rotated and {values} values are not "
                "supported: all three must be equal"
            )
        return int(size)

    def _rope(self) -> dict[str, Any]:
        theta = float(self.number("rope.freq_base", float, DEFAULT_ROPE_BASE))
        kind = self.get("rope.scaling.type", "none")
        factor = self.number("rope.scaling.factor", float, self.get("rope.scale_linear", 1.0))
        if kind in ("none", "linear") and factor in (0.0, 1.0):  # 0: not scaled, as in llama.cpp
            return {"rope_type": "default", "rope_theta": theta}
        if kind != "linear":
            raise InputError(
                f"rope.scaling.type {kind!r} with factor {factor} is not supported in GGUF files; "
                "use the Hugging Face checkpoint"
            )
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}

    def _vocabulary(self) -> int:
        """Rows of the embedding table, which may exceed the tokenizer's tokens."""
        table = self.file.tensors.get("token_embd.weight")
        if table is None:
            raise InputError(f"{self.file.name} has no tensor token_embd.weight: not a whole model")
        return table.shape[0]


class GgufWeights:
    """The tensors of a GGUF file under transformers' names (``assembly.Weights``)."""

    def __init__(self, file: GgufFile, metadata: Metadata, order: str | None) -> None:
        self.settings = SETTINGS
        self.file = file
        self.metadata = metadata
        self._order = order
        self._used: set[str] = set()
        self.rope_divisor = self._rope_divisor()

    def __contains__(self, name: str) -> bool:
        return gguf_name(name) in self.file.tensors

    def floats(self, name: str, shape: tuple[int, ...]) -> Any:
        """See ``assembly.Weights``."""
        import torch

        stored = self._take(name, shape)
        return torch.from_numpy(self.file.floats(stored).copy())

    def ternary(self, module: str, N: int, K: int) -> PackedTernary:
        """See ``assembly.Weights``."""
        name = self._take(f"{module}.weight", (N, K))
        tensor = self.file.tensors[name]
        if tensor.type_name == "I2_S":
            order = self._i2s_order()
            packed = gguf_ternary.i2s_weight(name, self.file.raw(name), N, K, order)
        elif tensor.type_name in gguf_ternary.BLOCKS:
            raw = self.file.raw(name)
            packed = gguf_ternary.block_weight(name, tensor.type_name, raw, N, K)
        else:
            packed = gguf_ternary.float_weight(name, self.file.floats(name))
        scale = self._rows(module, packed.scale) * self._extra_scale(name)
        return replace(packed, data=self._rows(module, packed.data), scale=scale)

    def bias(self, module: str, weight: PackedTernary) -> Any:
        """See ``assembly.Weights``."""
        import torch

        bias = self.floats(f"{module}.bias", weight.shape[:1]).float().numpy()
        return torch.from_numpy(self._rows(module, bias).copy())

    def unused(self) -> list[str]:
        """See ``assembly.Weights``."""
        return sorted(set(self.file.tensors) - self._used)

    def _take(self, name: str, shape: tuple[int, ...]) -> str:
        stored = gguf_name(name)
        if stored not in self.file.tensors:
            raise InputError(f"{self.file.name} has no tensor {stored}: it is not complete")
        found = self.file.tensors[stored].shape
        if found != shape:
            raise InputError(
                f"{stored} is {list(found)}, the metadata make it {list(shape)}: damaged file"
            )
        self._used.add(stored)
        return stored

    def _extra_scale(self, name: str) -> Any:
        """The factor beside a ternary weight, which some converters store apart; 1 if none."""
        import numpy as np

        stored = name.removesuffix("weight") + "scale"
        if stored not in self.file.tensors:
            return np.float32(1)
        self._used.add(stored)
        values = self.file.floats(stored).astype(np.float32).reshape(-1)
        if values.size != 1 or not np.isfinite(values).all() or values[0] <= 0:
            raise InputError(f"{stored} is not one positive number: damaged file")
        return values[0]

    def _rows(self, module: str, values: Any) -> Any:
        """Rows of a query or key projection in transformers' order, others as they are."""
        if not self.metadata.family.permuted:
            return values
        if module.endswith("q_proj"):
            return unpermuted(values, self.metadata.number(HEADS, int))
        if module.endswith("k_proj"):
            heads = self.metadata.number(HEADS, int)
            return unpermuted(values, self.metadata.number(f"{HEADS}_kv", int, heads))
        return values

    def _i2s_order(self) -> str:
        if self._order is None:
            tensors = self.file.tensors.values()
            shapes = [(t.shape[0], t.shape[1]) for t in tensors if t.type_name == "I2_S"]
            self._order = i2s_order(shapes, self._samples())
        return self._order

    def _samples(self) -> list[Layer]:
        """Some layers, evenly spread, whose weights are all I2_S."""
        count = self.metadata.number("block_count", int)
        heads = self.metadata.number(HEADS, int)
        kv_heads = self.metadata.number(f"{HEADS}_kv", int, heads)
        layers = []
        for i in range(0, count, -(-count // SAMPLED_LAYERS)):
            tensors = {r: self.file.tensors.get(f"blk.{i}.{n}.weight") for r, n in ROLES.items()}
            found = {r: t for r, t in tensors.items() if t is not None and t.type_name == "I2_S"}
            if len(found) == len(ROLES):
                bytes_of = {r: self.file.raw(t.name)[:-4] for r, t in found.items()}
                sized = {r: (bytes_of[r], t.shape[0], t.shape[1]) for r, t in found.items()}
                layers.append(Layer(sized, heads, kv_heads))
        return layers

    def _rope_divisor(self) -> Any:
        """float32 ``[head_size / 2]`` torch tensor, or None."""
        import torch

        if ROPE_FREQS not in self.file.tensors:
            return None
        self._used.add(ROPE_FREQS)
        values = torch.from_numpy(self.file.floats(ROPE_FREQS).copy()).float()
        if values.dim() != 1 or not bool((values.isfinite() & (values > 0)).all()):
            raise InputError(f"{ROPE_FREQS} is not a list of positive numbers: damaged file")
        return values


def gguf_name(name: str) -> str:
    """Name in a GGUF file of a tensor that transformers calls ``name``."""
    module, _, leaf = name.rpartition(".")
    if module in TABLES:
        return f"{TABLES[module]}.{leaf}"
    inner = module.endswith(INNER_NORM)
    _, _, layer, rest = module.removesuffix(INNER_NORM).split(".", 3)
    return f"blk.{layer}.{TENSORS[rest]}{GGUF_INNER_NORM if inner else ''}.{leaf}"


def unpermuted(values: Any, heads: int) -> Any:
    """Rows ``[heads * D, ...]`` of a llama query or key, from interleaved pairs to halves.

    llama.cpp rotates neighbouring rows 2i, 2i+1 of a head, transformers rows i, i + D/2; its
    converter therefore moves row ``h D/2 + i`` of a head to ``2 i + h``, which this undoes.
    """
    if len(values) % (2 * heads):
        raise InputError(f"{len(values)} query or key rows are no {heads} heads: damaged file")
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
