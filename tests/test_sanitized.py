"""The C glue under AddressSanitizer and UBSan, and kernels between guard pages."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sanitized
from tests.tools import program

BEYOND = """
import numpy as np
from tests.guards import Guarded
x = Guarded({at_end})((5,), np.int8)
x[:] = 1
np.lib.stride_tricks.as_strided(x, (7,), (1,))[{index}] = 1
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    program("gcc")
    return sanitized.build(tmp_path_factory.mktemp("sanitized"))


def test_no_kernel_leaves_its_buffers(built: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "tests.guards", str(built[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.split("\r")[-1] + done.stderr


def test_the_glue_has_no_reports(built: tuple[Path, Path], tmp_path: Path) -> None:
    sanitized.run(built[0], tmp_path)


@pytest.mark.parametrize(("at_end", "index"), [(True, 5), (False, -1)])
def test_a_step_beyond_a_guarded_buffer_ends_the_process(at_end: bool, index: int) -> None:
    code = BEYOND.format(at_end=at_end, index=index)
    if index < 0:
        code = code.replace("as_strided(x, (7,), (1,))[-1]", "as_strided(x[1:], (2,), (-2,))[1]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV


def test_a_report_fails_the_run(tmp_path: Path) -> None:
    source, made = tmp_path / "wrong.c", tmp_path / "wrong"
    source.write_text("int main(int n, char **v) { char x[4]; x[n + 3] = 1; return x[0] & 0; }\n")
    gcc = [program("gcc"), *sanitized.SANITIZERS, str(source), "-o", str(made)]
    subprocess.run(gcc, check=True, capture_output=True)
    done = subprocess.run([str(made)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "stack-buffer-overflow" in done.stderr or "out of bounds" in done.stderr
