"""Put everything that ``tests.gpu.run`` needs on another machine into one folder.

    python -m tests.gpu.carry FOLDER [--arch 90a]

The folder holds the launch library with its device code (for one architecture if asked), the
scripts, and the modules with the reference; it is meant to be copied to a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import bitcompile
from bitcompile.targets.tir.cuda import gemv
from bitcompile.targets.tir.cuda.compiler import IMAGES, Image
from bitcompile.targets.tir.cuda.kernels import TILES
from bitcompile.targets.tir.cuda.plugin import device_code, write_sources
from bitcompile.targets.tir.linking import CSRC, zig
from bitcompile.targets.x86 import TRIPLE

LIBRARY = "bitcompile_cuda.so"
MODULES = ("numerics.py", "packing.py", "errors.py")


def carry(folder: Path, arch: str | None = None) -> None:
    """Fill ``folder``."""
    spine, here = Path(bitcompile.__file__).parent, Path(__file__).parent
    for source, target in ((spine, folder / "bitcompile"), (here, folder / "tests" / "gpu")):
        target.mkdir(parents=True, exist_ok=True)
        names = MODULES if source is spine else [path.name for path in here.glob("*.py")]
        for name in names:
            shutil.copy(source / name, target / name)
    for package in ("bitcompile", "tests"):
        (folder / package / "__init__.py").write_text("")
    variants = {"tiles": [t.tokens for t in TILES], "longest": gemv.LONGEST}
    (folder / "tests" / "gpu" / "variants.json").write_text(json.dumps(variants))
    images = [image for image in IMAGES if arch in (None, image.arch)]
    link_launcher(folder / LIBRARY, device_code(images))


def link_launcher(library: Path, images: Mapping[Image, bytes]) -> None:
    """The launch functions alone with device code, as a shared library."""
    build = library.absolute().with_name("build")
    build.mkdir(exist_ok=True)
    sources = write_sources(build, images)
    stand_in = build / "device.c"  # the operators, which the launch functions do without
    stand_in.write_text("const char bc_cuda_device[1];\n")
    sources.append(stand_in)
    options = ["-std=c11", "-O2", "-fPIC", "-shared", "-fno-sanitize=all", "-ldl"]
    inputs = [f"-I{CSRC}", f"-I{build}", *map(str, sources), str(CSRC / "cuda_launch.c")]
    zig(["cc", "-target", TRIPLE, *options, *inputs, "-o", str(library)])
    shutil.rmtree(build)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch")
    options = parser.parse_args()
    carry(options.folder, options.arch)
