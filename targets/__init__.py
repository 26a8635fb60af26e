"""Every target, one file each."""

from __future__ import annotations

from bitcompile.errors import ToolchainError, UsageError
from bitcompile.target import Target
from bitcompile.targets.x86 import X86

TARGETS: dict[str, Target] = {target.name: target for target in (X86,)}

NATIVE = "native"


def resolve(name: str = NATIVE, host: str | None = None) -> Target:
    """The target called ``name``; ``native`` is the first CPU target this machine runs.

    ``host``: triple of the machine that loads the artifact, if not the target's own. Raises
    UsageError for an unknown target or host, ToolchainError if this machine runs none.
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
    if host is not None and host != target.host:
        raise UsageError(f"target {target.name} builds for host {target.host}, not {host}")
    return target


def known() -> str:
    """The targets' names, for messages."""
    return ", ".join(TARGETS)


__all__ = ["NATIVE", "TARGETS", "resolve"]
