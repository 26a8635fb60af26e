"""From kernel generators to a linked plugin: objects by TVM, C glue and linking by zig.

Kernels take N, K and M at run time, so one plugin serves every model of a target: it is compiled
once and kept in the user's cache under a hash of everything it was made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitcompile.errors
from bitcompile import packing
from bitcompile.errors import ToolchainError
from bitcompile.target import Kernel
from bitcompile.targets.tir.linking import CSRC, LINUX, System

if TYPE_CHECKING:
    from bitcompile.targets.tir.isa import Isa

TIR = Path(__file__).parent
GLUE = ("plugin.c", "checks.c")
"""The C sources of every plugin."""
PROGRAMS = {"calibrate": ("calibrate.c", "host.c")}
"""Programs that some plugins come with, and their C sources."""
CPU_GLUE = ("cpu.c", "pages.c", "threads.c")
NEEDED_BYTES = 32 << 20
"""Free space a compilation may take."""


Generator = tuple[str, str, tuple[Any, ...]]
"""Module, function, arguments after (isa, name)."""

GENERATORS: dict[str, Generator] = {
    "quantize": ("rows", "quantize", ()),
    "norm_quantize": ("rows", "norm_quantize", ()),
    "gemv_grouped": ("gemv", "gemv", (True,)),
    "gemm_grouped": ("gemm", "gemm", (True,)),
    "group_sums": ("rows", "group_sums", ()),
    "glu[BC_RELU2]": ("rows", "glu", ("relu2",)),
    "glu[BC_SILU]": ("rows", "glu", ("silu",)),
    "glu[BC_GELU_TANH]": ("rows", "glu", ("gelu_tanh",)),
    "glu[BC_GELU_ERF]": ("rows", "glu", ("gelu_erf",)),
    "head_quantize8": ("head", "head_quantize", (8,)),
    "head_quantize4": ("head", "head_quantize", (4,)),
    "head8": ("head", "head", (8,)),
    "head4": ("head", "head", (4,)),
    "read_roof": ("roof", "read_roof", ()),
    "dot_roof": ("roof", "dot_roof", ()),
}
"""By field of ``bc_variant`` (``kernels.h``); with the products of :func:`generators`."""


@dataclass(frozen=True)
class DeviceCode:
    """What a plugin has beside CPU kernels, to run the operators on another device."""

    sources: tuple[str, ...]
    """C files."""
    table: Callable[[], str]
    """C text that names the device (``bc_device``) and holds its kernels."""
    key: str
    """What the table depends on beside the project's sources."""
    programs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Programs that come with the plugin, by name, and their C files."""


def coding(layout: str) -> str:
    """The byte code of a layout, as :data:`bitcompile.targets.tir.codes.CODINGS` names it."""
    return layout.split("_")[0]


def generators(layouts: Sequence[str]) -> dict[str, Generator]:
    """The kernels of a plugin that reads these layouts."""
    products: dict[str, Generator] = {
        f"{kind}[BC_{coding(id).upper()}]": (kind, kind, (False, coding(id)))
        for id in layouts
        for kind in ("gemv", "gemm")
    }
    return {**GENERATORS, **products}


def _generate(made: Generator, isa: Isa, name: str) -> Any:
    module, function, arguments = made
    generator = getattr(import_module(f"bitcompile.targets.tir.{module}"), function)
    return generator(isa, name, *arguments)


def _plain(field: str) -> str:
    """``glu_relu2`` for ``glu[BC_RELU2]``."""
    return field.replace("[BC_", "_").rstrip("]").lower()


def symbol(field: str, isa: str) -> str:
    """C symbol of a kernel: ``bc_gemv_i2_avx2``."""
    return f"bc_{_plain(field)}_{isa.replace('-', '_')}"


def kernel_table(isas: Sequence[str], layouts: Sequence[str]) -> tuple[Kernel, ...]:
    """The rows a plugin with these variants has."""
    fields = generators(layouts)
    return tuple(Kernel(_plain(field), isa, symbol(field, isa)) for isa in isas for field in fields)


def device_source(layouts: Sequence[str], device: DeviceCode | None = None) -> str:
    """``device.c``: the layouts that a plugin reads, and what runs its operators."""
    lines = ['#include "ops.h"', *layouts_source(layouts)]
    if device is None:
        return "\n".join([*lines, "const Device *const bc_device = &bc_cpu_device;", ""])
    return "\n".join([*lines, device.table()])


def layouts_source(layouts: Sequence[str]) -> list[str]:
    """C text of ``bc_layouts``."""
    rows = []
    for tile in map(packing.layout, layouts):
        sizes = f"{tile.tile_n}, {tile.tile_k}, {tile.tile_bytes}"
        rows.append(f'  {{"{tile.id}", {sizes}, BC_{coding(tile.id).upper()}}},')
    return ["const Layout bc_layouts[] = {", *rows, "  {0},", "};"]


def _table_source(isas: Sequence[Isa], layouts: Sequence[str]) -> str:
    """``kernels.c``: declarations, the variants, best first, and what their schedules must meet."""
    from bitcompile.targets.tir.gemm import panel_bytes, partial_values
    from bitcompile.targets.tir.isa import TILE_ROWS
    from bitcompile.targets.tir.roof import peak_macs

    widest = max(packing.GROUP_SIZES)
    fields = generators(layouts)
    lines = ['#include "kernels.h"', ""]
    for isa in isas:
        for field in fields:
            kind = field.split("[")[0].rstrip("48")
            lines.append(f"bc_{kind}_fn {symbol(field, isa.name)};")
    asserts: list[str] = []
    lines += ["", "const bc_variant bc_variants[] = {"]
    for isa in isas:
        values = {
            "isa": f'"{isa.name}"',
            "features": f'"{",".join(isa.features)}"',
            "gemm_rows": isa.gemm.rows,
            "gemm_tiles": isa.gemm.tiles,
            "dot_roof_macs": peak_macs(isa),
            **{field: symbol(field, isa.name) for field in fields},
        }
        lines.append("  {" + ", ".join(f".{name} = {value}" for name, value in values.items()))
        lines[-1] += "},"
        # The C side keeps these workspaces on its stack.
        fits = {
            f"{panel_bytes(isa)} <= BC_MAX_PANEL": "panel",
            f"{partial_values(isa)} * BC_GEMM_BLOCKS <= BC_MAX_PARTIAL": "partial sums",
            f"{isa.gemm.rows} <= BC_ROW_PAD": "padding rows",
            f"{isa.gemm.k_blocks * TILE_ROWS % widest} == 0": "whole groups of a panel",
        }
        asserts += [f'_Static_assert({test}, "{isa.name}: {name}");' for test, name in fits.items()]
    lines += ["};", *asserts, f"const int bc_variant_count = {len(isas)};", ""]
    return "\n".join(lines)


def cache_dir() -> Path:
    """Where compiled plugins are kept: ``$BITCOMPILE_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("BITCOMPILE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitcompile"


def fingerprint(*parts: str, more: Sequence[Path] = ()) -> str:
    """Hash of the generators, the C sources, ``more`` files and the compilers' versions.

    Raises ToolchainError if a compiler is not installed.
    """
    spine = Path(bitcompile.errors.__file__).parent
    sources = [*sorted(TIR.rglob("*.*")), *sorted(CSRC.rglob("*.*")), *more]
    sources += [spine / name for name in ("numerics.py", "packing.py")]
    digest = hashlib.sha256()
    for path in sources:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.name.encode() + path.read_bytes())
    try:
        versions = [metadata.version(package) for package in ("apache-tvm", "ziglang")]
    except metadata.PackageNotFoundError as error:
        raise ToolchainError(
            f'package {error.name} is not installed: pip install "bitcompile[build]"'
        ) from None
    digest.update("\0".join([*versions, *parts]).encode())
    return digest.hexdigest()[:16]


