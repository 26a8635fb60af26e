"""Load an artifact into plain onnxruntime."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bitcompile.artifact import Artifact
from bitcompile.companions import PROVIDER_OPTIONS, PROVIDERS
from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.opset import DOMAIN

CPU = "CPUExecutionProvider"
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows", "android": "android"}


def load(path: str | Path, *, plugin: bool = True, threads: int | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` of the artifact at ``path``.

    ``plugin=False`` runs the fallback functions in the model instead of the kernels; ``threads``
    is the size of the session's thread pool (None: onnxruntime's choice). Raises InputError for a
    damaged artifact, ToolchainError if this machine or its onnxruntime cannot run it.
    """
    artifact = Artifact.open(path)
    artifact.check_sizes()
    options = session_options(artifact.path, plugin=plugin, threads=threads)
    try:
        return open_session(artifact.model, options, providers(artifact, plugin))
    except OnnxruntimeError as error:
        raise InputError(f"onnxruntime cannot load {artifact.model}: {error}") from error


class OnnxruntimeError(Exception):
    """What onnxruntime says about a model, in one line."""


def open_session(model: Path | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Raises OnnxruntimeError, or ToolchainError if the GPU's provider did not start.
    """
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        if len(providers) > 1 and NO_KERNEL in str(error):
            raise ToolchainError(
                f"{providers[0][0]} of onnxruntime does not start here: check nvidia-smi, and "
                f"that the CUDA and cuDNN libraries it is built for are found: {GPU_PACKAGES}"
            ) from error
        raise OnnxruntimeError(one_line(error)) from error


NO_KERNEL = f"Failed to find kernel for {DOMAIN}."
"""How onnxruntime says that no provider of a session runs an operator of ours."""
GPU_PACKAGES = 'pip uninstall -y onnxruntime; pip install "onnxruntime-gpu[cuda,cudnn]"'


def providers(artifact: Artifact, plugin: bool = True, **options: str) -> list[Any]:
    """The execution providers of a session, that of the artifact's GPU with ``options`` first.

    The functions run there too, or on the CPU if onnxruntime has no such provider. Raises
    ToolchainError if the artifact needs it.
    """
    import onnxruntime

    device = artifact.manifest["target"]["device"]
    if device not in PROVIDERS:
        return [CPU]
    name = PROVIDERS[device][1]
    if name not in onnxruntime.get_available_providers():
        if not plugin and artifact.activations != "bfloat16":
            return [CPU]
        remedy = ""
        if plugin:  # onnxruntime's CPU has no attention in bfloat16
            alone = "" if artifact.activations == "bfloat16" else ", load with plugin=False"
            remedy = f"{alone}, or verify with --fallback"
        raise ToolchainError(
            f"onnxruntime {onnxruntime.__version__} has no {name} here: install onnxruntime-gpu in "
            f"its place ({GPU_PACKAGES}){remedy}"
        )
    preload()
    return [(name, {**PROVIDER_OPTIONS, **options}), CPU]


def preload() -> None:
    """Load CUDA's libraries where they are Python packages, which no other search finds."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it misses, needed or not
            onnxruntime.preload_dlls()


def session_options(path: str | Path, *, plugin: bool = True, threads: int | None = None) -> Any:
    """``onnxruntime.SessionOptions`` with the plugin of the artifact at ``path`` registered.

    Raises as :func:`load`.
    """
    import onnxruntime

    artifact = Artifact.open(path)
    require_onnxruntime(str(artifact.manifest["min_onnxruntime"]))
    options = onnxruntime.SessionOptions()
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads must be 1 or more, not {threads}")
        options.intra_op_num_threads = threads
    if plugin:
        require_host(artifact)
        register(options, artifact.library)
    return options


def register(options: Any, library: Path) -> None:
    """Register a plugin; raises ToolchainError with onnxruntime's reason if it does not load."""
    try:
        options.register_custom_ops_library(str(library.absolute()))
    except Exception as error:  # see load
        raise ToolchainError(f"cannot load the plugin {library}: {one_line(error)}") from error


def require_onnxruntime(minimum: str) -> None:
    """Raises ToolchainError if the installed onnxruntime is older than ``minimum``."""
    import onnxruntime

    if _release(onnxruntime.__version__) < _release(minimum):
        raise ToolchainError(
            f"onnxruntime {onnxruntime.__version__} is too old for this artifact: "
            f'pip install "onnxruntime>={minimum}"'
        )


def _release(version: str) -> tuple[int, ...]:
    digits = (part for part in version.split("+")[0].split("."))
    return tuple(int(part) for part in digits if part.isdigit())


def require_host(artifact: Artifact) -> None:
    """Raises ToolchainError if the plugin was built for another kind of machine."""
    host = str(artifact.manifest["target"]["host"])
    reason = host_mismatch(host)
    if reason is not None:
        raise ToolchainError(
            f"the plugin in {artifact.path} is for {host}, {reason}: build with --target native, "
            "load with plugin=False, or verify with --fallback"
        )


def host_mismatch(host: str) -> str | None:
    """None if a plugin for the triple ``host`` can be loaded here, else why not."""
    machine, _, rest = host.partition("-")
    here = platform.machine().lower()
    here = _MACHINES.get(here, here)
    if machine != here:
        return f"this machine is {here}"
    system = _SYSTEMS.get(sys.platform, sys.platform)
    wanted = "android" if "android" in rest else rest.split("-")[0].split(".")[0]
    if wanted != system:
        return f"this system is {system}"
    return None


def one_line(error: BaseException) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
