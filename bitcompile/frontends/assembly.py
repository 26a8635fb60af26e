"""A transformers model whose ternary layers, tables and parameters come from a weight file.

Every format that stores a Hugging Face architecture takes this path: the model is built on the
meta device, its ternary layers and tables are swapped, and every other tensor is read as float32,
so that no float weight of a ternary layer ever exists. :mod:`bitcompile.frontends.export` then
exports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bitcompile.errors import InputError, UsageError
from bitcompile.frontends.checkpoint import WeightForm
from bitcompile.model import LanguageModel
from bitcompile.packing import PackedTernary

PACKAGES = ("huggingface_hub", "onnxscript", "safetensors", "torch", "transformers")
"""What this conversion needs."""
DEFAULT_CONTEXT = 4096
HEAD_MULTIPLE = 16
"""Head sizes GroupQueryAttention rotates on every device (ONNX Runtime 1.32, CPU)."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose angles depend on the position alone."""
EXPORTED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Configuration that chooses what a model returns; a checkpoint's own choice is overridden."""
MOST_LAYERS = 1024
"""Several times the deepest models: a damaged count would be built for hours."""
Progress = Callable[[str], None]


class Weights(Protocol):
    """The tensors of a model under the names transformers gives them."""

    settings: str
    """What holds the configuration, for error messages: ``config.json``, ``the metadata``."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def floats(self, name: str, shape: tuple[int, ...]) -> Any:
        """A float tensor (torch) as stored; raises InputError if it is missing or another kind."""

    def ternary(self, module: str, N: int, K: int) -> PackedTernary:
        """The weight of a linear layer in the portable layout; raises InputError likewise."""

    def bias(self, module: str, weight: PackedTernary) -> Any:
        """Its bias as it is added last, float32 torch ``[N]``."""

    def unused(self) -> list[str]:
        """Names of the tensors that were never asked for."""


def configuration(build: Any, values: Mapping[str, Any], settings: str) -> Any:
    """The transformers configuration of class ``build``; raises InputError if not supported."""
    from transformers.activations import ACT2FN

    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(f"{layers} layers in {settings}: damaged, download the model again")
    try:
        config = build.config_class.from_dict({**values, **EXPORTED})
        rope = (config.rope_parameters or {}).get("rope_type", "default")
    except Exception as error:  # transformers raises many kinds for values of a wrong type
        raise _invalid(error, settings) from None
    if rope not in ROPE_TYPES:
        raise InputError(
            f"rope_type {rope!r} is not supported: its angles depend on the sequence length; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act {config.hidden_act!r} is not known to transformers")
    return config


def _invalid(error: Exception, settings: str) -> InputError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"{settings} is not valid ({text}): correct it or download it again")


def language_model(
    config: Any,
    context: int | None,
    tokens: Callable[[str], Any],
    tokenizer_files: tuple[Path, ...],
    settings: str,
) -> LanguageModel:
    """What a runtime must know; ``tokens`` gives the value of a key such as ``eos_token_id``.

    Raises InputError for attention that ONNX Runtime cannot run, UsageError for a ``context`` the
    model does not have.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{heads} attention heads cannot share {kv_heads} key/value heads: correct the "
            f"model's {settings}"
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not isinstance(head_size, int) or head_size < 1 or head_size % HEAD_MULTIPLE:
        raise InputError(
            f"head size {head_size} is not supported: ONNX Runtime's rotary attention takes "
            f"multiples of {HEAD_MULTIPLE}"
        )

    def ids(name: str) -> tuple[int, ...]:
        return _token_ids(name, tokens(name))

    return LanguageModel(
        vocab_size=config.vocab_size,
        context_length=_context(config, context, settings),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        bos_token_id=_first(ids("bos_token_id")),
        eos_token_ids=ids("eos_token_id"),
        pad_token_id=_first(ids("pad_token_id")),
        tokenizer_files=tokenizer_files,
    )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise InputError(f"{name} is {value!r}, not a token id or a list of them")
    return tuple(ids)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _context(config: Any, wanted: int | None, settings: str) -> int:
    """Tokens of cache, within the model's limit; raises UsageError if that is not possible.

    A sliding window changes nothing as long as the cache is no longer than the window, so it is a
    limit here.
    """
    limit, what = config.max_position_embeddings, "max_position_embeddings"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < limit:
        limit, what = window, "sliding_window"
    if limit < 1:
        raise InputError(f"{what} is {limit} in {settings}: it must be at least 1")
    if wanted is None:
        return int(min(DEFAULT_CONTEXT, limit))
    if not 1 <= wanted <= limit:
        raise UsageError(f"context {wanted} is not within 1..{limit}, the model's {what}")
    return wanted


