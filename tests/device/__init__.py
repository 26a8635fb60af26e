"""What shows on a device, without Python or ONNX Runtime there, whether a plugin is right."""

from __future__ import annotations

from pathlib import Path

from bitcompile.targets.tir.linking import CSRC, System


def conformance_program(system: System, triple: str, out: Path) -> None:
    """Compile ``conformance.c``."""
    assert system.program is not None
    sources = [Path(__file__).with_name("conformance.c"), CSRC / "host.c"]
    system.program(triple, [], sources, out)
