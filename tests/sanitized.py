"""The plugin under sanitizers, and its kernels between guard pages: ``python -m tests.sanitized``.

gcc compiles the C glue with AddressSanitizer and UndefinedBehaviorSanitizer; the tests of the
plugin and some fuzz cases then run on it. TVM's objects are not instrumented: every kernel of every
variant that this CPU runs is called directly instead (:mod:`tests.guards`), on buffers that end, or
begin, where a page begins that must not be touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bitcompile.targets.tir.plugin import CPU_GLUE, CSRC, GLUE, compile_kernels, device_source
from bitcompile.targets.tir.x86 import ISAS
from bitcompile.targets.x86 import LAYOUTS
from tests.single_node import CHOSEN

CPU = "cpu_x86.c"
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
CASES = 600
"""Fuzz cases of a run."""
TESTS = "not exports and not kernel_table"
"""Tests of the plugin that are about more than how it was linked."""


def build(folder: Path) -> tuple[Path, Path]:
    """The instrumented plugin, and a library of the bare kernels; raises CalledProcessError."""
    objects, table = compile_kernels(ISAS, LAYOUTS, folder)
    plugin, kernels = folder / "libbitcompile_sanitized.so", folder / "libkernels.so"
    device = folder / "device.c"
    device.write_text(device_source(LAYOUTS))
    glue = [*(CSRC / name for name in (*GLUE, *CPU_GLUE, CPU)), device]
    shared = ["gcc", "-std=c11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{CSRC}"]
    script = f"-Wl,--version-script={CSRC / 'plugin.map'}"
    subprocess.run([*shared, *SANITIZERS, script, *glue, table, *objects, "-o", plugin], check=True)
    subprocess.run([*shared, *objects, "-o", kernels], check=True)
    return plugin, kernels


def environment(plugin: Path) -> dict[str, str]:
    """In which Python loads the instrumented plugin: the sanitizer must be loaded first.

    It looks for the C++ runtime, whose exceptions ONNX Runtime throws, when it starts.
    """
    first = [_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        # Python and ONNX Runtime keep what they allocate; ours is counted by its own test.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        CHOSEN: str(plugin),
    }


def _library(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(plugin: Path, folder: Path, cases: int = CASES) -> None:
    """The plugin's tests and ``cases`` fuzz cases on it; raises CalledProcessError."""
    tests = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "tests/test_plugin.py"]
    fuzz = ["-m", "tests.fuzz", "--target", "plugin", "--worker", str(folder / "fuzz")]
    for command in ([*tests, "-k", TESTS], [*fuzz, "--cases", str(cases)]):
        subprocess.run([sys.executable, *command], env=environment(plugin), check=True)


def main() -> int:
    """Build and run everything; 0 if there was no report."""
    with tempfile.TemporaryDirectory(prefix="bitcompile-sanitized-") as name:
        plugin, kernels = build(Path(name))
        subprocess.run([sys.executable, "-m", "tests.guards", kernels], check=True)
        run(plugin, Path(name))
    print("no reports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
