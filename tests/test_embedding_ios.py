"""The iOS example: what can be checked without Xcode."""

from __future__ import annotations

import re
from pathlib import Path

import bitcompile.custom_ops.csrc
from tests.embedding import EXAMPLES, STRICT, C, zig
from tests.tools import embedding_kit

IOS = EXAMPLES / "ios"
CSRC = Path(bitcompile.custom_ops.csrc.__path__[0])


def test_the_c_part_compiles_for_apple_with_the_plugin_linked(tmp_path: Path) -> None:
    """Headers lie in a framework there; zig has macOS's C library, and no iOS one."""
    (tmp_path / "onnxruntime").symlink_to(embedding_kit("android") / "headers")
    flags = (f"-I{tmp_path}", f"-I{CSRC}", "-DBITCOMPILE_STATIC", "-target", "aarch64-macos.13.0")
    zig(*STRICT, *flags, "-c", C / "bitcompile_model.c", "-o", tmp_path / "model.o")


def test_swift_calls_functions_of_the_header() -> None:
    header = (C / "bitcompile_model.h").read_text()
    swift = "".join(file.read_text() for file in IOS.glob("*.swift"))
    called = set(re.findall(r"\b(bcm_\w+)\(", swift))
    declared = set(re.findall(r"\b(bcm_\w+)\(", header)) | {"bcm_options"}
    assert called
    assert called <= declared
    fields = set(re.findall(r"options\.(\w+) =", swift))
    assert fields <= set(re.findall(r"(\w+);", header))
    assert '#include "bitcompile_model.h"' in (IOS / "Bridging-Header.h").read_text()
