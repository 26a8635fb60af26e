"""Hugging Face checkpoints with ternary weights to the portable form.

Supported are the architectures of :data:`ARCHITECTURES` with ``quant_method: bitnet`` in all three
weight forms: packed with a multiplying scale (``autobitlinear``, offline), packed with a dividing
scale (``bitlinear``), and float master weights (``autobitlinear``, online).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.frontends.checkpoint import CONFIG, Checkpoint, WeightForm, read_json
from bitcompile.model import Imported, LanguageModel

ARCHITECTURES = (
    "BitNetForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DEFAULT_CONTEXT = 4096
HEAD_MULTIPLE = 16
"""Head sizes GroupQueryAttention rotates on every device (ONNX Runtime 1.32, CPU)."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose angles depend on the position alone."""
EXPORTED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Configuration that chooses what a model returns; a checkpoint's own choice is overridden."""
NOT_OURS = ("quantization_config", "attn_implementation", "_attn_implementation")
"""Configuration that would make transformers look for packages an export does not need."""
Progress = Callable[[str], None]


def load(source: str, context: int | None = None, progress: Progress | None = None) -> Imported:
    """Convert the checkpoint ``source``, a directory or Hugging Face id, to portable ONNX.

    ``context``: tokens of the KV cache and rotary tables; default 4096 or the model's limit.
    ``progress`` is called with a short text at the start of each phase. The graph is described in
    :mod:`bitcompile.frontends.export`; its embedding and head keep the checkpoint's float type.
    Raises InputError for a checkpoint that cannot be converted, UsageError for a context the
    model does not have, ToolchainError if the packages of ``bitcompile[build]`` are missing.
    """
    report = progress or (lambda _: None)
    _require_packages()
    report("reading configuration")
    checkpoint = Checkpoint.open(source)
    form = WeightForm.of(checkpoint.config)
    with _quiet():
        config, build = _configuration(checkpoint.config)
        language = _language(config, checkpoint, context)
        checkpoint.open_weights()
        report("reading weights")
        causal = _build(build, config, checkpoint, form)
        report("exporting graph")
        from bitcompile.frontends.export import export

        graph = export(causal, language.context_length, language.head_size)
    return Imported(graph=graph, source=checkpoint.name, language=language)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep notes of torch and transformers off the terminal: what matters becomes our error."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _require_packages() -> None:
    try:
        import huggingface_hub  # noqa: F401
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ToolchainError(
            f'{error.name} is not installed: pip install "bitcompile[build]"'
        ) from None


def _configuration(raw: dict[str, Any]) -> tuple[Any, Any]:
    """The transformers configuration and model class; raises InputError if not supported."""
    import transformers
    from transformers.activations import ACT2FN

    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise InputError(
            f"architecture {names!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    build = getattr(transformers, names[0])
    values = {key: value for key, value in raw.items() if key not in NOT_OURS}
    try:
        config = build.config_class.from_dict({**values, **EXPORTED})
        rope = (config.rope_parameters or {}).get("rope_type", "default")
    except Exception as error:  # transformers raises many kinds for values of a wrong type
        raise _invalid(error) from None
    if rope not in ROPE_TYPES:
        raise InputError(
            f"rope_type {rope!r} is not supported: its angles depend on the sequence length; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act {config.hidden_act!r} is not known to transformers")
    if not getattr(config, "is_causal", True):
        raise InputError(f"is_causal is false in {CONFIG}: only causal attention is supported")
    return config, build


def _invalid(error: Exception) -> InputError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"{CONFIG} is not valid ({text}): correct it or download it again")


def _language(config: Any, checkpoint: Checkpoint, context: int | None) -> LanguageModel:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"{heads} attention heads cannot share {kv_heads} key/value heads")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not isinstance(head_size, int) or head_size < 1 or head_size % HEAD_MULTIPLE:
        raise InputError(
            f"head size {head_size} is not supported: ONNX Runtime's rotary attention takes "
            f"multiples of {HEAD_MULTIPLE}"
        )
    generation = {}
    if (checkpoint.path / "generation_config.json").is_file():
        generation = read_json(checkpoint.path / "generation_config.json")

    def token(name: str) -> Any:
        value = generation.get(name)
        return getattr(config, name, None) if value is None else value

    return LanguageModel(
        vocab_size=config.vocab_size,
        context_length=_context(config, context),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        bos_token_id=_first(_token_ids("bos_token_id", token("bos_token_id"))),
        eos_token_ids=_token_ids("eos_token_id", token("eos_token_id")),
        pad_token_id=_first(_token_ids("pad_token_id", token("pad_token_id"))),
        tokenizer_files=checkpoint.tokenizer_files(),
    )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise InputError(f"{name} is {value!r}, not a token id or a list of them")
    return tuple(ids)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _context(config: Any, wanted: int | None) -> int:
    """Tokens of cache, within the model's limit; raises UsageError if that is not possible.

    A sliding window changes nothing as long as the cache is no longer than the window, so it is a
    limit here.
    """
    limit, what = config.max_position_embeddings, "max_position_embeddings"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < limit:
        limit, what = window, "sliding_window"
    if limit < 1:
        raise InputError(f"{what} is {limit} in {CONFIG}: it must be at least 1")
    if wanted is None:
        return int(min(DEFAULT_CONTEXT, limit))
    if not 1 <= wanted <= limit:
        raise UsageError(f"context {wanted} is not within 1..{limit}, the model's {what}")
    return wanted


