"""The artifact: a folder that runs, with a manifest that says what is in it.

It is written beside its final place and renamed into it, so that a build leaves a whole artifact
or nothing. ``bitcompile.json`` carries the size and SHA-256 of every other file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bitcompile import companions
from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.opset import MIN_ONNXRUNTIME

if TYPE_CHECKING:
    from bitcompile.model import Imported, LanguageModel, Lowered

Progress = Callable[[str], None]
"""Called with a short text at the start of each phase of a long operation."""

FORMAT = 1
"""Version of the manifest and the folder's layout."""
MANIFEST = "bitcompile.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
ALIGNMENT = 16 * 1024
"""Offset alignment of weights in the data file: the largest page size of our targets."""

_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "bitcompile": str,
    "source": str,
    "target": dict,
    "layout": str,
    "library": str,
    "min_onnxruntime": str,
    "options": dict,
    "passes": list,
    "kernels": list,
    "inspection": dict,
    "language": (dict, type(None)),
    "verification": (dict, type(None)),
    "files": dict,
}


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
        if not folder.is_dir():
            raise InputError(f"no artifact at {folder}: `bitcompile build MODEL -o {folder}`")
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(f"{folder} is not an artifact: it has no {MANIFEST}") from None
        except (ValueError, OSError) as error:
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

    def check_sizes(self) -> None:
        """Raises InputError if a file of the manifest is missing or has another size."""
        for name, entry in self.manifest["files"].items():
            try:
                size = (self.path / name).stat().st_size
            except FileNotFoundError:
                raise InputError(f"{self.path} lacks {name}: build or copy it again") from None
            if size != entry["bytes"]:
                raise InputError(
                    f"{self.path / name} has {size} bytes instead of {entry['bytes']}: "
                    "build or copy the artifact again"
                )

    def check_hashes(self, progress: Progress = silent) -> None:
        """Raises InputError naming the first file whose size or SHA-256 is not the manifest's."""
        self.check_sizes()
        for name, entry in self.manifest["files"].items():
            progress(f"checking {name}")
            if sha256(self.path / name) != entry["sha256"]:
                raise InputError(
                    f"{self.path / name} is corrupted (SHA-256 differs from {MANIFEST}): "
                    "build or copy the artifact again"
                )

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
            f"build again, or use bitcompile {manifest.get('bitcompile', 'of that time')}"
        )
    for key, kind in _SCHEMA.items():
        if key not in manifest:
            raise InputError(f"{where} lacks {key!r}: build the artifact again")
        if not isinstance(manifest[key], kind):
            raise InputError(f"{where}: {key!r} has the wrong type; build the artifact again")
    for key in ("name", "device", "host"):
        if not isinstance(manifest["target"].get(key), str):
            raise InputError(f"{where}: target lacks {key!r}; build the artifact again")
    for name, entry in manifest["files"].items():
        _validate_file(where, name, entry)
    for name in (MODEL, manifest["library"]):
        if name not in manifest["files"]:
            raise InputError(f"{where} does not list {name}: build the artifact again")


def _validate_file(where: Path, name: str, entry: Any) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where} names a file outside the artifact: {name}")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("bytes"), int)
        or not isinstance(entry.get("sha256"), str)
    ):
        raise InputError(f"{where}: the entry of {name} is damaged; build the artifact again")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(out: Path, force: bool) -> None:
    """Raises UsageError unless an artifact may be written at ``out``.

    ``force`` replaces an artifact or an empty folder, never anything else.
    """
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder: make it first, or choose another output")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write to {parent}: choose another output")
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out} exists: add --force to replace it, or choose another output")
    ours = out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if out.is_symlink() or not ours:
        raise UsageError(f"{out} is not an artifact, so --force does not replace it: remove it")


@contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside ``out`` that becomes ``out`` when the block ends.

    If the block raises anything, the folder is removed and ``out`` is as it was. Raises UsageError
    as :func:`check_output`, ToolchainError if the disk is full.
    """
    check_output(out, force)
    final = out.absolute()
    folder = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir()
        yield folder
        check_output(out, force)  # a build takes minutes: somebody else may have been faster
        _publish(folder, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(final) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _no_space(final: Path) -> ToolchainError:
    return ToolchainError(f"no space left in {final.parent}: free some, or choose another output")


def _publish(folder: Path, final: Path) -> None:
    """Rename ``folder`` to ``final``; an older artifact there is put back if that fails."""
    if not final.exists():
        folder.rename(final)
        return
    old = folder.with_suffix(".old")
    final.rename(old)
    try:
        folder.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
        raise _no_space(folder)
    progress("writing weights")
    _save_model(folder, lowered)
    library = lowered.target.library
    shutil.copyfile(lowered.library, folder / library)
    if imported.language is not None:
        _write_language_files(folder, imported.language, library)
    readme = companions.readme(imported, lowered)
    (folder / "README.md").write_text(readme, "utf-8")
    progress("hashing files")
    manifest = {
        "format": FORMAT,
        "bitcompile": __version__,
        "source": imported.source,
        "target": _describe_target(lowered),
        "layout": lowered.layout,
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
    return Artifact(folder, manifest)


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


def _write_language_files(folder: Path, language: LanguageModel, library: str) -> None:
    for file in language.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    config = companions.genai_config(language, library)
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
