"""Every target, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from bitcompile.errors import ToolchainError, UsageError
from bitcompile.target import Target
from bitcompile.targets.adreno import ADRENO
from bitcompile.targets.android import ANDROID
from bitcompile.targets.arm import ARM
from bitcompile.targets.cuda import CUDA
from bitcompile.targets.ios import IOS
from bitcompile.targets.macos import MACOS
from bitcompile.targets.mali import MALI
from bitcompile.targets.opencl import OPENCL
from bitcompile.targets.x86 import X86

TARGETS: dict[str, Target] = {
    target.name: target for target in (X86, ARM, ANDROID, MACOS, IOS, CUDA, OPENCL, MALI, ADRENO)
}

NATIVE = "native"


def resolve(
    name: str = NATIVE, host: str | None = None, choices: Mapping[str, str] | None = None
) -> Target:
    """The target called ``name``; ``native`` is the first CPU target this machine runs.

    ``host``: triple of the machine that loads the artifact (or the start of it, such as
    ``x86_64-linux``), if not the target's own; ``choices``: options that only some targets have.
    Raises UsageError for an unknown target, host or choice, ToolchainError if this machine runs
    none.
    """
    if name == NATIVE:
        here = [t for t in TARGETS.values() if t.device == "cpu" and t.can_run_here() is None]
        if not here:
            raise ToolchainError(f"no target runs on this machine; choose one of {known()}")
        target = here[0]
    elif name in TARGETS:
        target = TARGETS[name]
    else:
        raise UsageError(f"unknown target {name!r}; choose one of {NATIVE}, {known()}")
    triple = _triple(target, host)
    for option, value in (choices or {}).items():
        if value not in target.choices.get(option, ()):
            raise UsageError(_no_choice(target, option, value))
    if target.vary is not None and (triple != target.host or choices):
        return target.vary(triple, choices or {})
    return target


def _triple(target: Target, host: str | None) -> str:
    """The target's triple that ``host`` is, or begins."""
    triples = (target.host, *target.hosts)
    for triple in triples:
        rest = triple[len(host or triple) :]
        if host is None or (triple.startswith(host) and (not rest or rest[0] in "-.")):
            return triple
    raise UsageError(
        f"target {target.name} builds for host {' or '.join(triples)}, not {host}: "
        "`bitcompile targets` lists the target of every host"
    )


def _no_choice(target: Target, option: str, value: str) -> str:
    if option in target.choices:
        known = ", ".join(target.choices[option])
        return f"--{option} of target {target.name} must be one of {known}, not {value}"
    having = [t.name for t in TARGETS.values() if option in t.choices]
    return f"target {target.name} has no --{option}: it is an option of {', '.join(having)}"


def known() -> str:
    """The targets' names, for messages."""
    return ", ".join(TARGETS)


__all__ = ["NATIVE", "TARGETS", "resolve"]
