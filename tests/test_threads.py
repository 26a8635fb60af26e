"""Phases on threads (``custom_ops/csrc/threads.c``) under ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bitcompile.targets.tir.linking import CSRC
from tests.tools import program

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("threads") / "threads"
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror"]
    sources = [str(HERE / "threads.c"), str(CSRC / "threads.c")]
    command = [program("gcc"), *flags, f"-I{CSRC}", *sources, "-pthread", "-o", str(out)]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_task_runs_once_after_the_phase_before(harness: Path, threads: int) -> None:
    done = subprocess.run(
        [str(harness), str(threads), "300"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