def assemble(build: Any, config: Any, weights: Weights, form: WeightForm) -> Any:
    """The model with ternary layers and tables swapped and every other tensor float32.

    ``form`` says which layers transformers itself would make ternary, and whether each has a norm.
    Raises InputError for a configuration that gives no model, for what ``weights`` refuses, and
    for a tensor that belongs to no layer.
    """
    import torch

    try:
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # sizes and names that only the layers themselves refuse
        raise _invalid(error, weights.settings) from None
    _swap_linears(model, weights, form)
    _swap_tables(model, weights)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            value = weights.floats(name, tuple(parameter.shape)).float()
            setattr(model.get_submodule(parent), leaf, _parameter(value))
    left = [name for name in weights.unused() if not name.endswith("rotary_emb.inv_freq")]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"tensor {left[0]}{more} belongs to no layer of {build.__name__}: correct "
            f"the architecture in {weights.settings}"
        )
    return model


def _swap_linears(model: Any, weights: Weights, form: WeightForm) -> None:
    """Replace the layers that transformers would make ternary."""
    import torch
    from torch import nn

    from bitcompile.frontends.export import TernaryLinear

    absent = nn.Buffer(torch.zeros(()))
    for name, module in ternary_layers(model, form, weights.settings):
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise InputError(
                f"{weights.settings} ties the head to the embedding and makes it ternary: add "
                "'lm_head' to modules_to_not_convert, or set tie_word_embeddings to false"
            )
        weight = weights.ternary(name, module.out_features, module.in_features)
        bias = None if module.bias is None else weights.bias(name, weight)
        # The weight of an inner norm is read with the other parameters.
        model.set_submodule(name, TernaryLinear(weight, bias, module.rms_norm, absent))


def ternary_layers(model: Any, form: WeightForm, settings: str) -> list[tuple[str, Any]]:
    """Name and module of the layers transformers itself would make ternary, on the meta device."""
    from transformers import BitNetQuantConfig
    from transformers.integrations.bitnet import (
        AutoBitLinear,
        BitLinear,
        replace_with_bitnet_linear,
    )
    from transformers.quantizers.base import HfQuantizer

    skipped = form.modules_to_not_convert
    quantization = BitNetQuantConfig(
        modules_to_not_convert=None if skipped is None else list(skipped),
        linear_class=form.linear_class,
        quantization_mode="offline" if form.packed else "online",
        use_rms_norm=form.use_rms_norm,
        rms_norm_eps=form.rms_norm_eps,
    )
    keep = HfQuantizer.get_modules_to_not_convert(
        model, quantization.modules_to_not_convert, model._keep_in_fp32_modules
    )
    replace_with_bitnet_linear(model, keep, quantization)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, AutoBitLinear | BitLinear)
    ]
    if not found:
        raise InputError(
            f"modules_to_not_convert in {settings} leaves no ternary layer: nothing to compile"
        )
    return found


def _swap_tables(model: Any, weights: Weights) -> None:
    """Embedding and head read the file's own tables, one where they are tied.

    An encoder has no head, and its embedding is its own child instead of its ``model``'s.
    """
    from bitcompile.frontends.export import EMBEDDING_TABLE, HEAD_TABLE, Table, TernaryLinear

    config = model.config
    shape = (config.vocab_size, config.hidden_size)
    if not hasattr(model, "lm_head"):
        name = EMBEDDING_TABLE.removeprefix("model.")
        model.embed_tokens = Table("Lookup", _parameter(weights.floats(name, shape)))
        return
    if config.tie_word_embeddings:
        table = _tied_table(weights, (EMBEDDING_TABLE, HEAD_TABLE), shape)
        model.model.embed_tokens, model.lm_head = Table("Lookup", table), Table("Project", table)
        return
    embedding = _parameter(weights.floats(EMBEDDING_TABLE, shape))
    model.model.embed_tokens = Table("Lookup", embedding)
    if not isinstance(model.lm_head, TernaryLinear):
        model.lm_head = Table("Project", _parameter(weights.floats(HEAD_TABLE, shape)))


def _tied_table(weights: Weights, names: tuple[str, str], shape: tuple[int, int]) -> Any:
    """The one table of a tied model, which a file may hold under either name or both."""
    stored = [name for name in names if name in weights] or list(names[:1])
    table = weights.floats(stored[0], shape)
    if len(stored) == 2 and not table.equal(weights.floats(stored[1], shape)):
        raise InputError(
            f"{weights.settings} ties {names[1]} to {names[0]}, but they differ: set "
            "tie_word_embeddings to false if the head is its own"
        )
    return _parameter(table)


def _parameter(value: Any) -> Any:
    from torch import nn

    return nn.Parameter(value, requires_grad=False)
