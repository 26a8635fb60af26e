"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from bitcompile import cli, verification
from bitcompile.artifact import Artifact
from bitcompile.errors import VerificationError
from bitcompile.frontends import huggingface
from bitcompile.pipeline import BuildOptions
from tests import artifacts
from tests.test_generate import feeds


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command line in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("cli") / "out").path


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "out"))


def is_one_error(result: Result, code: int, message: str) -> None:
    assert result.code == code, result
    assert message in result.err
    assert result.err.startswith(("error: ", "internal error: "))
    assert result.err.count("\n") == 1
    assert result.out == ""


# --- build --------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, context: int | None = None, progress: Any = None) -> Any:
        return artifacts.imported(tmp_path / "tokenizer")

    monkeypatch.setattr(huggingface, "load", load)


def test_build_says_what_text_lacks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifacts.imported(tmp_path / "tokenizer")
    language = dataclasses.replace(made.language, tokenizer_files=())
    bare = dataclasses.replace(made, language=language)
    monkeypatch.setattr(huggingface, "load", lambda *_, **__: bare)
    result = run("build", "toy", "-o", tmp_path / "out", "--no-verify")
    assert result.code == 0, result
    assert "needs tokenizer.json and tokenizer_config.json" in result.out
    assert "--prompt" not in result.out
    guide = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "came without tokenizer.json and tokenizer_config.json" in guide


@pytest.mark.usefixtures("toy")
def test_build_says_where_it_lies_and_how_to_run_it(run: Run, tmp_path: Path) -> None:
    result = run("build", "toy", "-o", tmp_path / "out")
    assert result.code == 0, result
    assert f"bitcompile run {tmp_path / 'out'}" in result.out
    assert "operators bit-exact" in result.out
    assert result.err == ""  # no progress where there is no terminal
    again = run("build", "toy", "-o", tmp_path / "out")
    is_one_error(again, 2, "exists: add --force")
    replaced = run("build", "toy", "-o", tmp_path / "out", "--force", "--no-verify", "--json")
    assert replaced.code == 0
    report = json.loads(replaced.out)
    assert report["verification"] is None
    assert report["artifact_bytes"] > 0


def test_build_offers_every_option_once() -> None:
    command = cli.cli.commands["build"]
    assert isinstance(command, click.Command)
    names = [parameter.name for parameter in command.params]
    assert len(names) == len(set(names))
    assert {option.name for option in dataclasses.fields(BuildOptions)} < set(names)


def test_build_of_nothing_is_an_input_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    is_one_error(run("build", tmp_path / "empty", "-o", tmp_path / "out"), 3, "config.json")
    assert not (tmp_path / "out").exists()


# --- run ----------------------------------------------------------------------------------------


def test_run_prints_text_alone(run: Run, artifact: Path) -> None:
    result = run("run", artifact, "--prompt", "hello", "-n", "5", "--threads", "1")
    assert result.code == 0, result
    assert result.out.endswith("\n")
    assert result.err == ""
    long = run("run", artifact, "--prompt", "x" * 150, "-n", "100", "--threads", "1")
    assert long.code == 0, long
    assert long.err == "(the context of 160 tokens is full)\n"


def test_chat_answers_each_line(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "talk").write_text("one\n\ntwo\n")
    with (tmp_path / "talk").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        result = run("run", artifact, "--chat", "-n", "3", "--threads", "1")
    assert result.code == 0, result
    assert result.out.count("\n") >= 2
    assert "> " not in result.out


def test_run_of_tensors(run: Run, artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds())
    arguments = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    result = run("run", artifact, *arguments)
    assert result.code == 0, result
    assert result.out == ""
    assert (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--prompt", "x", "--chat"),
        ("--input", "x.npz"),
        ("--output", "x.npz", "--prompt", "x"),
        ("--prompt", "x", "--temperature", "-1"),
        ("--prompt", "x", "-n", "0"),
        ("--prompt", "x", "--threads", "0"),
        ("--prompt", "x", "--threads", "100000"),
        ("--prompt", "x", "--unknown"),
    ],
)
def test_run_with_arguments_that_do_not_fit(
    run: Run, artifact: Path, arguments: tuple[str, ...]
) -> None:
    assert run("run", artifact, *arguments).code == 2


