"""What a target is: frozen data, and the few functions that compile for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One row of a plugin's kernel table."""

    name: str
    """Role in the plugin, such as ``gemv`` or ``norm_quantize``."""
    isa: str
    symbol: str
    """C symbol of the compiled function."""


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
