"""What runs on phones, here: the programs for Android under qemu, the script with a fake adb."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bitcompile.artifact import Artifact
from bitcompile.errors import UsageError
from bitcompile.targets import resolve
from bitcompile.targets.tir.linking import ANDROID, zig
from tests import artifacts, tools
from tests.device import conformance_program, phone, vectors
from tests.gpu import opencl as gpu_folder

HERE = Path(__file__).parent
ADB = HERE / "device" / "fake_adb"
LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")
ARM = "aarch64-linux-gnu.2.28"
OPTIONS = ("--threads", "2", "--prompt", "12", "--seconds", "0")
BIONIC = """\
extern void exit(int) __attribute__((noreturn));
void __libc_init(void *stack, void *unused, int (*main)(int, char **), const void *structors) {
  (void)unused, (void)structors;
  exit(main((int)*(long *)stack, (char **)stack + 1));
}
"""
"""Beside the symbols of glibc, all that a program for Android needs."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    tools.opencl_driver()
    return artifacts.write(tmp_path_factory.mktemp("device") / "out", target="opencl")


@pytest.fixture
def fake_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for a phone."""
    monkeypatch.setenv("FAKE_PHONE", str(tmp_path))
    return tmp_path


def test_the_report_of_a_phone(
    made: Artifact, fake_phone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phone.main([str(made.path), "--adb", str(ADB), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert out.startswith("### bitcompile ")
    assert "- phone: fake manufacturer fake model\n" in out
    assert "serial" not in out
    for isa in ("opencl", "portable"):
        assert f"| {isa} | exact |" in out
    assert "dot product: plain" in out
    assert "| all of these nodes | CPU ms | GPU ms |" in out
    assert "offload: " in out
    assert not (fake_phone / "data/local/tmp/bitcompile").exists()


def test_a_wrong_value_on_the_phone_fails(
    made: Artifact,
    fake_phone: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(path: Path, write: object = vectors.write) -> int:
        count: int = write(path)  # type: ignore[operator]
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x40  # of the last expected value
        path.write_bytes(data)
        return count

    monkeypatch.setattr(vectors, "write", spoiled)
    assert phone.main([str(made.path), "--adb", str(ADB), *OPTIONS]) == 1
    out = capsys.readouterr().out
    assert "| opencl | FAILED |" in out
    assert "1 values differ" in out
    assert "offload" not in out


def test_adb_that_is_not_there_or_fails(
    made: Artifact, fake_phone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phone.main([str(made.path), "--adb", "/nowhere/adb"]) == 4
    assert "cannot run /nowhere/adb" in capsys.readouterr().err
    assert phone.main([str(made.path), "--adb", "/bin/false"]) == 4
    assert "adb shell failed: no message" in capsys.readouterr().err
    assert phone.main([str(fake_phone / "none")]) == 3


def test_vectors_hold_every_operator_at_decode_and_prefill(tmp_path: Path) -> None:
    count = vectors.write(tmp_path / "vectors")
    names = [name for name, *_ in vectors.nodes()]
    assert count > 2 * len(names)
    assert {op for _, op, *_ in vectors.nodes()} == {
        "BitLinear", "NormBitLinear", "BitGLU", "HeadLinear"}  # fmt: skip
    assert max(len(inputs["x"]) for *_, inputs in vectors.nodes()) > 8
    assert any(np.isnan(inputs["x"]).any() for *_, inputs in vectors.nodes())


def test_programs_for_android_run(tmp_path: Path) -> None:
    """Under qemu, on glibc: every CPU variant is exact, and without a GPU nothing is chosen."""
    tools.require("libc6-arm64-cross", LIBRARIES.is_dir())
    target = resolve("mali")
    library = target.compile()[0]
    (tmp_path / "libc.c").write_text(BIONIC)
    (tmp_path / "libdl.c").touch()
    for name in ("libc", "libdl"):
        shared = ["-shared", "-fPIC", f"-Wl,-soname,{name}.so", str(tmp_path / f"{name}.c")]
        zig(["cc", "-target", ARM, *shared, "-o", str(tmp_path / f"{name}.so")])
    conformance_program(ANDROID, target.host, tmp_path / "conformance")
    vectors.write(tmp_path / "vectors")
    loader = [tools.program("qemu-aarch64"), "-cpu", "max", LIBRARIES / "ld-linux-aarch64.so.1"]
    loader += ["--library-path", f"{tmp_path}:{LIBRARIES}"]

    def run(*words: str | Path) -> str:
        command = [str(word) for word in (*loader, *words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = run(tmp_path / "conformance", library, tmp_path / "vectors", *target.isas)
    assert table.count("| exact |") == 3
    assert "| mali | not run: bitcompile: no OpenCL driver" in table
    made = artifacts.write(tmp_path / "out", target="mali")
    said = run(made.path / "calibrate", made.path)
    assert "all on the CPU: bitcompile: no OpenCL driver" in said
    assert made.library.with_name(made.library.name + ".offload").read_text().startswith("none\n")


def test_the_folder_for_a_machine_with_an_nvidia_gpu(tmp_path: Path) -> None:
    """Here its programs run on PoCL; no shape is measured."""
    tools.opencl_driver()
    folder = tmp_path / "gpu"
    gpu_folder.carry(folder)
    cache = tmp_path / "cache"
    environment = {**os.environ, "BITCOMPILE_CACHE": str(cache)}
    command = [folder / "run", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| opencl | exact |" in done.stdout
    assert "| N x K | read | gemv |" in done.stdout
    assert [path.suffix for path in cache.iterdir()] == [".bin"]
    with pytest.raises(UsageError, match="exists: remove it"):
        gpu_folder.carry(folder)
