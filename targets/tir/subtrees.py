"""Sums in the order of ``numerics.pairwise_sum``, one subtree after the other."""

from __future__ import annotations

from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, store, when

MOST_COLUMNS = 1 << 18
"""Of a row: ``MAX_K`` in ``custom_ops/csrc/ops.h``."""


def _has(number: Expr, level: int) -> Expr:
    return T.bitwise_and(T.shift_right(number, level), 1) == 1


class Subtrees:
    """Sums of subtrees of ``columns`` values each, joined as a binary counter carries.

    ``columns`` is a power of two; zeros in the last subtree fill a row up.
    """

    def __init__(self, columns: int) -> None:
        levels = (MOST_COLUMNS // columns).bit_length()
        # The sum of the last 2**i subtrees that are not joined, if their number has bit i.
        self._sums = [local(1, "float32") for _ in range(levels)]

    def add(self, total: Buffer, number: Expr, level: int = 0) -> None:
        """Take in ``total[0]``, which changes: the sum of subtree ``number``, or of 2**level."""
        with when(_has(number, level)):
            store(total, 0, self._sums[level][0] + total[0], 1)
            if level + 1 < len(self._sums):
                self.add(total, number, level + 1)
        with when(T.Not(_has(number, level))):
            store(self._sums[level], 0, total[0], 1)

    def total(self, count: Expr) -> Expr:
        """The sum of all ``count`` subtrees."""
        result = local(1, "float32")
        store(result, 0, T.float32(0), 1)
        for level, part in enumerate(self._sums):
            with when(_has(count, level)):
                store(result, 0, part[0] + result[0], 1)
        return result[0]
