"""CUDA kernels of one row, thread by thread on this CPU, and that mistakes in them are noticed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_emulation
from tests.cuda_emulation import KERNELS_TEXT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    cuda_emulation.build(folder)
    return folder


def emulate(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.cuda_emulation", folder]
    return subprocess.run(
        command, env={"LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True, check=False
    )


def test_every_bit_is_that_of_the_reference(built: Path) -> None:
    done = emulate(built)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "91 products and 55 rows\n"


MISTAKES = {
    "sums in another order": (r"(__shfl_xor_sync\([^;]*), 1, 32\)", r"\1, 2, 32)", "type_x=1"),
    "a row read too early": (r"bc_wait_for_earlier\(\);", "", "read before the kernel before"),
    "weights used too early": (r"bc_landed\(", "(void)(", "ended before its copy landed"),
    "sums not cleared": (r"bc_clear4\(", "(void)(", "type_x=1"),
    "a barrier too few": (r"bc_meet_some\(\w+\);", "", "type_x=1"),
    "a barrier for too many": (r"bc_meet\((\w+)\)", r"bc_meet(\1 + 32)", "wait for one another"),
}  # fmt: skip
"""What is wrong: what stands in the kernels' text, what takes its place, and what is said."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(built: Path, tmp_path: Path, mistake: str) -> None:
    pattern, replacement, said = MISTAKES[mistake]
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    text, found = re.subn(pattern, replacement, (built / KERNELS_TEXT).read_text("utf-8"))
    assert found
    (tmp_path / KERNELS_TEXT).write_text(text, "utf-8")
    cuda_emulation.compile_emulator(tmp_path)
    done = emulate(tmp_path)
    assert done.returncode in (1, 3)
    assert said in done.stdout
