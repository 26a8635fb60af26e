"""Register tiles of prefill: how an instruction set multiplies rows with a panel of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.tirx import Shuffle

from bitcompile.targets.tir.dsl import Buffer, Expr, T, const, load, local, store
from bitcompile.targets.tir.isa import Isa


class RegisterTile(Protocol):
    """``gemm.rows`` activation rows times ``vectors`` weight vectors."""

    @property
    def vectors(self) -> int:
        """Weight vectors, of ``isa.rows`` weight rows each."""

    def unpack(self, kb: Expr, v: int, codes: Sequence[Expr]) -> None:
        """Put the codes of weight vector ``v`` into the panel, for tile ``kb`` along its columns.

        ``codes[p]``: uint8, 4 columns from ``4 p`` on for each weight row.
        """

    def multiply(self, m: Expr, first: Expr, offset: Expr, count: Expr) -> Buffer:
        """Accumulators of ``count`` tiles along the columns, from ``offset`` in the panel on.

        ``m``: the first activation row; ``first``: the tile where the panel begins.
        """

    def total(self, acc: Buffer, r: int, v: int) -> Expr:
        """int32 sums of activation row ``r`` and the weight rows of vector ``v``."""


@dataclass(frozen=True)
class DotTile:
    """Dot products of 4 columns; ``panel[k4][vector][isa.bytes]``."""

    isa: Isa
    quads: int
    """4-column steps of a weight tile."""
    panel: Buffer
    q: Buffer
    KB: Expr

    @property
    def vectors(self) -> int:
        """See :class:`RegisterTile`, as for the methods below."""
        return self.isa.gemm.tiles * self.isa.groups

    def unpack(self, kb: Expr, v: int, codes: Sequence[Expr]) -> None:  # noqa: D102
        for p, code in enumerate(codes):
            vector = (kb * self.quads + p) * self.vectors + v
            store(self.panel, vector * self.isa.bytes, code, self.isa.bytes)

    def multiply(self, m: Expr, first: Expr, offset: Expr, count: Expr) -> Buffer:  # noqa: D102
        isa, rows, lanes = self.isa, self.isa.gemm.rows, self.isa.acc_lanes
        # As many steps a body as divide those of a tile.
        several = isa.gemm.quads if self.quads % isa.gemm.quads == 0 else 1
        acc = local(rows * self.vectors * lanes, isa.acc_dtype)
        for i in range(rows * self.vectors):
            store(acc, i * lanes, const(0, isa.acc_dtype, lanes), lanes)
        with T.serial(count * (self.quads // several)) as step:
            k4 = offset * self.quads + step * several
            for p in range(several):
                for r in range(rows):
                    row = (m + r) * (self.KB * self.quads) + first * self.quads
                    a = isa.quad(self.q, row + k4, p, isa.bytes)
                    for v in range(self.vectors):
                        at = (r * self.vectors + v) * lanes
                        w = load(self.panel, ((k4 + p) * self.vectors + v) * isa.bytes, isa.bytes)
                        store(acc, at, isa.ternary_dot(load(acc, at, lanes), w, a), lanes)
        return acc

    def total(self, acc: Buffer, r: int, v: int) -> Expr:  # noqa: D102
        lanes = self.isa.acc_lanes
        return self.isa.widen(load(acc, (r * self.vectors + v) * lanes, lanes))


HALVES = 2
"""8-column steps of a 16-column tile; and rows of a matrix product's operand."""
QUADS = 2 * HALVES
"""4-column steps of a 16-column tile."""


@dataclass(frozen=True)
class MatrixTile:
    """Products of 2 rows with 2 rows over 8 columns, for 16-byte vectors and 16-column tiles.

    ``panel[k8][vector][pair][16]``: columns 0..7 of one weight row, then of the next. An
    accumulator holds the sums of activation rows (2i, 2i + 1) with the weight rows of a pair.
    """

    isa: Isa
    panel: Buffer
    q: Buffer
    KB: Expr

    @property
    def vectors(self) -> int:
        """See :class:`RegisterTile`, as for the methods below."""
        return self.isa.gemm.tiles * self.isa.groups

    def unpack(self, kb: Expr, v: int, codes: Sequence[Expr]) -> None:  # noqa: D102
        quads = [T.reinterpret(code, dtype="int32x4") for code in codes]
        for h in range(HALVES):
            for pair in range(HALVES):
                order = [2 * pair, 4 + 2 * pair, 2 * pair + 1, 5 + 2 * pair]
                rows = _shuffled(quads[2 * h], quads[2 * h + 1], order, "uint8x16")
                store(self.panel, self._at(kb, h, v, pair), rows, 16)

    def _at(self, kb: Expr, h: int, v: int, pair: int) -> Expr:
        return (((kb * HALVES + h) * self.vectors + v) * HALVES + pair) * 16

    def multiply(self, m: Expr, first: Expr, offset: Expr, count: Expr) -> Buffer:  # noqa: D102
        rows, dot = self.isa.gemm.rows, self.isa.matrix_dot
        assert dot is not None
        acc = local(rows * self.vectors * 4, "int32")
        for i in range(rows * self.vectors):
            store(acc, i * 4, const(0, "int32", 4), 4)
        with T.serial(count) as step:
            kb = offset + step
            for h in range(HALVES):
                for i in range(rows // HALVES):
                    a = self._activations(m + HALVES * i, (first + kb) * QUADS, h)
                    for v in range(self.vectors):
                        for pair in range(HALVES):
                            at = self._accumulator(i, v, pair)
                            w = load(self.panel, self._at(kb, h, v, pair), 16)
                            store(acc, at, dot(load(acc, at, 4), w, a), 4)
        return acc

    def _activations(self, m: Expr, k4: Expr, h: int) -> Expr:
        """Columns ``8 h`` to ``8 h + 7`` of the block at ``k4``, of rows m and m + 1."""
        low, high = (load(self.q, (m + i) * (self.KB * QUADS) + k4, 4) for i in range(HALVES))
        return _shuffled(low, high, [2 * h, 2 * h + 1, 4 + 2 * h, 5 + 2 * h], "int8x16")

    def _accumulator(self, i: int, v: int, pair: int) -> int:
        return ((i * self.vectors + v) * HALVES + pair) * 4

    def total(self, acc: Buffer, r: int, v: int) -> Expr:  # noqa: D102
        i, half = divmod(r, HALVES)
        low, high = (load(acc, self._accumulator(i, v, pair), 4) for pair in range(HALVES))
        return _shuffled(low, high, [2 * half, 2 * half + 1, 4 + 2 * half, 5 + 2 * half], "int32x4")


def _shuffled(low: Expr, high: Expr, order: Sequence[int], dtype: str) -> Expr:
    """Four of the int32 lanes of two vectors."""
    lanes = Shuffle([low, high], [T.int32(i) for i in order])
    return lanes if dtype == "int32x4" else T.reinterpret(lanes, dtype=dtype)


def register_tile(isa: Isa, quads: int, panel: Buffer, q: Buffer, KB: Expr) -> RegisterTile:
    """The register tile an instruction set has for weight tiles of ``4 quads`` columns."""
    if isa.matrix_dot is not None and quads == QUADS:
        return MatrixTile(isa, panel, q, KB)
    return DotTile(isa, quads, panel, q, KB)
