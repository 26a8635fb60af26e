"""What the OpenCL schedules ask of a device, by arithmetic: ``python -m tests.bench.opencl_model``.

No phone was at hand, so this takes the place of a measurement: work-items and bytes, which follow
from the schedules alone. Rates of a device, put in, give the time it cannot beat.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitcompile.targets.adreno import SCHEDULES as ADRENO
from bitcompile.targets.mali import SCHEDULES as MALI
from bitcompile.targets.opencl import SCHEDULES as GENERIC
from bitcompile.targets.tir.opencl.schedule import TILE_ROWS, Schedule, Schedules

TARGETS = {"opencl": GENERIC, "mali": MALI, "adreno": ADRENO}
SHAPES = ((2560, 2560), (13824, 2560), (2560, 6912))
"""``(N, K)`` of 2B-4T: attention's output, gate and up, down."""
PROMPT = 512
COLUMNS = 16
"""Of a weight word; an activation row has as many bytes there."""


def ceil(a: int, b: int) -> int:
    """Division, rounded up."""
    return -(-a // b)


def groups(cut: Schedule, N: int, M: int) -> int:
    """Work-groups of a product."""
    return ceil(ceil(N, TILE_ROWS), cut.tiles) * ceil(M, cut.activation_rows)


def local_bytes(cut: Schedule) -> int:
    """Local memory of a work-group."""
    joined = cut.slices * cut.lanes * cut.rows * cut.batch if cut.slices > 1 else 0
    return 4 * joined + cut.stage * COLUMNS * cut.activation_rows


def decode(target: str, schedules: Schedules) -> str:
    """A row of the table for one token."""
    cut = schedules.decode
    items = cut.size[0] * cut.size[1]
    cells = [target, str(items), str(4 * cut.rows), str(local_bytes(cut))]
    for N, K in SHAPES:
        steps = ceil(ceil(K, COLUMNS), cut.slices)
        cells.append(f"{groups(cut, N, 1)} x {items}, {steps}")
    return f"| {' | '.join(cells)} |"


def prefill(target: str, schedules: Schedules) -> str:
    """A row of the table for a prompt."""
    cut = schedules.prefill
    items = cut.size[0] * cut.size[1]
    macs, loaded = cut.rows * cut.batch * COLUMNS, 4 * cut.rows + COLUMNS * cut.batch
    cells = [target, str(items), f"{cut.rows} x {cut.batch}", f"{macs / loaded:.1f}",
             str(local_bytes(cut)), str(ceil(PROMPT, cut.activation_rows))]  # fmt: skip
    cells += [f"{groups(cut, N, PROMPT)} x {items}" for N, _ in SHAPES]
    return f"| {' | '.join(cells)} |"


def tables() -> Iterator[str]:
    """Both tables, as Markdown."""
    shapes = " | ".join(f"{N} x {K}" for N, K in SHAPES)
    yield f"| one token | items of a group | bytes a load | local bytes | {shapes} |"
    yield "|---" * (4 + len(SHAPES)) + "|"
    yield from (decode(*entry) for entry in TARGETS.items())
    yield ""
    yield (f"| {PROMPT} tokens | items of a group | rows of an item | MAC a byte | local bytes "
           f"| reads of a weight | {shapes} |")  # fmt: skip
    yield "|---" * (6 + len(SHAPES)) + "|"
    yield from (prefill(*entry) for entry in TARGETS.items())


if __name__ == "__main__":
    print("\n".join(tables()))
