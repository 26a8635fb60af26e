"""A model, not a measurement: how fast llvm-mca expects the ARM kernels' inner loops to be.

``python -m tests.bench.arm_model`` takes the loops from the compiled plugin and asks llvm-mca (LLVM
16 or newer) for their cycles, with every load from the first-level cache: what remains is whether a
core could keep up with memory. A row names the core whose scheduling model was used, and the run
fails if LLVM answers with another's (older ones alias many cores to the Cortex-A57).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from bitcompile.errors import ToolchainError
from bitcompile.inspection import aligned
from bitcompile.targets import resolve
from bitcompile.targets.tir.plugin import static_library, symbol

VERSIONS = range(22, 15, -1)
"""LLVM releases whose tools may be installed with a number behind their names."""
ITERATIONS = 200
PRODUCTS = {"smlal": 8, "smlal2": 8, "smull": 8, "smull2": 8, "sdot": 16, "smmla": 32}
"""Multiply-accumulates of an instruction."""
TOP_FIELD = re.compile(r"ushr\s+v\d+\.16b, v\d+\.16b, #(0x)?6")
"""Occurs once in decoding 16 bytes, 64 weights."""
MEMORIES = {"LPDDR4X-4266": 34.1, "LPDDR5-6400": 51.2, "LPDDR5X-8533": 68.3}
"""Peak GB/s of a phone's 64-bit memory: transfers per second times 8 bytes."""


@dataclass(frozen=True)
class Core:
    """A kind of core, and the scheduling model that stands for it."""

    name: str
    model: str
    """As ``llvm-mca -mcpu`` spells it."""
    units: str
    """How the model's resources begin: the proof that it is its own."""
    ghz: float
    """A usual clock of it."""
    isas: tuple[str, ...]


CORES = (
    Core("Cortex-A53", "cortex-a53", "A53Unit", 1.8, ("neon",)),
    Core("Cortex-A55", "cortex-a55", "CortexA55Unit", 2.0, ("neon", "dotprod")),
    Core("Cortex-A510", "cortex-a510", "CortexA510Unit", 2.0, ("neon", "dotprod", "i8mm")),
    Core("Cortex-A76, A78", "neoverse-n1", "N1Unit", 2.4, ("neon", "dotprod")),
    Core("Cortex-A710, A715", "neoverse-n2", "N2Unit", 2.6, ("neon", "dotprod", "i8mm")),
    Core("Cortex-X1", "neoverse-v1", "V1Unit", 2.9, ("neon", "dotprod")),
    Core("Neoverse-V1", "neoverse-v1", "V1Unit", 2.6, ("neon", "dotprod", "i8mm")),
    Core("Cortex-X3, Neoverse-V2", "neoverse-v2", "V2Unit", 3.2, ("neon", "dotprod", "i8mm")),
)


def tool(name: str) -> str:
    """A program of LLVM 16 or newer; raises ToolchainError if there is none."""
    for candidate in (*(f"{name}-{version}" for version in VERSIONS), name):
        path = shutil.which(candidate)
        if path is not None and _release(path) >= min(VERSIONS):
            return path
    raise ToolchainError(f"no {name} of LLVM 16 or newer: apt-get install llvm-19")


def _release(path: str) -> int:
    found = re.search(r"LLVM version (\d+)", _output([path, "--version"]))
    return int(found[1]) if found else 0


def _output(command: Sequence[str], text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as assembly text."""

    body: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of an iteration."""
        return sum(PRODUCTS.get(line.split()[0], 0) for line in self.body)

    @property
    def weights(self) -> int:
        """Weights that an iteration decodes."""
        return 64 * sum(bool(TOP_FIELD.match(line)) for line in self.body)

    def cycles(self, core: Core) -> float:
        """Cycles of an iteration; raises ToolchainError if LLVM has no model of this core."""
        flags = ["-mtriple=aarch64", f"-mcpu={core.model}", "-mattr=+dotprod,+i8mm"]
        text = "\n".join([".Lloop:", *self.body])
        report = _output([tool("llvm-mca"), *flags, f"--iterations={ITERATIONS}"], text)
        units = re.search(r"^\[\d[\d.]*\]\s+- (\w+)", report, re.MULTILINE)
        if units is None or not units[1].startswith(core.units):
            raise ToolchainError(f"this LLVM has no model of {core.model}: install a newer one")
        total = re.search(r"Total Cycles:\s+(\d+)", report)
        assert total is not None
        return int(total[1]) / ITERATIONS


def loops(field: str, isa: str) -> list[Loop]:
    """The innermost loops with products in a kernel of the arm plugin."""
    archive = static_library(resolve("arm").compile()[0])
    flags = ["-d", "--no-show-raw-insn", "--mattr=+dotprod,+i8mm"]
    flags.append(f"--disassemble-symbols={symbol(field, isa)}")
    listing = _output([tool("llvm-objdump"), *flags, str(archive)])
    lines = re.findall(r"^\s+([0-9a-f]+):\s+(.+?)\s*(?://.*)?$", listing, re.MULTILINE)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found, last = [], -1
    for i, (address, text) in enumerate(lines):
        jump = re.match(r"(b\.\w+|cbn?z \w+,|tbn?z \w+, #\w+,)\s+0x([0-9a-f]+)", text)
        if jump is None or int(jump[2], 16) > int(address, 16):
            continue
        first = place[int(jump[2], 16)]
        if first > last:  # a loop around another ends behind it
            body = tuple(text for _, text in lines[first:i])
            found.append(Loop((*body, f"{jump[1]} .Lloop")))
        last = i
    return [loop for loop in found if loop.macs]


def decode_loop(isa: str) -> Loop:
    """Weights times one activation row; the rare widening of NEON's sums is left out."""
    return max(
        (x for x in loops("gemv[BC_I2]", isa) if x.macs == x.weights), key=lambda x: x.weights
    )


def prefill_loop(isa: str) -> Loop:
    """One step of the register tile."""
    return max(loops("gemm[BC_I2]", isa), key=lambda x: x.macs)


def cycles_per_64_weights(core: Core, isa: str) -> float:
    """Of the decode loop."""
    loop = decode_loop(isa)
    return loop.cycles(core) * 64 / loop.weights


def table() -> list[list[str]]:
    """One row a core and variant."""
    rows = [["core", "model", "GHz", "variant", "cycles / 64 weights", "GB/s a core",
             *(f"cores for {name}" for name in MEMORIES), "prefill MAC/cycle"]]  # fmt: skip
    for core in CORES:
        for isa in core.isas:
            cycles = cycles_per_64_weights(core, isa)
            rate = 64 / 4 / cycles * core.ghz  # 4 weights a byte
            prefill = prefill_loop(isa)
            rows.append([core.name, core.model, f"{core.ghz}", isa, f"{cycles:.1f}", f"{rate:.1f}",
                         *(str(ceil(peak / rate)) for peak in MEMORIES.values()),
                         f"{prefill.macs / prefill.cycles(core):.0f}"])  # fmt: skip
    return rows


if __name__ == "__main__":
    print("A model by llvm-mca, loads from the first-level cache; not a measurement.")
    print("\n".join(aligned(table())))