def build_plugin(
    isas: Callable[[], Sequence[Isa]],
    triple: str,
    layouts: Sequence[str],
    library: str,
    cpu: str,
    system: System = LINUX,
    device: DeviceCode | None = None,
    schedules: Mapping[str, Any] | None = None,
) -> Path:
    """The plugin, from the cache or freshly compiled; beside it a static library if there is one.

    ``isas``: called only when it must be compiled (it imports TVM); ``layouts``: ids of those it
    reads; ``cpu``: the C file that knows the CPU's features; ``system``: whose triple it is;
    ``device``: what runs the operators instead of the CPU; ``schedules``: presets that ``isas``
    took. Without ``isas`` there are no CPU kernels in it. Raises ToolchainError if a compiler is
    missing or fails.
    """
    tuned = json.dumps(schedules or {}, sort_keys=True)
    key = fingerprint(triple, *layouts, library, cpu, tuned, device.key if device else "")
    return cached(
        key,
        library,
        lambda path: _compile(isas(), triple, layouts, CSRC / cpu, path, system, device),
    )


def cached(key: str, library: str, compile: Callable[[Path], None]) -> Path:
    """The library kept under ``key``, or the one ``compile(path)`` leaves at its path.

    Raises ToolchainError if the cache cannot be used.
    """
    path = cache_dir() / key / library
    try:
        if not _intact(path):
            _require_space(path.parent.parent)
            compile(path)
    except OSError as error:
        raise ToolchainError(
            f"cannot use the cache {path.parent.parent} ({error.strerror}): set BITCOMPILE_CACHE "
            "to a folder that can be written"
        ) from error
    return path


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _intact(path: Path) -> bool:
    """Whether a cached library is there and whole: a crash may have left a part of it."""
    if not path.exists() or not _hash_file(path).exists():
        return False
    return _digest(path) == _hash_file(path).read_text("ascii")


