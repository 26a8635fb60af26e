"""The artifact: a folder that runs, with a manifest that says what is in it.

It is written beside its final place and renamed into it, so that a build leaves a whole artifact
or nothing. ``bitcompile.json`` carries the size and SHA-256 of every other file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bitcompile import companions
from bitcompile.errors import NO_SPACE, InputError, UsageError, no_space, writing
from bitcompile.opset import MIN_ONNXRUNTIME

if TYPE_CHECKING:
    from bitcompile.model import Imported, LanguageModel, Lowered
    from bitcompile.target import Target

Progress = Callable[[str], None]
"""Called with a short text at the start of each phase of a long operation."""

FORMAT = 1
"""Version of the manifest and the folder's layout."""
MANIFEST = "bitcompile.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
ALIGNMENT = 16 * 1024
"""Offset alignment of weights in the data file: the largest page size of our targets."""


def _count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _positive(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 31


def _version(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})*", value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _word(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[a-z0-9_-]+", value))


_SIZES = dict.fromkeys(("ternary", "head", "other", "total"), _count)
_SCHEMA: dict[str, Any] = {
    "format": int,
    "bitcompile": str,
    "source": str,
    "target": {"name": _text, "device": _text, "host": _text, "isas": [_word]},
    "layout": str,
    "library": str,
    "min_onnxruntime": _version,
    "options": {
        "head": ("q8", "q4", "float"),
        "activations": (None, "float32", "float16", "bfloat16"),
    },
    "passes": [dict],
    "kernels": [dict],
    "inspection": {
        "ops": {str: _count},
        "nodes_per_layer": (None, _count),
        "bytes": _SIZES,
        "parameters": _SIZES,
        "inputs": {str: list},
        "outputs": {str: list},
    },
    "language": (
        None,
        {
            "vocab_size": _positive,
            "context_length": _positive,
            "hidden_size": _positive,
            "num_layers": _positive,
            "num_heads": _positive,
            "num_kv_heads": _positive,
            "head_size": _positive,
        },
    ),
    "verification": (None, {"summary": str}),
    "files": {str: {"bytes": _count, "sha256": str}},
}
"""What a manifest must hold for the code that reads it.

A kind is a type, a predicate, a tuple of alternatives (kinds or exact values), a list of one kind
for every element, or a dict: ``str`` stands for any key, a name for one that must be there.
"""


def _misfit(value: Any, kind: Any, at: str) -> str | None:
    """Where ``value``, itself at ``at``, first is not of its kind; None if it is everywhere."""
    if isinstance(kind, tuple):
        found = [_misfit(value, choice, at) for choice in kind]
        return None if None in found else found[-1]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return at
        pairs = [(f"{at}[{i}]", item, kind[0]) for i, item in enumerate(value)]
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            return at
        names = value if str in kind else kind
        pairs = [(f"{at}.{k}", value.get(k), kind.get(k, kind.get(str))) for k in names]
    else:
        if isinstance(kind, type):
            good = isinstance(value, kind)
        else:
            good = kind(value) if callable(kind) else value == kind
        return None if good else at
    return next((m for where, item, k in pairs if (m := _misfit(item, k, where))), None)


