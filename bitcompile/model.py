"""The values that pass between the stages of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from bitcompile.passing import Record
    from bitcompile.target import Kernel, Target


@dataclass(frozen=True)
class LanguageModel:
    """What a runtime must know about a decoder language model."""

    vocab_size: int
    context_length: int
    """Tokens of the KV cache and of the rotary tables."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    tokenizer_files: tuple[Path, ...]
    """Files copied into the artifact as they are (tokenizer.json, chat template, ...)."""


@dataclass(frozen=True)
class Imported:
    """A model in portable form: standard ONNX operators and ``bitcompile::BitLinear`` nodes.

    Every BitLinear carries the portable layout ``i2``; decoders have the input and output names
    of onnxruntime-genai.
    """

    graph: ir.Model
    source: str
    """Where it came from, for the manifest: a name or id, never an absolute path."""
    language: LanguageModel | None = None
    records: tuple[Record, ...] = ()
    """What a front end that recognises ternary layers found, and what it left as it was."""


@dataclass(frozen=True)
class Lowered:
    """A model for one target: weights in the target's layout, and the library that runs it."""

    graph: ir.Model
    target: Target
    layout: str
    library: Path
    kernels: tuple[Kernel, ...]
    layout_reason: str = ""
    """Why this layout, for the manifest."""
