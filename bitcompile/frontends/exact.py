"""Float weights that are ternary as they stand, such as unpacked group-scaled checkpoints.

The rule: a weight ``[N, K]`` is ternary if all of its values are ``-s``, 0 or ``s`` with one ``s``
a row, or else one ``s`` a row and group of g consecutive columns, for a g of
:data:`bitcompile.packing.GROUP_SIZES`; the largest such g is taken. Values are compared as they
are stored: a weight with a single other value is not ternary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitcompile.packing import GROUP_SIZES, PORTABLE, PackedTernary

RULE = (
    "its values are not -s, 0 and s with one s a row or a group of "
    f"{', '.join(map(str, GROUP_SIZES))} columns"
)
"""What a weight lacks that :func:`exactly_ternary` gives None for."""


def exactly_ternary(values: npt.NDArray[np.float32]) -> PackedTernary | None:
    """The finite float32 ``[N, K]`` in the portable layout, None if it is not ternary."""
    magnitude = np.abs(values)
    N, K = values.shape
    for size in (0, *sorted((g for g in GROUP_SIZES if g < K), reverse=True)):
        scale = np.maximum.reduceat(magnitude, np.arange(0, K, size or K), axis=1)
        if _only(magnitude, scale, size or K):
            codes = (np.sign(values) + 1).astype(np.uint8)
            return PackedTernary(PORTABLE.encode(codes), scale, PORTABLE, (N, K), size)
    return None


def _only(magnitude: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], columns: int) -> bool:
    """Whether every magnitude is 0 or that of its group."""
    for group in range(scale.shape[1]):
        part = magnitude[:, group * columns : (group + 1) * columns]
        if ((part != scale[:, group, None]) & (part != 0)).any():
            return False
    return True
