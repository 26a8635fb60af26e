"""The CUDA plugin: device code of every architecture, and the C host, in one library."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitcompile.packing import CUDA_TILE
from bitcompile.target import Kernel
from bitcompile.targets.tir.cuda.compiler import IMAGES, Image, compile_image, compiler_version
from bitcompile.targets.tir.linking import CSRC, link
from bitcompile.targets.tir.plugin import cached, fingerprint, keep, layouts_source

HERE = Path(__file__).parent
GLUE = ("plugin.c", "checks.c", "cuda.c", "cuda_launch.c")
"""The C sources of the plugin; the last alone launches without ONNX Runtime."""
JOBS = 2
"""Architectures compiled at a time: each takes up to 400 MB."""


def kernel_table() -> tuple[Kernel, ...]:
    """The rows of the manifest."""
    from bitcompile.targets.tir.cuda.kernels import KERNELS

    return tuple(
        Kernel(kernel.name.removeprefix("bc_"), image.name, kernel.name)
        for image in IMAGES
        for kernel in KERNELS
        if kernel.feature is None or image.arch.endswith(kernel.feature)
    )


def build_plugin(triple: str, library: str) -> Path:
    """The plugin, from the cache or freshly compiled; raises ToolchainError."""
    sources = [path for path in sorted(HERE.iterdir()) if path.is_file()]
    key = fingerprint("cuda", triple, library, compiler_version(), more=sources)
    return cached(key, library, lambda path: compile_plugin(triple, path))


def device_code(images: Sequence[Image] = IMAGES) -> Mapping[Image, bytes]:
    """Machine code, or PTX, of every image."""
    from bitcompile.targets.tir.cuda.kernels import kernel_source

    texts = {image: kernel_source(image.arch) for image in images}  # TVM is not thread-safe
    with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
        made = pool.map(lambda image: compile_image(texts[image], image), images)
        return dict(zip(images, made, strict=True))


def compile_plugin(triple: str, path: Path, glue: Sequence[str] = GLUE) -> None:
    """Compile and link into a temporary folder, then move the result to ``path``."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = Path(name)
        sources = write_sources(work, device_code())
        flags = [f"-I{work}", "-ldl"]
        link(triple, [], [*sources, *(CSRC / name for name in glue)], work / path.name, flags)
        keep(work / path.name, path)


def write_sources(folder: Path, images: Mapping[Image, bytes]) -> list[Path]:
    """The generated part of the plugin: device code as data, its table, and a header."""
    from bitcompile.targets.tir.cuda.kernels import KERNELS, header

    data = ['.section .rodata, "a"']
    table = [
        '#include "cuda_launch.h"',
        '#include "ops.h"',
        "const Device *const bc_device = &bc_cuda_device;",
        *layouts_source([CUDA_TILE.id]),
    ]
    names = ", ".join(f'"{kernel.name}"' for kernel in KERNELS)
    table.append(f"const char *const bc_kernel_names[] = {{{names}}};")
    table.append(f"const int bc_kernel_count = {len(KERNELS)};")
    rows = []
    for image, code in images.items():
        file = folder / f"{image.name}.bin"
        file.write_bytes(code)
        symbol = f"bc_image_{image.name}"
        data += [".balign 64", f".hidden {symbol}", f".global {symbol}", f"{symbol}:"]
        data.append(f'.incbin "{file}"')
        table.append(f'extern const char {symbol}[] __attribute__((visibility("hidden")));')
        number = 0 if image.ptx else int(image.arch.rstrip("a"))
        exact = int(image.arch.endswith("a"))
        rows.append(f'  {{"{image.name}", {number // 10}, {number % 10}, {exact}, {symbol}}},')
    table += ["const bc_image bc_images[] = {", *rows, "};"]
    table.append(f"const int bc_image_count = {len(images)};")
    data.append('.section .note.GNU-stack, "", @progbits')  # no executable stack
    (folder / "images.S").write_text("\n".join(data) + "\n")
    (folder / "kernels.c").write_text("\n".join(table) + "\n")
    (folder / "cuda_kernels.h").write_text(header())
    return [folder / "images.S", folder / "kernels.c"]
