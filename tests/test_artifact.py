"""The artifact folder: what is written, that it is all or nothing, and what damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def test_weights_are_dropped_from_the_page_cache_when_they_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, object]] = []
    digest, advise = artifact.sha256, os.posix_fadvise

    def hashed(path: Path) -> str:
        steps.append(("hash", path.name))
        return digest(path)

    def advised(file: int, *rest: int) -> None:
        steps.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, rest))
        advise(file, *rest)

    monkeypatch.setattr(artifact, "sha256", hashed)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    artifacts.write(tmp_path / "out")
    assert ("hash", "model.onnx.data") in steps
    assert steps[-1] == ("model.onnx.data", (0, 0, os.POSIX_FADV_DONTNEED))


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


@pytest.fixture(params=["exchange", "two renames"])
def publication(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: in one step, and where the system has no such step."""
    if request.param == "two renames":
        monkeypatch.setattr(artifact, "_exchange", lambda *_: False)
    return str(request.param)


def mark(folder: Path, text: str) -> None:
    """Make ``folder`` look like an artifact."""
    (folder / "bitcompile.json").write_text(text)


def interrupted(
    call: Callable[..., Any], error: BaseException, when: str, number: int
) -> Callable[..., Any]:
    """``call`` that raises ``error`` before or after its ``number``-th time."""
    left = [number]

    def wrapped(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise error
        result = call(*arguments)
        if left[0] == 0:
            raise error
        return result

    return wrapped


SIGNALS = [KeyboardInterrupt(), SystemExit(143)]


@pytest.mark.parametrize("error", [*SIGNALS, OSError(errno.EIO, "broken disk")])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_replacement_leaves_old_or_new(
    tmp_path: Path, error: BaseException, when: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames: the moment between them is where OUT is missing."""
    out = tmp_path / "out"
    out.mkdir()
    mark(out, "old")
    monkeypatch.setattr(artifact, "_exchange", lambda *_: False)
    rename = interrupted(Path.rename, error, when, number)
    monkeypatch.setattr(Path, "rename", lambda *arguments: rename(*arguments))
    wanted = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), staged(out, force=True) as stage:
        mark(stage, "new")
    done = (number, when) == (2, "after")
    assert (out / "bitcompile.json").read_text() == ("new" if done else "old")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", SIGNALS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_exchange_leaves_old_or_new(
    tmp_path: Path, error: BaseException, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mark(out, "old")
    monkeypatch.setattr(artifact, "_exchange", interrupted(artifact._exchange, error, when, 1))
    with pytest.raises(type(error)), staged(out, force=True) as stage:
        mark(stage, "new")
    assert (out / "bitcompile.json").read_text() == ("old" if when == "before" else "new")
    assert list(tmp_path.iterdir()) == [out]


def test_a_signal_while_removing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = interrupted(shutil.rmtree, KeyboardInterrupt(), "before", 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: rmtree(path, ignore_errors))
    monkeypatch.setattr(artifact, "_publish", lambda *_: None)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as stage:
        mark(stage, "new")
    assert list(tmp_path.iterdir()) == []


def test_builds_at_the_same_time_leave_one_artifact(tmp_path: Path, publication: str) -> None:
    out, failures = tmp_path / "out", []
    allowed = UsageError if publication == "two renames" else ()

    def write(text: str) -> None:
        for _ in range(20):
            try:
                with staged(out, force=True) as stage:
                    mark(stage, text)
            except allowed:  # in the moment between two renames
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (out / "bitcompile.json").read_text() in "0123"
    assert list(tmp_path.iterdir()) == [out]


def test_a_name_taken_for_ever_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(UsageError, match="other builds keep writing"), staged(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


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


def test_a_long_name_is_written_or_refused_before_the_build(tmp_path: Path) -> None:
    with staged(tmp_path / ("x" * 250)) as stage:
        mark(stage, "new")
    assert (tmp_path / ("x" * 250) / "bitcompile.json").exists()
    with pytest.raises(UsageError, match="File name too long"):
        artifact.check_output(tmp_path / ("x" * 256), force=False)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not search."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_a_folder_that_may_not_be_searched(locked: Path) -> None:
    for out in (locked / "out", locked / "sub" / "out"):
        with pytest.raises(UsageError, match="cannot write"):
            artifact.check_output(out, force=True)
        with pytest.raises(InputError, match="Permission denied"):
            Artifact.open(out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("step", ["write_text", "copyfile", "statvfs"])
def test_no_space_left_is_one_error(
    tmp_path: Path, step: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(code, os.strerror(code))

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


def test_what_is_no_regular_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a file"):
        Artifact.open(copy).check_hashes()


@pytest.mark.parametrize("name", ["x" * 300, "model.onnx/x", ".", "", "missing"])
def test_file_names_that_cannot_be_read(copy: Path, name: str) -> None:
    files = json.loads((copy / "bitcompile.json").read_text())["files"]
    files[name] = {"bytes": copy.stat().st_size, "sha256": ""}
    artifacts.rewrite_manifest(copy, files=files)
    for check in (Artifact.check_sizes, Artifact.check_hashes):
        with pytest.raises(InputError, match=r"cannot read|lacks|not a file"):
            check(Artifact.open(copy))


@pytest.mark.parametrize("name", ["a\0b", "two\nlines", "\ud800"])
def test_file_names_that_cannot_be_printed(copy: Path, name: str) -> None:
    artifacts.rewrite_manifest(copy, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(InputError) as caught:
        Artifact.open(copy)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_deep_manifests_are_refused(copy: Path) -> None:
    (copy / "bitcompile.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="unreadable"):
        Artifact.open(copy)


NESTED = [
    *(("language", key) for key in artifact._SCHEMA["language"][1]),
    *((group, key) for group in ("bytes", "parameters") for key in ("ternary", "head", "total")),
    ("inspection", "nodes_per_layer"),
    ("inspection", "ops"),
    ("options", "head"),
    ("target", "isas"),
]


@pytest.mark.parametrize(("group", "key"), NESTED)
@pytest.mark.parametrize("value", ["REMOVED", -1, 1.5, "x\0", [None], 10**30])
def test_every_key_that_is_read_is_checked(copy: Path, group: str, key: str, value: object) -> None:
    manifest = json.loads((copy / "bitcompile.json").read_text())
    top = group if group in manifest else "inspection"
    entry = manifest[top] if group in manifest else manifest[top][group]
    if value == "REMOVED" and key != "nodes_per_layer":  # None is good there
        del entry[key]
    else:
        entry[key] = value
    artifacts.rewrite_manifest(copy, **{top: manifest[top]})
    with pytest.raises(InputError, match=rf"'{top}.*{key}.*' is missing or damaged"):
        Artifact.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"language": {}},
        {"inspection": {}},
        {"options": {}},
        {"verification": {}},
        {"passes": [1]},
        {"min_onnxruntime": "²"},
    ],
)
def test_empty_parts_are_refused(copy: Path, change: dict[str, object]) -> None:
    artifacts.rewrite_manifest(copy, **change)
    with pytest.raises(InputError, match=f"{next(iter(change))}.*is missing or damaged"):
        Artifact.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"format": "1"}, "not a bitcompile manifest"),
        ({"files": "REMOVED"}, "lacks 'files'"),
        ({"files": {}}, "does not list 'model.onnx'"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        ({"files": {"/x": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        (
            {"files": {"model.onnx": {"bytes": "1"}}},
            "'files.model.onnx.bytes' is missing or damaged",
        ),
        ({"target": []}, "'target' is missing or damaged"),
        ({"target": {"name": "x"}}, "'target.device' is missing"),
    ],
)
def test_a_damaged_manifest_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    artifacts.rewrite_manifest(copy, **change)
    with pytest.raises(InputError, match=message):
        Artifact.open(copy)


def test_what_is_no_artifact_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="no artifact at"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a file: give the folder"):
        Artifact.open(copy / "model.onnx")
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
