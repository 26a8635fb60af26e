"""Writes kernels.npz: inputs of every operator, and what the NumPy reference makes of them.

``python -m tests.golden.make``. A change of the file is a change of what bitcompile computes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitcompile.packing import CPU_TILE, PackedTernary
from tests import kernels
from tests.kernels import Arrays

FILE = Path(__file__).with_name("kernels.npz")
EPS = 1e-5
LINEAR = {"rows": (37, 203, 11, 0), "wide": (18, 1041, 9, 0), "grouped": (35, 330, 10, 64),
          "fine": (16, 100, 2, 16)}  # fmt: skip
"""Name to N, K, M and group size."""
HEADS = {"head8": (37, 300, 3, 8), "head4": (41, 300, 3, 4)}
"""Name to V, K, M and bits."""


def linear(seed: int, N: int, K: int, M: int, group_size: int) -> Arrays:
    """Random rows; the last two are tiny, and hold a NaN."""
    a = kernels.linear_inputs(np.random.default_rng(seed), N, K, M, group_size)
    a["x"][-2] *= np.float32(1e-42)
    a["x"][-1, K // 2] = np.nan
    packed = PackedTernary.pack(a["weight"], a["scale"], CPU_TILE, group_size).data
    return {**a, "packed": packed, **kernels.linear_reference(a, group_size, EPS)}


def gates() -> Arrays:
    """Gate inputs over the whole range, with every kind of special value."""
    rng = np.random.default_rng(5)
    special = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        3.4e38,
        -3.4e38,
        np.inf,
        -np.inf,
        np.nan,
        88.1,
        -87.5,
        -104,
    ]
    spread = rng.standard_normal((3, 83)) * np.array([[0.1], [3], [40]])
    spread[0, : len(special)] = special
    both = np.concatenate([spread, rng.standard_normal((3, 83))], axis=1).astype(np.float32)
    return {"both": both, **kernels.glu_reference(both)}


def vectors() -> dict[str, Arrays]:
    """Everything, by case."""
    made = {name: linear(i, *sizes) for i, (name, sizes) in enumerate(LINEAR.items())}
    made["gates"] = gates()
    for name, sizes in HEADS.items():
        made[name] = kernels.head_inputs(np.random.default_rng(9), *sizes)
    return made


def load() -> dict[str, Arrays]:
    """The committed vectors."""
    made: dict[str, Arrays] = {}
    with np.load(FILE, allow_pickle=False) as file:
        for key in file.files:
            case, _, name = key.partition(".")
            made.setdefault(case, {})[name] = file[key]
    return made


if __name__ == "__main__":
    np.savez_compressed(
        FILE, **{f"{case}.{name}": v for case, a in vectors().items() for name, v in a.items()}
    )
    print(f"{FILE}: {FILE.stat().st_size} bytes")
