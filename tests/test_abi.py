from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitcompile.custom_ops.csrc
from tests.tools import onnxruntime_headers

CSRC = Path(bitcompile.custom_ops.csrc.__path__[0])


def compile_check(text: str, folder: Path, headers: Path) -> subprocess.CompletedProcess[str]:
    (folder / "ort_abi.h").write_text(text)
    (folder / "abi_check.cc").write_text((CSRC / "abi_check.cc").read_text())
    command = [sys.executable, "-m", "ziglang", "c++", "-std=c++17", "-w"]
    command += [f"-I{folder}", f"-I{headers}", "-c", str(folder / "abi_check.cc")]
    command += ["-o", str(folder / "abi_check.o")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_our_declarations_match_the_real_headers(tmp_path: Path) -> None:
    headers = onnxruntime_headers()
    done = compile_check((CSRC / "ort_abi.h").read_text(), tmp_path, headers)
    assert done.returncode == 0, done.stderr


def test_the_check_notices_a_wrong_slot(tmp_path: Path) -> None:
    headers = onnxruntime_headers()
    text = (CSRC / "ort_abi.h").read_text()
    wrong = text.replace("ReleaseAllocator, 132", "ReleaseAllocator, 133")
    assert wrong != text
    done = compile_check(wrong, tmp_path, headers)
    assert done.returncode != 0
    assert "slot of ReleaseAllocator" in done.stderr