def test_damage_is_found_before_running(run: Run, copy: Path) -> None:
    data = bytearray((copy / "tokenizer.json").read_bytes())
    data[50] ^= 1
    (copy / "tokenizer.json").write_bytes(data)
    is_one_error(run("run", copy, "--prompt", "x"), 3, "tokenizer.json is corrupted")
    is_one_error(run("verify", copy), 3, "tokenizer.json is corrupted")
    is_one_error(run("run", copy.parent / "none", "--prompt", "x"), 3, "no artifact at")


def test_damaged_configurations_are_input_errors(run: Run, copy: Path) -> None:
    """Also unchecked, and for every command that reads them."""
    unchecked = ("run", copy, "--prompt", "x", "--no-check")
    (copy / "genai_config.json").write_text("x" * (copy / "genai_config.json").stat().st_size)
    is_one_error(run(*unchecked), 3, "onnxruntime-genai cannot load")
    artifacts.rewrite_manifest(copy, inspection={}, options={})
    for arguments in (("inspect", copy), ("verify", copy), ("bench", copy), unchecked):
        is_one_error(run(*arguments), 3, "'options.head' is missing or damaged")
    (copy / "bitcompile.json").write_text("[" * 100_000)
    for arguments in (("inspect", copy), ("verify", copy), ("bench", copy), unchecked):
        is_one_error(run(*arguments), 3, "bitcompile.json is unreadable")


def test_damaged_tensors_are_an_input_error(run: Run, artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds())
    os.truncate(tmp_path / "in.npz", 500)
    arguments = ("--input", tmp_path / "in.npz", "--output")
    is_one_error(run("run", artifact, *arguments, tmp_path / "out.npz"), 3, "cannot read")
    is_one_error(run("run", artifact, *arguments, tmp_path / "no" / "out.npz"), 2, "cannot write")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_the_vocabulary_does_not_have(
    run: Run, artifact: Path, tmp_path: Path, token: int
) -> None:
    arrays = feeds()
    arrays["input_ids"][0, -1] = token
    np.savez(tmp_path / "in.npz", **arrays)
    arguments = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    is_one_error(run("run", artifact, *arguments), 3, f"has token {token}: they go from 0 to")


@pytest.mark.usefixtures("toy")
def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    build = ("build", "toy", "-o", tmp_path / "out", "--dump", tmp_path / "file")
    is_one_error(run(*build), 2, "cannot write")
    is_one_error(run("build", "toy", "-o", tmp_path / ("x" * 256)), 2, "File name too long")


def test_a_plugin_for_another_machine_is_a_toolchain_error(run: Run, copy: Path) -> None:
    target = {"name": "pi", "device": "cpu", "host": "riscv64-linux-gnu", "isas": []}
    artifacts.rewrite_manifest(copy, target=target)
    is_one_error(run("run", copy, "--prompt", "x"), 4, "riscv64-linux-gnu")


def test_half_an_artifact_is_not_inspected(run: Run, copy: Path) -> None:
    (copy / "model.onnx.data").unlink()
    is_one_error(run("inspect", copy), 3, "lacks model.onnx.data")


# --- the rest -----------------------------------------------------------------------------------


def test_verify(run: Run, artifact: Path) -> None:
    result = run("verify", artifact)
    assert result.code == 0, result
    assert "layer.0.qkv" in result.out
    report = json.loads(run("verify", artifact, "--json", "--fallback").out)
    assert report["cosine"] is None
    assert len(json.loads(run("verify", artifact, "--json", "--isa", "all").out)) >= 1
    is_one_error(run("verify", artifact, "--isa", "z80"), 2, "has no variant 'z80'")
    assert run("verify", artifact, "--fallback", "--isa", "portable").code == 2


