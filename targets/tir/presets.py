"""Schedules that ``bitcompile tune`` found, by CPU: shipped ones, and those of this machine's user.

A file is ``{cpu: {isa: {"gemv": {...}, "gemm": {...}}}}`` with fields of ``isa.Gemv`` and
``isa.Gemm``; ``cpu`` is ``machine.cpu_model()``, or that without its model, for a whole family.
Schedules never change results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile.errors import InputError, writing
from bitcompile.targets.machine import cpu_model

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa

SHIPPED = Path(__file__).parents[1] / "presets.json"
NAME = "presets.json"

Presets = dict[str, dict[str, dict[str, Any]]]
"""Of one CPU: isa to its schedules."""


def read(path: Path) -> Presets:
    """A presets file, empty if there is none; raises InputError for a damaged one."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): delete it and tune again") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise InputError(f"{path} is no presets file: delete it and tune again")
    return found


def for_this_cpu(own: Path) -> Mapping[str, Mapping[str, Any]]:
    """Schedules by instruction set: the shipped ones of this family, then of this model over them,
    then those in ``own``."""
    cpu, shipped = cpu_model(), read(SHIPPED)
    family = cpu.rpartition("-")[0]
    return {**shipped.get(family, {}), **shipped.get(cpu, {}), **read(own).get(cpu, {})}


def tuned(isas: Iterable[Isa], presets: Mapping[str, Mapping[str, Any]]) -> tuple[Isa, ...]:
    """``isas`` with their schedules; raises InputError for a field that a schedule has not."""
    made = []
    for isa in isas:
        found = presets.get(isa.name, {})
        try:
            schedules = {
                k: replace(getattr(isa, k), **found[k]) for k in ("gemv", "gemm") if k in found
            }
        except TypeError as error:
            raise InputError(f"presets of {isa.name}: {error}: tune again") from None
        made.append(replace(isa, **schedules))
    return tuple(made)


def prepare(path: Path) -> None:
    """Raises InputError for a damaged file, UsageError for one that cannot be written."""
    read(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()


def remember(path: Path, cpu: str, isa: str, schedules: Mapping[str, Any]) -> None:
    """Put the schedules of one instruction set of one CPU into a file."""
    held = read(path)
    held.setdefault(cpu, {})[isa] = dict(schedules)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", "utf-8")
