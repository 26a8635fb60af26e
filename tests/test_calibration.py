"""The calibrator: what it measures, what it chooses, and that the plugin does as it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bitcompile import calibration
from bitcompile.artifact import Artifact
from bitcompile.targets.tir.linking import CSRC, zig
from tests import artifacts, tools

HERE = Path(__file__).parent
QUICK = ("-t", "2", "-p", "12", "-s", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny decoder for OpenCL devices of this machine."""
    return artifacts.write(tmp_path_factory.mktemp("calibration") / "out", target="opencl")


def calibrate(
    program: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_artifact_says_what_to_measure(made: Artifact) -> None:
    """One line a kind of node, with the number of them; every ternary node is counted."""
    target, library, *lines = (made.path / calibration.FILE).read_text().splitlines()
    assert (target, library) == ("target opencl", "library libbitcompile_ops.so")
    ops = made.manifest["inspection"]["ops"]
    counted: dict[str, int] = {}
    for line in lines:
        count, op, _ = line.split(" ", 2)
        counted[f"bitcompile::{op}"] = counted.get(f"bitcompile::{op}", 0) + int(count)
    assert counted == {op: n for op, n in ops.items() if op.startswith("bitcompile::")}
    assert " | *f32:Mx64 f32:64 u8:" in lines[0]
    assert made.manifest["files"][calibration.PROGRAM]["bytes"] < 100_000


def test_its_choice_lies_beside_the_plugin(made: Artifact, tmp_path: Path) -> None:
    tools.opencl_driver()
    done = calibrate(made.path / calibration.PROGRAM, *QUICK, made.path,
                     BITCOMPILE_CACHE=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = made.library.with_name(made.library.name + ".offload")
    choice, _, table = written.read_text().partition("\n")
    written.unlink()
    assert choice in ("none", "prefill", "all")
    assert f"offload: {choice}, with 2 threads, for a prompt of 12" in done.stdout
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    kinds = (made.path / calibration.FILE).read_text().count("\n") - 2
    assert len(rows) == 1 + 2 * kinds + 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("lost", "cannot run bc_"), ("no driver", "no OpenCL device: install the GPU's driver")],
)
def test_a_device_that_fails_gets_nothing(
    fault: str, reason: str, made: Artifact, faulty: dict[str, str], tmp_path: Path
) -> None:
    environment = {**faulty, "FAKE_OPENCL": fault, "BITCOMPILE_CACHE": str(tmp_path)}
    if fault == "no driver":
        environment = {"OCL_ICD_VENDORS": f"{tmp_path}/"}
    out = tmp_path / "choice"
    done = calibrate(made.path / "calibrate", *QUICK, "-o", out, made.path, **environment)
    assert done.returncode == 0
    assert out.read_text().startswith("none\n")
    assert reason in done.stdout + done.stderr


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The calibrator over ``fake_host.c``, and an artifact for it."""
    folder = tmp_path_factory.mktemp("staged")
    sources = [str(CSRC / "calibrate.c"), str(HERE / "fake_host.c")]
    zig(["cc", "-std=c11", "-Wall", "-Werror", f"-I{CSRC}", *sources, "-o", str(folder / "run")])
    (folder / calibration.FILE).write_text("target any\nlibrary lib.so\n3 BitLinear\n1 BitGLU\n")
    return folder / "run", folder


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ("10 20 100 200", "none"),
        ("10 20 10000 2000", "prefill"),
        ("20 10 10000 2000", "all"),
        ("10 9.9 100 99", "none"),  # not worth its noise
        ("20 10 1000 3000", "none"),  # a long answer would be worth a slow prompt
        ("200 10 1000 3000", "all"),
    ],
)
def test_the_choice_takes_least_time(
    staged: tuple[Path, Path], times: str, choice: str, tmp_path: Path
) -> None:
    """The rule: a prompt and an answer, and 3 % for what goes to the GPU."""
    program, folder = staged
    out = tmp_path / "choice"
    arguments = ("-p", "64", "-n", "100", "-s", "0.001", "-o", out, folder)
    done = calibrate(program, *arguments, FAKE_TIMES=times)
    assert done.returncode == 0, done.stderr
    assert out.read_text().split()[0] == choice
    cpu, gpu = (f"{4 * float(word) / 1e3:.3f}" for word in times.split()[:2])
    assert f"| a token | {cpu} | {gpu} |" in done.stdout


def test_wrong_results_are_not_chosen(staged: tuple[Path, Path], tmp_path: Path) -> None:
    program, folder = staged
    done = calibrate(program, "-s", "0.001", "-o", tmp_path / "choice", folder,
                     FAKE_TIMES="20 1 20 1", FAKE_WRONG="1")  # fmt: skip
    assert "all on the CPU: the GPU's results are not the CPU's" in done.stdout
    assert (tmp_path / "choice").read_text().startswith("none\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: calibrate"),
        (["-t"], "usage: calibrate"),
        (["-x", "1", "{folder}"], "usage: calibrate"),
        (["-p", "8", "{folder}"], "not a number in range: 8"),
        (["-t", "x", "{folder}"], "not a number in range: x"),
        (["/nowhere"], "for want of /nowhere/calibrate.txt"),
        (["-s", "0", "-o", "/nowhere/choice", "{folder}"], "cannot write /nowhere/choice"),
    ],
)
def test_bad_arguments_give_a_message(
    staged: tuple[Path, Path], arguments: list[str], message: str
) -> None:
    program, folder = staged
    words = [word.replace("{folder}", str(folder)) for word in arguments]
    done = calibrate(program, *words, FAKE_TIMES="1 1 1 1")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_line_that_is_no_node_is_named(made: Artifact, tmp_path: Path) -> None:
    for line in ("1 BitLinear K=", "1 BitLinear K=1 | f32", "1 BitLinear K=1 | f32:x", "1 Other"):
        (tmp_path / calibration.FILE).write_text(f"target t\nlibrary l.so\n{line}\n")
        done = calibrate(made.path / calibration.PROGRAM, tmp_path)
        assert (done.returncode, "not a node" in done.stderr) == (2, True), line
