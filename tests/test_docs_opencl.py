"""docs/opencl.md names what is there, and its tables follow from the schedules."""

from __future__ import annotations

import re
from pathlib import Path

from bitcompile.targets.opencl import CHOICES
from bitcompile.targets.tir.linking import CSRC
from tests.bench import opencl_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "opencl.md").read_text("utf-8")


def test_tables_are_the_models() -> None:
    assert "\n".join(opencl_model.tables()) in PAGE


def test_every_variable_is_listed() -> None:
    sources = "".join(path.read_text() for path in CSRC.glob("opencl*.c"))
    read = set(re.findall(r'getenv\("(BITCOMPILE_\w+)"\)', sources))
    assert {"BITCOMPILE_OFFLOAD", "BITCOMPILE_CACHE", "BITCOMPILE_CL_DEVICE"} <= read
    assert set(re.findall(r"^\| `(BITCOMPILE_\w+)`", PAGE, re.MULTILINE)) == read


def test_every_dot_product_and_option_is_listed() -> None:
    ways = re.findall(
        r'\{(\d), "(\w*)", "-cl-std=CL([\d.]+)', (CSRC / "opencl_driver.c").read_text()
    )
    assert len(ways) == 5
    for number, extension, version in ways:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {number} |"))
        assert extension in row
        assert f"OpenCL C {version}" in row
    for option, values in CHOICES.items():
        assert f"| `--{option}` | {', '.join(f'`{value}`' for value in values)} |" in PAGE


def test_the_readme_has_every_target() -> None:
    from bitcompile.targets import TARGETS

    table = (ROOT / "README.md").read_text("utf-8").split("| target | runs on", 1)[1]
    rows = table.split("\n\n", 1)[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(TARGETS)