def test_a_failed_verification_exits_with_1(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("layer.0.qkv is wrong")

    monkeypatch.setattr(verification, "verify", fail)
    is_one_error(run("verify", artifact), 1, "layer.0.qkv is wrong")


def test_inspect(run: Run, artifact: Path) -> None:
    result = run("inspect", artifact)
    assert result.code == 0
    assert "nodes per layer  4" in result.out
    assert json.loads(run("inspect", artifact, "--json").out)["nodes_per_layer"] == 4
    is_one_error(run("inspect", artifact / "nothing"), 3, "nothing to inspect")


def test_a_variant_that_is_none_is_the_same_error_everywhere(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITCOMPILE_ISA", "z80")
    for command in ("verify", "bench --prefill 8 --decode 4", "run --prompt x"):
        name, *rest = command.split()
        is_one_error(run(name, artifact, *rest), 4, "BITCOMPILE_ISA=z80 is not a variant")


def test_targets(run: Run) -> None:
    table = json.loads(run("targets", "--json").out)
    x86 = next(target for target in table if target["name"] == "x86")
    assert x86["can_build"] is (x86["cannot_build"] is None)
    assert "x86" in run("targets").out


def test_bench(run: Run, artifact: Path) -> None:
    arguments = ("--prefill", "8", "--decode", "4", "--repeat", "1", "--threads", "1", "--json")
    result = run("bench", artifact, *arguments)
    assert result.code == 0, result
    assert json.loads(result.out).keys() >= {
        "threads", "isa", "prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s",
        "bytes_per_token", "read_roof_bytes_per_s", "decode_roof_share", "int_peak_macs_per_s",
        "prefill_peak_share", "resident_bytes", "artifact_bytes",
    }  # fmt: skip


def test_bench_of_operators_a_batch_and_a_filled_cache(
    run: Run, artifact: Path, tmp_path: Path
) -> None:
    sizes = ("--prefill", "8", "--decode", "4", "--repeat", "1", "--threads", "1")
    picture = tmp_path / "bench.svg"
    more = ("--context", "64", "--batch", "2", "--ops", "--plot", picture, "--json")
    report = json.loads(run("bench", artifact, *sizes, *more).out)
    assert (report["context"], report["batch"]) == (64, 2)
    ops = {row["op"]: row for row in report["operators"]}
    assert ops["BitGLU"]["nodes"] == artifact_layers(artifact)
    assert ops["NormBitLinear"]["nodes"] == 2 * artifact_layers(artifact)
    assert ops["GroupQueryAttention"]["bytes"] > 0
    assert ops["HeadLinear"]["bytes"] > 0
    assert all(row["seconds"] >= 0 for row in ops.values())
    assert picture.read_text().lstrip().startswith("<?xml")
    table = run("bench", artifact, *sizes, "--ops")
    assert "operator" in table.out
    assert "BitGLU" in table.out
    is_one_error(run("bench", artifact, "--plot", "x.pdf"), 2, "must end in .png or .svg")
    is_one_error(run("bench", artifact, "--context", "99999"), 2, "context + decode = ")


def artifact_layers(artifact: Path) -> int:
    return int(Artifact.open(artifact).manifest["language"]["num_layers"])


def test_errors_nobody_foresaw(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(Artifact, "check_hashes", fail)
    plain = run("run", artifact, "--prompt", "x")
    is_one_error(plain, 5, "ZeroDivisionError: two lines; run again with --debug")
    debug = run("run", artifact, "--prompt", "x", "--debug")
    assert debug.code == 5
    assert "Traceback" in debug.err


def test_debug_shows_where_a_foreseen_error_arose(run: Run, tmp_path: Path) -> None:
    result = run("--debug", "verify", tmp_path / "none")
    assert result.code == 3
    assert "Traceback" in result.err


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.startswith("bitcompile, version ")
    for arguments in ([], *([name] for name in cli.cli.commands)):
        assert "Usage: bitcompile" in run(*arguments, "--help").out


def test_interruption(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "check_hashes", interrupt)
    result = run("run", artifact, "--prompt", "x")
    assert result.code == 130
    assert result.err == "interrupted\n"


def test_a_reader_that_leaves_is_no_error(artifact: Path) -> None:
    """`bitcompile inspect --json | head -1`, with the pipe closed at once."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bitcompile.cli", "inspect", str(artifact), "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli._progress() as progress:
        progress("packing weights")
        deadline = 100
        while "packing weights" not in terminal.text and deadline:
            deadline -= 1
            import time

            time.sleep(0.05)
    assert "packing weights (0 s)" in terminal.text
    assert "\n" not in terminal.text
    assert terminal.text.endswith("\r\033[K")
