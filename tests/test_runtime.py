"""Loading an artifact into plain onnxruntime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bitcompile
from bitcompile import runtime, verification
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, ToolchainError, UsageError
from tests import artifacts


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("runtime") / "out")


@pytest.fixture
def copy(original: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "out"))


@pytest.mark.parametrize("plugin", [True, False])
def test_load_gives_a_session(original: Artifact, plugin: bool) -> None:
    session = bitcompile.load(original.path, plugin=plugin, threads=1)
    caches = verification.empty_caches(session)
    logits = verification.step(session, np.array([[1, 2, 3]]), caches)
    assert logits.shape == (1, 1, artifacts.CONFIG.vocab)
    assert np.isfinite(logits).all()
    assert all(cache.shape()[2] == 3 for cache in caches.values())


def test_the_readme_works_without_bitcompile(original: Artifact) -> None:
    """Its Python blocks, in one process whose folder is the artifact."""
    text = (original.path / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    script = "import sys; sys.modules['bitcompile'] = None\n" + "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=original.path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "past_key_values.0.key" in done.stdout


def test_session_options_are_for_any_session(original: Artifact) -> None:
    import onnxruntime

    options = bitcompile.session_options(original.path, threads=2)
    assert options.intra_op_num_threads == 2
    assert onnxruntime.InferenceSession(str(original.model), options).get_outputs()


def test_no_threads_are_refused(original: Artifact) -> None:
    with pytest.raises(UsageError, match="threads must be 1 or more"):
        runtime.load(original.path, threads=0)


def test_an_old_onnxruntime_is_named(original: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(ToolchainError, match=r"1\.22\.1 is too old .*onnxruntime>=1\.23"):
        runtime.load(original.path)


@pytest.mark.parametrize("version", ["1.23.0", "1.23.0+cu12", "1.100.0", "2.0.0.dev1", "1.23.0rc1"])
def test_newer_onnxruntimes_are_good(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    runtime.require_onnxruntime("1.23")


@pytest.mark.parametrize(
    ("host", "machine", "system", "mismatch"),
    [
        ("x86_64-linux-gnu.2.17", "x86_64", "linux", None),
        ("x86_64-linux-gnu", "AMD64", "linux", None),
        ("aarch64-macos", "arm64", "darwin", None),
        ("aarch64-linux-android", "aarch64", "android", None),
        ("aarch64-linux-gnu", "x86_64", "linux", "this machine is x86_64"),
        ("aarch64-linux-android", "aarch64", "linux", "this system is linux"),
        ("x86_64-windows-gnu", "x86_64", "linux", "this system is linux"),
    ],
)
def test_host_is_compared_with_this_machine(
    host: str, machine: str, system: str, mismatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    assert runtime.host_mismatch(host) == mismatch


def test_a_plugin_for_another_machine_is_refused(copy: Path) -> None:
    artifacts.rewrite_manifest(
        copy, target={"name": "pi", "device": "cpu", "host": "riscv64-linux-gnu", "isas": []}
    )
    with pytest.raises(ToolchainError, match="riscv64-linux-gnu, this machine is"):
        runtime.load(copy)
    assert runtime.load(copy, plugin=False).get_inputs()


def test_a_broken_plugin_is_refused(copy: Path) -> None:
    library = Artifact.open(copy).library
    library.write_bytes(b"not a library")
    artifacts.seal(copy)
    with pytest.raises(ToolchainError, match="cannot load the plugin"):
        runtime.load(copy)


def test_damage_is_an_input_error(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"\x08\xff")
    with pytest.raises(InputError, match=r"model\.onnx has 2 bytes"):
        runtime.load(copy)
    artifacts.seal(copy)
    with pytest.raises(InputError, match="onnxruntime cannot load"):
        runtime.load(copy)
