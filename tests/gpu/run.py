"""Is the CUDA target exact, and how fast, on this machine's GPU?

    python -m tests.gpu.carry FOLDER       # on the machine that builds: everything that is needed
    python -m tests.gpu.run --library bitcompile_cuda.so     # in FOLDER on the one with the GPU

Needs torch (with Triton), numpy and a driver there. Sections: exact, sanitize, decode, batch,
head, prefill, grouped, stack; all by default.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.gpu import exact, speed
from tests.gpu.launch import Launcher

SECTIONS = ("exact", "sanitize", "decode", "batch", "head", "prefill", "grouped", "stack")


def main() -> int:
    """Run the sections that were asked for; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*SECTIONS, "tune", "quick"), default=SECTIONS)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    launcher = Launcher(options.library.absolute())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {options.seed}")
    begin = time.monotonic()
    for section in options.only:
        run(section, launcher, options)
        print(f"[{section}: {time.monotonic() - begin:.0f} s from the start]", flush=True)
    return 0


def run(section: str, launcher: Launcher, options: argparse.Namespace) -> None:
    """One section; raises AssertionError for a wrong result."""
    if section in ("exact", "quick"):
        count = exact.check(launcher, options.seed, quick=section == "quick")
        print(f"exact: {count} products, every bit equal")
    elif section == "sanitize":
        sanitize(options)
    elif section == "decode":
        speed.decode_table(launcher)
    elif section == "batch":
        speed.batch_table(launcher)
    elif section == "head":
        speed.head_table(launcher)
    elif section == "prefill":
        speed.prefill_table(launcher)
    elif section == "grouped":
        speed.grouped_table(launcher)
    elif section == "tune":
        speed.tune_stack(launcher)
        speed.tune_prefill(launcher)
    elif section == "stack":
        bandwidth = speed.read_bandwidth(launcher)
        print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s")
        speed.stack_table(launcher, bandwidth)


def sanitize(options: argparse.Namespace) -> None:
    """The small products once more under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitize: compute-sanitizer is not installed")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
        command += ["tests.gpu.run", "--library", str(options.library), "--only", "quick"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        print(f"sanitize {check}: exit {done.returncode}, {' '.join(summary)}")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


if __name__ == "__main__":
    sys.exit(main())
