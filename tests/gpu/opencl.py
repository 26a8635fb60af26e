"""Is the OpenCL target exact, and how near to a pure read, on this machine's GPU?

    python -m tests.gpu.opencl FOLDER      # on the machine that builds
    FOLDER/run                             # on an x86-64 Linux machine whose driver has OpenCL

The folder holds the plugin without CPU kernels, golden vectors, a program that compares them and
one that measures, and a loader for NVIDIA's driver; neither Python nor CUDA is needed there.
"""

from __future__ import annotations

import ctypes.util
import shutil
import sys
import tempfile
from pathlib import Path

from bitcompile.errors import UsageError
from bitcompile.targets import resolve
from bitcompile.targets.opencl import SCHEDULES
from bitcompile.targets.tir.linking import CSRC, LINUX
from bitcompile.targets.tir.opencl.plugin import SOURCES, device_code
from bitcompile.targets.tir.opencl.schedule import Schedules
from bitcompile.targets.tir.plugin import GLUE
from bitcompile.targets.x86 import TRIPLE
from tests.device import conformance_program, vectors

RUN = """\
#!/bin/sh
# Exactness and speed of the OpenCL kernels on this machine; see tests/gpu/opencl.py.
cd "$(dirname "$0")" || exit 2
export LD_LIBRARY_PATH="$PWD:$LD_LIBRARY_PATH" BITCOMPILE_CACHE="${BITCOMPILE_CACHE:-$PWD/cache}"
export BITCOMPILE_VERBOSE=1
# A container often has the driver and not the file that names it.
[ -n "$(ls /etc/OpenCL/vendors/*.icd 2> /dev/null)" ] || export OCL_ICD_VENDORS="$PWD/vendors/"
./conformance ./libbitcompile_ops.so vectors.bin opencl && ./opencl_speed "$@"
"""


def carry(folder: Path) -> None:
    """Fill ``folder``; raises UsageError if it exists."""
    if folder.exists():
        raise UsageError(f"{folder} exists: remove it")
    (folder / "vendors").mkdir(parents=True)
    (folder / "vendors" / "nvidia.icd").write_text("libnvidia-opencl.so.1\n")
    shutil.copy(resolve("opencl", TRIPLE, {"fallback": "none"}).compile()[0], folder)
    vectors.write(folder / "vectors.bin")
    conformance_program(LINUX, TRIPLE, folder / "conformance")
    speed_program(folder / "opencl_speed")
    loader = ctypes.util.find_library("OpenCL")
    if loader is not None:
        shutil.copy(next(Path("/usr/lib").rglob(loader)), folder / "libOpenCL.so.1")
    (folder / "run").write_text(RUN)
    (folder / "run").chmod(0o755)


def speed_program(out: Path, schedules: Schedules = SCHEDULES) -> None:
    """``opencl_speed.c`` with the kernels of target ``opencl``, or of other schedules."""
    assert LINUX.program is not None
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "device.c"
        table.write_text(device_code("opencl", schedules, "auto", cpu=False).table())
        glue = [CSRC / source for source in (*GLUE, *SOURCES)]
        LINUX.program(TRIPLE, [], [Path(__file__).with_name("opencl_speed.c"),
                                   *glue, table], out)  # fmt: skip


if __name__ == "__main__":
    carry(Path(sys.argv[1]))
