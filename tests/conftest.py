from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import bitcompile
from bitcompile.artifact import Artifact
from bitcompile.targets.tir.linking import CSRC, zig
from tests import tools
from tests.embedding import MODEL


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """The embedded model built for a target, once a session."""
    folder = tmp_path_factory.mktemp("embedded")

    @cache
    def build(target: str) -> Artifact:
        return bitcompile.build(MODEL, target, out=folder / target, verify=False)

    return build


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that put ``fake_opencl.c`` in the place of the OpenCL driver."""
    folder = tmp_path_factory.mktemp("faulty")
    real = next(Path("/usr/lib").rglob(tools.opencl_driver()))
    flags = ["-shared", "-fPIC", "-Wall", "-Werror", f"-I{CSRC}"]
    source = Path(__file__).with_name("fake_opencl.c")
    zig(["cc", *flags, str(source), str(real), "-o", str(folder / "libOpenCL.so")])
    cache = folder / "cache"
    return {"LD_LIBRARY_PATH": str(folder), "BITCOMPILE_CACHE": str(cache)}
