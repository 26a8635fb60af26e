"""The artifact folder: what is written, that it is all or nothing, and what damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import onnx
import pytest

from bitcompile import artifact, passing
from bitcompile.artifact import Artifact, staged
from bitcompile.errors import InputError, ToolchainError, UsageError
from tests import artifacts


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def copy(original: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "out"))


def test_holds_every_file_and_its_hash(original: Artifact) -> None:
    names = {path.name for path in original.path.iterdir()}
    assert names == {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "bitcompile.json",
        original.manifest["library"],
    }
    assert set(original.manifest["files"]) == names - {"bitcompile.json"}
    original.check_hashes()


def test_large_weights_are_external_and_aligned(original: Artifact) -> None:
    model = onnx.load(original.model, load_external_data=False)
    seen = 0
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            seen += 1
            assert entries["location"] == "model.onnx.data"
            assert int(entries["offset"]) % (16 * 1024) == 0
        else:
            assert len(tensor.raw_data) < 16 * 1024
    assert seen


def test_names_no_path_of_this_machine(original: Artifact) -> None:
    for name in ("bitcompile.json", "README.md", "genai_config.json"):
        text = (original.path / name).read_text()
        assert str(original.path.parent) not in text
        assert str(Path.cwd()) not in text


def test_manifest_says_how_it_was_built(original: Artifact) -> None:
    manifest = original.manifest
    assert manifest["source"] == "toy"
    assert manifest["language"]["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert manifest["inspection"]["nodes_per_layer"] == 4
    assert manifest["verification"] is None
    again = original.with_verification({"summary": "good"})
    assert Artifact.open(original.path) == again
    assert again.manifest["verification"] == {"summary": "good"}
    artifacts.rewrite_manifest(original.path, verification=None)


def test_readme_is_about_this_artifact(original: Artifact) -> None:
    text = (original.path / "README.md").read_text()
    assert original.manifest["library"] in text
    assert "{" + "library" not in text
    code = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    for block in code:
        compile(block, "README.md", "exec")


# --- all or nothing -----------------------------------------------------------------------------


def test_existing_output_is_refused(copy: Path) -> None:
    before = (copy / "bitcompile.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        artifacts.write(copy)
    assert (copy / "bitcompile.json").read_bytes() == before
    assert sorted(p.name for p in copy.parent.iterdir()) == ["out", "tokenizer"]


def test_force_replaces_an_artifact(copy: Path) -> None:
    (copy / "stray").write_text("x")
    artifacts.write(copy, force=True).check_hashes()
    assert not (copy / "stray").exists()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["out", "tokenizer"]


def test_force_replaces_nothing_else(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for out in (precious, file, link):
        with pytest.raises(UsageError, match="not an artifact"), staged(out, force=True):
            pass
    assert (precious / "thesis.tex").exists()
    assert file.read_text() == "x"


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"), staged(tmp_path / "no" / "out"):
        pass


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with staged(tmp_path / "out") as stage:
            (stage / "big").write_bytes(b"x" * 1000)
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_under_force_keeps_the_old(copy: Path) -> None:
    with pytest.raises(ValueError, match="x"), staged(copy, force=True):
        raise ValueError("x")
    Artifact.open(copy).check_hashes()
    assert list(copy.parent.iterdir()) == [copy]


def test_a_failed_rename_puts_the_old_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), staged(copy, force=True):
        pass
    Artifact.open(copy).check_hashes()
    assert list(copy.parent.iterdir()) == [copy]


def test_somebody_faster_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with staged(out):
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(UsageError, match="exists"):
        race()
    assert (out / "theirs").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("step", ["write_text", "copyfile", "statvfs"])
def test_no_space_left_is_one_error(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object, **__: object) -> None:
        raise full

    source = artifacts.imported(tmp_path / "tokenizer")
    result = artifacts.lowered(source, passing.Options())
    if step == "write_text":
        monkeypatch.setattr(Path, "write_text", fail)
    elif step == "copyfile":
        monkeypatch.setattr(shutil, "copyfile", fail)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ToolchainError, match="no space left"), staged(tmp_path / "out") as stage:
        artifact.write(stage, source, result, options={}, passes=[], inspection={})
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


# --- damage -------------------------------------------------------------------------------------


def test_a_flipped_bit_is_named(copy: Path) -> None:
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    opened = Artifact.open(copy)
    opened.check_sizes()
    with pytest.raises(InputError, match=r"model\.onnx\.data is corrupted"):
        opened.check_hashes()


def test_a_truncated_or_missing_file_is_named(copy: Path) -> None:
    os.truncate(copy / "model.onnx.data", 100)
    with pytest.raises(InputError, match=r"model\.onnx\.data has 100 bytes"):
        Artifact.open(copy).check_sizes()
    (copy / "tokenizer.json").unlink()
    (copy / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"lacks model\.onnx\.data"):
        Artifact.open(copy).check_sizes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"format": "1"}, "not a bitcompile manifest"),
        ({"files": "REMOVED"}, "lacks 'files'"),
        ({"files": {}}, "does not list model.onnx"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        ({"files": {"/x": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        ({"files": {"model.onnx": {"bytes": "1"}}}, "entry of model.onnx"),
        ({"target": []}, "'target' has the wrong type"),
        ({"target": {"name": "x"}}, "target lacks 'device'"),
    ],
)
def test_a_damaged_manifest_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    artifacts.rewrite_manifest(copy, **change)
    with pytest.raises(InputError, match=message):
        Artifact.open(copy)


def test_what_is_no_artifact_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="no artifact at"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="not an artifact"):
        Artifact.open(tmp_path)
    for text in ("{", "[]", "\xff"):
        (copy / "bitcompile.json").write_text(text, "latin-1")
        with pytest.raises(InputError):
            Artifact.open(copy)


def test_genai_config_has_no_thread_count(original: Artifact) -> None:
    config = json.loads((original.path / "genai_config.json").read_text())
    session = config["model"]["decoder"]["session_options"]
    assert session == {
        "provider_options": [],
        "custom_ops_library": original.manifest["library"],
    }
