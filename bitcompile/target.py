"""What a target is: frozen data, and the few functions that compile for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Kernel:
    """One row of a plugin's kernel table."""

    name: str
    """Role in the plugin, such as ``gemv`` or ``norm_quantize``."""
    isa: str
    symbol: str
    """C symbol of the compiled function."""


def _nothing(library: Path) -> Mapping[str, Path]:
    return {}


def _no_text(graph: ir.Graph) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Target:
    """One place an artifact can run.

    A new target is one file in ``targets/`` and one line in its table.
    """

    name: str
    device: str
    """``cpu`` or the GPU's programming interface."""
    host: str
    """Triple of the machine that loads the plugin, as ``zig cc -target`` spells it."""
    isas: tuple[str, ...]
    """Kernel variants in the plugin, best first; one is chosen when it is loaded."""
    layouts: tuple[str, ...]
    """Weight layouts its kernels read, preferred first."""
    library: str
    """File name of the plugin."""
    emits: str
    """What a build leaves, in a few words."""
    compile: Callable[[], tuple[Path, tuple[Kernel, ...]]]
    """Compile and link the plugin (or find it in the cache): its path and kernel table."""
    can_run_here: Callable[[], str | None]
    """None if this machine can run it, else what is missing."""
    can_build_here: Callable[[], str | None]
    """None if this machine can build it, else what is missing and how to get it."""
    embeds: Callable[[Path], Mapping[str, Path]] = _nothing
    """Further files of an artifact, by their names there, given the compiled plugin."""
    texts: Callable[[ir.Graph], Mapping[str, str]] = _no_text
    """Further text files of an artifact, by their names there, given the lowered graph."""
    guide: tuple[str, ...] = ("python", "genai", "c")
    """Sections of an artifact's README, by their names in ``companions.SECTIONS``."""
    hosts: tuple[str, ...] = ()
    """Other triples it builds for, through ``vary``."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Build options that only some targets have, and their values, the default first."""
    vary: Callable[[str, Mapping[str, str]], Target] | None = None
    """The same target for a triple of ``hosts`` (or its own), and with other choices."""
    activations: str = "float32"
    """Element type between operators of a language model, where attention has no float32 kernel:
    ``float16`` or ``bfloat16``, else ``float32``."""
    heads: tuple[str, ...] = ("q8", "q4", "float")
    """Embedding and head tables it has kernels for, a checkpoint's default first."""
    grouped: bool = True
    """Whether there are kernels for weights with a scale per group of columns."""
    auto_layout: Callable[[int], tuple[str, str]] | None = None
    """What ``--layout auto`` takes for ternary weights of so many bytes at 2 bits each: a layout's
    id, and why. None: always the first of ``layouts``."""
