"""Device code from CUDA C: by nvcc where it is installed, else by NVIDIA's compiler from PyPI.

Neither needs a GPU. NVRTC (package ``nvidia-cuda-nvrtc``) is the same compiler as a library.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bitcompile.errors import ToolchainError

FLAGS = ("-fmad=false", "-std=c++17")
"""No product may be fused into a sum: every operation rounds once (see ``bitcompile.numerics``)."""
MISSING = 'no CUDA compiler: pip install "bitcompile[cuda]", or put nvcc 13 on PATH'


@dataclass(frozen=True)
class Image:
    """Device code to make: machine code of one architecture, or PTX for those to come."""

    arch: str
    ptx: bool = False

    @property
    def name(self) -> str:
        """``sm_90a``, or ``compute_80`` for PTX."""
        return f"{'compute' if self.ptx else 'sm'}_{self.arch}"


IMAGES = (
    *(Image(arch) for arch in ("80", "86", "87", "89", "90a", "100", "120")),
    Image("80", ptx=True),
)


def compiler_version() -> str:
    """What compiles here, for the cache; raises ToolchainError if nothing does."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
        return f"nvcc {found[1] if found else '?'}"
    library = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"nvrtc {major.value}.{minor.value}"


def missing_compiler() -> str | None:
    """None if device code can be compiled here, else what is missing and how to get it."""
    return None if shutil.which("nvcc") or _nvrtc_path() else MISSING


def compile_image(source: str, image: Image) -> bytes:
    """The device code of ``source``; raises ToolchainError with the compiler's first complaint."""
    nvcc = shutil.which("nvcc")
    return _by_nvcc(nvcc, source, image) if nvcc else _by_nvrtc(source, image)


def _by_nvcc(nvcc: str, source: str, image: Image) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        text, out = Path(name) / "kernels.cu", Path(name) / "kernels.out"
        text.write_text(source, "utf-8")
        kind = "-ptx" if image.ptx else "-cubin"
        command = [nvcc, kind, f"-arch={image.name}", *FLAGS, "-o", str(out), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused(done.stderr + done.stdout)
        return out.read_bytes() + b"\0" * image.ptx


def _refused(log: str) -> ToolchainError:
    complaint = next((line for line in log.splitlines() if "error" in line), "no message")
    return ToolchainError(f"the CUDA compiler refused the kernels: {complaint.strip()}")


def _nvrtc_path() -> Path | None:
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(folder).glob("*/lib/libnvrtc.so.1[3-9]*"))
        if found:
            return found[0]
    return None


@cache
def _nvrtc() -> ctypes.CDLL:
    path = _nvrtc_path()
    if path is None:
        raise ToolchainError(MISSING)
    for part in sorted(path.parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(part))  # NVRTC asks for it by name alone
    return ctypes.CDLL(str(path))


def _by_nvrtc(source: str, image: Image) -> bytes:
    library, program = _nvrtc(), ctypes.c_void_p()
    options = [flag.encode() for flag in (*FLAGS, f"-arch={image.name}")]
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        listed = (ctypes.c_char_p * len(options))(*options)
        if library.nvrtcCompileProgram(program, len(options), listed):
            raise _refused(_taken(library, program, "ProgramLog").decode(errors="replace"))
        return _taken(library, program, "PTX" if image.ptx else "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