def _build(build: Any, config: Any, checkpoint: Checkpoint, form: WeightForm) -> Any:
    """The model with ternary layers and tables swapped and every other tensor float32."""
    import torch

    try:
        with torch.device("meta"):
            causal = build(config)
    except Exception as error:  # sizes and names that only the layers themselves refuse
        raise _invalid(error) from None
    _swap_linears(causal, checkpoint, form)
    _swap_tables(causal, checkpoint)
    for name, parameter in list(causal.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            value = checkpoint.floats(name, tuple(parameter.shape)).float()
            setattr(causal.get_submodule(parent), leaf, _parameter(value))
    left = [name for name in checkpoint.unused() if not name.endswith("rotary_emb.inv_freq")]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"tensor {left[0]}{more} belongs to no layer of {build.__name__}: correct "
            f"architectures in {CONFIG}"
        )
    return causal


def _swap_linears(causal: Any, checkpoint: Checkpoint, form: WeightForm) -> None:
    """Replace the layers that transformers would make ternary."""
    import torch
    from torch import nn

    from bitcompile.frontends.export import TernaryLinear

    absent = nn.Buffer(torch.zeros(()))
    for name, module in ternary_layers(causal, form):
        if name == "lm_head" and causal.config.tie_word_embeddings:
            raise InputError(
                f"{CONFIG} ties the head to the embedding and makes it ternary: add 'lm_head' to "
                "modules_to_not_convert, or set tie_word_embeddings to false"
            )
        N, K = module.out_features, module.in_features
        weight = form.read(checkpoint, name, N, K)
        bias = None
        if module.bias is not None:
            bias = form.read_bias(checkpoint, name, weight)
        # The weight of an inner norm is read with the other parameters.
        causal.set_submodule(name, TernaryLinear(weight, bias, module.rms_norm, absent))


def ternary_layers(causal: Any, form: WeightForm) -> list[tuple[str, Any]]:
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
        causal, quantization.modules_to_not_convert, causal._keep_in_fp32_modules
    )
    replace_with_bitnet_linear(causal, keep, quantization)
    found = [
        (name, module)
        for name, module in causal.named_modules()
        if isinstance(module, AutoBitLinear | BitLinear)
    ]
    if not found:
        raise InputError(
            f"modules_to_not_convert in {CONFIG} leaves no ternary layer: nothing to compile"
        )
    return found


def _swap_tables(causal: Any, checkpoint: Checkpoint) -> None:
    """Embedding and head read the checkpoint's own tables, one where they are tied."""
    from bitcompile.frontends.export import EMBEDDING_TABLE, HEAD_TABLE, Table, TernaryLinear

    shape = (causal.config.vocab_size, causal.config.hidden_size)
    if causal.config.tie_word_embeddings:
        table = _tied_table(checkpoint, (EMBEDDING_TABLE, HEAD_TABLE), shape)
        causal.model.embed_tokens, causal.lm_head = Table("Lookup", table), Table("Project", table)
        return
    embedding = _parameter(checkpoint.floats(EMBEDDING_TABLE, shape))
    causal.model.embed_tokens = Table("Lookup", embedding)
    if not isinstance(causal.lm_head, TernaryLinear):
        causal.lm_head = Table("Project", _parameter(checkpoint.floats(HEAD_TABLE, shape)))


def _tied_table(checkpoint: Checkpoint, names: tuple[str, str], shape: tuple[int, int]) -> Any:
    """The one table of a tied model, which a checkpoint may hold under either name or both."""
    stored = [name for name in names if name in checkpoint] or list(names[:1])
    table = checkpoint.floats(stored[0], shape)
    if len(stored) == 2 and not table.equal(checkpoint.floats(stored[1], shape)):
        raise InputError(
            f"{CONFIG} ties {names[1]} to {names[0]}, but they differ: set tie_word_embeddings "
            "to false if the head is its own"
        )
    return _parameter(table)


def _parameter(value: Any) -> Any:
    from torch import nn

    return nn.Parameter(value, requires_grad=False)
