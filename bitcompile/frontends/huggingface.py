"""Hugging Face checkpoints with ternary weights to the portable form.

Three kinds are known by their configuration:

- decoders of :data:`DECODERS` and encoders of :data:`ENCODERS` with ``quant_method: bitnet``, in
  all three weight forms: packed with a multiplying scale (``autobitlinear``, offline), packed with
  a dividing scale (``bitlinear``), and float master weights (``autobitlinear``, online);
- the same without a ``quantization_config``, if the floats of every linear layer but the head are
  ternary as they stand, with a scale a row or group (:mod:`bitcompile.frontends.exact`);
- ``BitnetForCausalLM`` with ``weight_bits: 1`` and ``input_bits: 8``, the remote-code models of
  1bitLLM: float master weights, and BitNet's layers under other names.

A norm inside each projection (``use_rms_norm``) may be called ``rms_norm`` or, as in published
embedding models, ``norm``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitcompile.errors import InputError, UsageError
from bitcompile.frontends.assembly import (
    PACKAGES,
    Progress,
    assemble,
    configuration,
    language_model,
)
from bitcompile.frontends.checkpoint import CONFIG, Checkpoint, WeightForm, read_json
from bitcompile.frontends.surroundings import quiet, require_packages
from bitcompile.model import Imported
from bitcompile.packing import PackedTernary

DECODERS = (
    "BitNetForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
ENCODERS = ("BitNetModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
REMOTE_BITNET = "BitnetForCausalLM"
"""The class 1bitLLM's checkpoints name; transformers' own is spelled ``BitNetForCausalLM``."""
ARCHITECTURES = (*DECODERS, *ENCODERS, REMOTE_BITNET)
REMOTE_NAMES = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
REMOTE_KEYS = ("hidden_act", "num_key_value_heads", "rms_norm_eps", "rope_theta")
"""Settings whose default differs between 1bitLLM's configuration class and transformers'."""
INNER_NORM, OTHER_INNER_NORM = "_proj.rms_norm.weight", "_proj.norm.weight"
NOT_OURS = ("quantization_config", "attn_implementation", "_attn_implementation")
"""Configuration that would make transformers look for packages an export does not need."""


@dataclass
class CheckpointWeights:
    """The tensors of a checkpoint under transformers' names (``assembly.Weights``)."""

    checkpoint: Checkpoint
    form: WeightForm
    renamed: dict[str, str] = field(default_factory=dict)
    """Module name in transformers to the checkpoint's own."""
    settings: str = CONFIG

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self.checkpoint

    def floats(self, name: str, shape: tuple[int, ...]) -> Any:
        """See ``assembly.Weights``."""
        return self.checkpoint.floats(self._stored(name), shape)

    def ternary(self, module: str, N: int, K: int) -> PackedTernary:
        """See ``assembly.Weights``."""
        return self.form.read(self.checkpoint, module, N, K)

    def bias(self, module: str, weight: PackedTernary) -> Any:
        """See ``assembly.Weights``."""
        return self.form.read_bias(self.checkpoint, module, weight)

    def unused(self) -> list[str]:
        """See ``assembly.Weights``."""
        return self.checkpoint.unused()

    def _stored(self, name: str) -> str:
        if name.endswith(INNER_NORM) and name not in self.checkpoint:
            other = name.removesuffix(INNER_NORM) + OTHER_INNER_NORM
            return other if other in self.checkpoint else name
        return ".".join(self.renamed.get(part, part) for part in name.split("."))


def load(source: str, context: int | None = None, progress: Progress | None = None) -> Imported:
    """Convert the checkpoint ``source``, a directory or Hugging Face id, to portable ONNX.

    ``context``: tokens of the KV cache and rotary tables; default 4096 or the model's limit.
    ``progress`` is called with a short text at the start of each phase. The graph is described in
    :mod:`bitcompile.frontends.export`; its embedding and head keep the checkpoint's float type.
    Encoders (no language-model head) have no cache, and ``Imported.language`` is None.
    Raises InputError for a checkpoint that cannot be converted, UsageError for a context the
    model does not have, ToolchainError if the packages of ``bitcompile[build]`` are missing.
    """
    report = progress or (lambda _: None)
    require_packages(*PACKAGES)
    report("reading configuration")
    checkpoint = Checkpoint.open(source)
    with quiet():
        name = _architecture(checkpoint.config)
        values, weights = _dialect(name, checkpoint)
        if name in ENCODERS:
            return _encoder(name, values, weights, context, report)
        return _decoder(name, values, weights, context, report)


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise InputError(
            f"architecture {names!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return str(names[0])


def _dialect(name: str, checkpoint: Checkpoint) -> tuple[dict[str, Any], CheckpointWeights]:
    """transformers' configuration values of a checkpoint, and its weights."""
    raw = checkpoint.config
    if name != REMOTE_BITNET:
        values = {key: value for key, value in raw.items() if key not in NOT_OURS}
        return values, CheckpointWeights(checkpoint, WeightForm.of(raw))
    bits = raw.get("weight_bits"), raw.get("input_bits")
    if bits != (1, 8) or "quantization_config" in raw:
        raise InputError(
            f"{name} with weight_bits {bits[0]!r}, input_bits {bits[1]!r} "
            f"{'and' if 'quantization_config' in raw else 'without'} a quantization_config is not "
            "supported: only float master weights for weight_bits 1, input_bits 8"
        )
    missing = [key for key in REMOTE_KEYS if raw.get(key) is None]
    if missing:
        raise InputError(f"{CONFIG} of a {name} must give {missing[0]}: complete it")
    values = {key: value for key, value in raw.items() if key not in (*NOT_OURS, "model_type")}
    form = WeightForm.master()
    return values, CheckpointWeights(checkpoint, form, REMOTE_NAMES)


def _decoder(
    name: str,
    values: dict[str, Any],
    weights: CheckpointWeights,
    context: int | None,
    report: Progress,
) -> Imported:
    import transformers

    checkpoint = weights.checkpoint
    build = getattr(transformers, "BitNetForCausalLM" if name == REMOTE_BITNET else name)
    config = configuration(build, values, CONFIG)
    if not getattr(config, "is_causal", True):
        raise InputError(f"is_causal is false in {CONFIG}: a language model must be causal")
    files = checkpoint.tokenizer_files()
    tokens = _TokenIds(checkpoint, config)
    language = language_model(config, context, tokens, files, CONFIG)
    checkpoint.open_weights()
    report("reading weights")
    causal = assemble(build, config, weights, weights.form)
    report("exporting graph")
    from bitcompile.frontends.export import export

    graph = export(causal, language.context_length, language.head_size)
    return Imported(graph=graph, source=checkpoint.name, language=language)


def _encoder(
    name: str,
    values: dict[str, Any],
    weights: CheckpointWeights,
    context: int | None,
    report: Progress,
) -> Imported:
    import transformers

    if context is not None:
        raise UsageError(f"{name} has no cache: leave the context out")
    build = getattr(transformers, name)
    config = configuration(build, values, CONFIG)
    weights.checkpoint.open_weights()
    report("reading weights")
    model = assemble(build, config, weights, weights.form)
    report("exporting graph")
    from bitcompile.frontends.export import export_encoder

    return Imported(graph=export_encoder(model), source=weights.checkpoint.name)


class _TokenIds:
    """Token ids by key: those of generation_config.json, else the configuration's."""

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        path = checkpoint.path / "generation_config.json"
        self.generation = read_json(path) if path.is_file() else {}
        self.config = config

    def __call__(self, name: str) -> Any:
        value = self.generation.get(name)
        return getattr(self.config, name, None) if value is None else value