def _digest(path: Path) -> str:
    """SHA-256 of a library and what was made with it."""
    beside = [companion.read_bytes() for companion in _companions(path)]
    return hashlib.sha256(b"".join([path.read_bytes(), *beside])).hexdigest()


def _companions(path: Path) -> list[Path]:
    """The static library and the programs that lie beside a library."""
    names = (static_library(path).name, *PROGRAMS)
    found = [path.with_name(name) for name in names if path.with_name(name) != path]
    return [companion for companion in found if companion.exists()]


def _require_space(folder: Path) -> None:
    """Make the cache folder; raises ToolchainError if its disk is all but full.

    LLVM ends the process when it cannot write an object file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        raise ToolchainError(f"no space left in {folder}: free some, or set BITCOMPILE_CACHE")


def compile_kernels(
    isas: Sequence[Isa], layouts: Sequence[str], folder: Path, mtriple: str | None = None
) -> tuple[list[Path], Path]:
    """Write the kernels' object files and ``kernels.c``, their table, to ``folder``.

    ``mtriple``: LLVM's triple of the host, None for this machine's.
    """
    from bitcompile.targets.tir.objects import compile_object

    objects = []
    for isa in isas:
        functions = {
            name: _generate(made, isa, name)
            for field, made in generators(layouts).items()
            for name in [symbol(field, isa.name)]
        }
        objects.append(folder / f"{isa.name}.o")
        compile_object(
            functions, {**isa.target, **({"mtriple": mtriple} if mtriple else {})}, objects[-1]
        )
    table = folder / "kernels.c"
    table.write_text(_table_source(isas, layouts))
    return objects, table


def _compile(
    isas: Sequence[Isa],
    triple: str,
    layouts: Sequence[str],
    cpu: Path,
    path: Path,
    system: System,
    device: DeviceCode | None = None,
) -> None:
    """Compile and link into a temporary folder, then move the results to ``path``'s."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = Path(name)
        objects: list[Path] = []
        sources = [CSRC / name for name in (*GLUE, *(device.sources if device else ()))]
        if isas:
            objects, table = compile_kernels(isas, layouts, work, system.llvm_triple(triple))
            sources += [*(CSRC / name for name in CPU_GLUE), cpu, table]
        sources.append(work / "device.c")
        sources[-1].write_text(device_source(layouts, device))
        made = work / path.name
        system.link(triple, objects, sources, made)
        if system.archive is not None:
            system.archive(triple, objects, sources, static_library(made))
        for name, files in (device.programs if device else {}).items():
            assert system.program is not None
            system.program(triple, [], [CSRC / file for file in files], made.with_name(name))
        keep(made, path)


def keep(made: Path, path: Path) -> None:
    """Move a library, and what was made with it, into their place in the cache.

    Two builds may meet here: each leaves a whole library, and both are the same program.
    """
    digest = made.with_name("sha256")
    digest.write_text(_digest(made), "ascii")
    for companion in _companions(made):
        os.replace(companion, path.with_name(companion.name))
    os.replace(digest, _hash_file(path))
    os.replace(made, path)


def static_library(library: Path) -> Path:
    """Where the static library of a plugin lies."""
    return library.with_suffix(".a")