def silent(_: str) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Artifact:
    """An artifact folder and its manifest (the decoded ``bitcompile.json``)."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read and validate the manifest of the folder ``path``.

        Raises InputError if it is no artifact, or one this version cannot read.
        """
        folder = Path(path)
        try:
            if folder.is_file():
                raise InputError(f"{folder} is a file: give the folder that a build wrote")
            if not folder.is_dir():
                raise InputError(f"no artifact at {folder}: `bitcompile build MODEL -o {folder}`")
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            json.dumps(manifest, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
        except FileNotFoundError:
            raise InputError(f"{folder} is not an artifact: it has no {MANIFEST}") from None
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{folder / MANIFEST} is unreadable: {error}; build again") from None
        _validate(folder, manifest)
        return cls(folder, manifest)

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    @property
    def library(self) -> Path:
        """The plugin."""
        return self.path / str(self.manifest["library"])

    @property
    def activations(self) -> str:
        """Element type of what passes between operators."""
        return str(self.manifest["options"].get("activations") or "float32")

    def check_sizes(self) -> None:
        """Raises InputError if a file of the manifest is missing or has another size."""
        for name, entry in self.manifest["files"].items():
            with self._reading(name):
                status = (self.path / name).stat()
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{self.path / name} is not a file: build or copy it again")
            if status.st_size != entry["bytes"]:
                raise InputError(
                    f"{self.path / name} has {status.st_size} bytes instead of {entry['bytes']}: "
                    "build or copy the artifact again"
                )

    def check_hashes(self, progress: Progress = silent) -> None:
        """Raises InputError naming the first file whose size or SHA-256 is not the manifest's."""
        self.check_sizes()
        for name, entry in self.manifest["files"].items():
            progress(f"checking {name}")
            with self._reading(name):
                found = sha256(self.path / name)
            if found != entry["sha256"]:
                raise InputError(
                    f"{self.path / name} is corrupted (SHA-256 differs from {MANIFEST}): "
                    "build or copy the artifact again"
                )

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path} lacks {name}: build or copy it again") from None
        except OSError as error:
            raise InputError(f"cannot read {self.path / name}: {error.strerror}") from None

    def with_verification(self, report: Mapping[str, Any]) -> Artifact:
        """The artifact with ``report`` written into its manifest."""
        manifest = {**self.manifest, "verification": dict(report)}
        _write_manifest(self.path, manifest)
        return Artifact(self.path, manifest)


def _validate(folder: Path, manifest: Any) -> None:
    where = folder / MANIFEST
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise InputError(f"{where} is not a bitcompile manifest")
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{where} has format {manifest['format']}, this bitcompile reads {FORMAT}: "
            "build again, or use the bitcompile that wrote it"
        )
    for key, kind in _SCHEMA.items():
        if key not in manifest:
            raise InputError(f"{where} lacks {key!r}: build the artifact again")
        if misfit := _misfit(manifest[key], kind, key):
            raise InputError(f"{where}: {misfit!r} is missing or damaged; build the artifact again")
    for name in manifest["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name.isprintable():
            raise InputError(f"{where} names a file outside the artifact: {name!r}")
    for name in (MODEL, manifest["library"]):
        if name not in manifest["files"]:
            raise InputError(f"{where} does not list {name!r}: build the artifact again")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(out: Path, force: bool) -> None:
    """Raises UsageError unless an artifact may be written at ``out``.

    ``force`` replaces an artifact or an empty folder, never anything else.
    """
    with writing(out):
        parent = out.absolute().parent
        if not parent.is_dir():
            raise UsageError(f"{parent} is not a folder: make it first, or choose another output")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {parent}: choose another output")
        try:
            out.lstat()
        except FileNotFoundError:
            return
        if not force:
            raise UsageError(f"{out} exists: add --force to replace it, or choose another output")
        ours = out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
        if out.is_symlink() or not ours:
            raise UsageError(f"{out} is not an artifact, so --force does not replace it: remove it")


@contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside ``out`` that becomes ``out`` when the block ends.

    If the block raises anything, the folder is removed and ``out`` is as it was; a signal at the
    very end may leave the new one. Raises UsageError as :func:`check_output`, ToolchainError if the
    disk is full.
    """
    check_output(out, force)
    final = out.absolute()
    folder = final.with_name(f".bitcompile.{secrets.token_hex(4)}.tmp")
    try:
        with writing(final):
            folder.mkdir()
        yield folder
        with writing(final):
            _publish(folder, final, force)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(final) from None
        raise
    finally:
        _remove(folder)


RACES = 10
"""Tries to take a name that other builds also write."""
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Error numbers of renaming a folder to a name that is not free."""


def _publish(folder: Path, final: Path, force: bool) -> None:
    """Make ``folder`` what is at ``final``; of builds at the same time the last one stays."""
    for _ in range(RACES):
        check_output(final, force)  # a build takes minutes: somebody else may have been faster
        try:
            if final.exists():
                _replace(final, folder)
            else:
                folder.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *TAKEN):
                raise
        else:
            return
    raise UsageError(f"other builds keep writing {final}: wait for them, or choose another output")


