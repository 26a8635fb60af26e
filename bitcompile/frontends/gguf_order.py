"""Which order the codes of an I2_S file have: bitnet.cpp does not write it down.

Every order decodes to valid ternary weights, and only one is the model. Two rules can tell:

1. **Shape.** A kernel of bitnet.cpp takes 128 columns at once on x86 and 64 on ARM, so a width that
   64 divides and 128 does not says ``k64``.
2. **Agreement.** In a trained network the same hidden unit is a row of one weight and a column of
   another: row n of gate and up is column n of down, row n of value is a column of output, and row
   n of output and down is column n of the next gate and up. How many weights of a unit are nonzero
   agrees (or disagrees) between its row and its column. A wrong order permutes columns within 128
   and breaks that, while rows keep their counts. With r the correlation of the centred counts of
   one such pair over n units, ``S = sum n r**2`` over pairs and layers is twice the logarithm of
   the likelihood that the pairs belong together; the order with the largest S is the file's if S
   exceeds every other by :data:`MARGIN`.

Random weights satisfy neither, and the user is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitcompile.errors import InputError
from bitcompile.frontends.gguf_ternary import I2S_ORDERS, i2s_codes, i2s_fits

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.float64]

MARGIN = 100.0
"""Least difference of S: 10 standard deviations of what 24 unrelated pairs give by chance."""
CENTRED = 128
"""Units that are centred together: no order moves a column further."""


@dataclass(frozen=True)
class Layer:
    """The I2_S tensors of one layer: code bytes and ``(N, K)`` by role."""

    tensors: Mapping[str, tuple[Bytes, int, int]]
    """``gate``, ``up``, ``down``, ``value``, ``output``."""
    heads: int
    kv_heads: int


def i2s_order(shapes: Sequence[tuple[int, int]], layers: Sequence[Layer]) -> str:
    """The order of a file whose I2_S tensors have these ``(N, K)``; see the module.

    ``layers``: some of its layers. Raises InputError if it cannot be told.
    """
    possible = [o for o in I2S_ORDERS if all(i2s_fits(N, K, o) for N, K in shapes)]
    if not possible:
        N, K = next((N, K) for N, K in shapes if not i2s_fits(N, K, "k64"))
        raise InputError(f"I2_S cannot hold a [{N}, {K}] weight in any known order: damaged file")
    if len(possible) == 1:
        return possible[0]
    scores = {order: sum(_agreement(layer, order) for layer in layers) for order in possible}
    best, second = sorted(scores, key=lambda order: -scores[order])[:2]
    if scores[best] - scores[second] < MARGIN:
        known = "; ".join(f"{order} = {I2S_ORDERS[order]}" for order in possible)
        raise InputError(
            "I2_S files do not say in which order their codes lie, and the weights do not tell: "
            f"give --i2s-order as the machine that wrote the file has it ({known})"
        )
    return best


def _agreement(layer: Layer, order: str) -> float:
    """S of one layer."""
    used = {}
    for role, (data, N, K) in layer.tensors.items():
        nonzero = i2s_codes(data, N, K, order) != 1
        used[role] = (nonzero.sum(axis=1), nonzero.sum(axis=0))
    value = used["value"][0].reshape(layer.kv_heads, 1, -1)
    value = np.repeat(value, layer.heads // layer.kv_heads, axis=1).reshape(-1)
    pairs = (
        (used["gate"][0] + used["up"][0], used["down"][1]),
        (value, used["output"][1]),
        (used["output"][0] + used["down"][0], used["gate"][1] + used["up"][1]),
    )
    return sum(_score(rows, columns) for rows, columns in pairs)


def _score(rows: Counts, columns: Counts) -> float:
    """``n r**2`` of two counts of the same units; 0 where either is constant."""
    a, b = _centred(rows), _centred(columns)
    power = float((a @ a) * (b @ b))
    return a.size * float(a @ b) ** 2 / power if power > 0 else 0.0


def _centred(counts: Counts) -> Counts:
    whole = counts.astype(np.float64)
    parts = [whole[i : i + CENTRED] for i in range(0, whole.size, CENTRED)]
    return np.concatenate([part - part.mean() for part in parts])