def _replace(final: Path, folder: Path) -> None:
    """Put ``folder`` at ``final``, whose old folder goes or stands at ``folder``.

    However this ends, also by a signal, one of the two is at ``final``.
    """
    if _exchange(final, folder):
        return
    old = folder.with_suffix(".old")
    try:
        final.rename(old)
        folder.rename(final)
    finally:
        _settle(old, final)


def _settle(old: Path, final: Path) -> None:
    """Put ``old`` back to ``final`` if that name is free, else remove it."""
    try:
        old.rename(final)
    except FileNotFoundError:  # it was never moved away
        return
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux's renameat2); False where the system cannot."""
    import ctypes

    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):  # the kernel or the file system has no exchange
        return False
    raise OSError(code, os.strerror(code))


def _remove(folder: Path) -> None:
    """Remove a folder if it is there, to the end also when a signal comes meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write(
    folder: Path,
    imported: Imported,
    lowered: Lowered,
    *,
    options: Mapping[str, Any],
    passes: Sequence[Mapping[str, Any]],
    inspection: Mapping[str, Any],
    progress: Progress = silent,
) -> Artifact:
    """Write every file of an artifact into the empty ``folder``.

    ``options``, ``passes`` (the pass report) and ``inspection`` (see :mod:`inspection`) are
    recorded in the manifest as they are. Raises ToolchainError if the disk is too small.
    """
    from bitcompile import __version__

    tensors = (value.const_value for value in lowered.graph.graph.initializers.values())
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if shutil.disk_usage(folder).free < weights + lowered.library.stat().st_size:
        raise no_space(folder.parent)
    progress("writing weights")
    _save_model(folder, lowered)
    library = lowered.target.library
    files = {library: lowered.library, **lowered.target.embeds(lowered.library)}
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, folder / name)  # a program stays one
    for name, text in lowered.target.texts(lowered.graph.graph).items():
        (folder / name).write_text(text, "utf-8")
    if imported.language is not None:
        _write_language_files(folder, imported.language, lowered.target)
    readme = companions.readme(imported, lowered)
    (folder / "README.md").write_text(readme, "utf-8")
    progress("hashing files")
    manifest = {
        "format": FORMAT,
        "bitcompile": __version__,
        "source": imported.source,
        "target": _describe_target(lowered),
        "layout": lowered.layout,
        "layout_reason": lowered.layout_reason,
        "library": library,
        "min_onnxruntime": MIN_ONNXRUNTIME,
        "options": dict(options),
        "passes": list(passes),
        "kernels": [asdict(kernel) for kernel in lowered.kernels],
        "inspection": dict(inspection),
        "language": _describe_language(imported.language),
        "verification": None,
        "files": _file_table(folder),
    }
    _write_manifest(folder, manifest)
    _leave_to_readers(folder / DATA)
    return Artifact(folder, manifest)


def _leave_to_readers(path: Path) -> None:
    """Drop a file from the page cache, where it can be told to.

    What has been written lies there in small pages. Where the plugin has it read in again, Linux
    gives huge ones (``custom_ops/csrc/pages.c``), with which a token takes 4 to 6 % less time.
    """
    if path.exists() and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what the disk has is dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _save_model(folder: Path, lowered: Lowered) -> None:
    import onnx_ir as ir

    ir.save(
        lowered.graph,
        folder / MODEL,
        external_data=DATA,
        size_threshold_bytes=ALIGNMENT - 1,
        alignment=ALIGNMENT,
        align_threshold=ALIGNMENT - 1,
    )


def _write_language_files(folder: Path, language: LanguageModel, target: Target) -> None:
    for file in language.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    config = companions.genai_config(language, target.library, target.device)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _describe_target(lowered: Lowered) -> dict[str, Any]:
    target = lowered.target
    return {
        "name": target.name,
        "device": target.device,
        "host": target.host,
        "isas": list(target.isas),
    }


def _describe_language(language: LanguageModel | None) -> dict[str, Any] | None:
    if language is None:
        return None
    names = [file.name for file in language.tokenizer_files]
    return {**asdict(language), "tokenizer_files": names}


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in files
    }


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    new = folder / f"{MANIFEST}.tmp"
    new.write_text(text, "utf-8")
    new.replace(folder / MANIFEST)
