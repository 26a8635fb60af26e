"""Decode: ternary matrix times few activation rows, each weight byte read once from memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitcompile.targets.tir.codes import CODINGS, Coding
from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    in_powers,
    kernel,
    load,
    local,
    prefetch,
    store,
    when,
)
from bitcompile.targets.tir.epilogue import GROUP_SIZES, PARAMETERS, Epilogue
from bitcompile.targets.tir.isa import MAX_FIELD, TILE, TILE_ROWS, Isa

OPERANDS = (("w", "uint8*"), ("q", "int32*"))
SIZES = (("tiles", "int32"), ("M", "int32"), ("KB", "int32"))
"""16-row weight tiles, activation rows, tiles along K."""


class Accumulators:
    """Register accumulators of a block: by stream, activation row, vector of the tile, and shift.

    Fields decoded in place carry a factor ``2**shift``; each shift has its own accumulator and is
    divided out once at the end.
    """

    def __init__(self, isa: Isa, streams: int, batch: int, chains: int = 1) -> None:
        self.isa = isa
        probe = const(0, "uint8", isa.bytes)
        # Every layout has its fields at shifts that bit pairs have.
        self.shifts = sorted({isa.decode_field(probe, p, isa.bytes)[1] for p in range(MAX_FIELD)})
        self.chains = chains
        self.count = chains * streams * batch * isa.groups * len(self.shifts)
        self.batch = batch
        self.acc = local(self.count * isa.acc_lanes, isa.acc_dtype)
        self.wide = local(self.count * isa.rows, "int32") if isa.flush_blocks else None

    def _slot(self, stream: int, row: int, group: int, shift: int, chain: int) -> int:
        groups = self.isa.groups
        number = (stream * self.batch + row) * groups + group
        return (number * len(self.shifts) + self.shifts.index(shift)) * self.chains + chain

    def clear(self, wide: bool = False) -> None:
        """Zero the accumulators, or their widened totals."""
        buffer, dtype, lanes = (
            (self.wide, "int32", self.isa.rows)
            if wide
            else (self.acc, self.isa.acc_dtype, self.isa.acc_lanes)
        )
        for i in range(self.count):
            store(buffer, i * lanes, const(0, dtype, lanes), lanes)

    def add(
        self, stream: int, row: int, group: int, shift: int, w: Expr, a: Expr, chain: int = 0
    ) -> None:
        """Accumulate one dot product."""
        lanes = self.isa.acc_lanes
        at = self._slot(stream, row, group, shift, chain) * lanes
        store(self.acc, at, self.isa.ternary_dot(load(self.acc, at, lanes), w, a), lanes)

    def flush(self) -> None:
        """Move narrow accumulators into the int32 totals before they can overflow."""
        lanes, rows = self.isa.acc_lanes, self.isa.rows
        for i in range(self.count):
            moved = self.isa.widen(load(self.acc, i * lanes, lanes))
            store(self.wide, i * rows, load(self.wide, i * rows, rows) + moved, rows)

    def total(self, stream: int, row: int, group: int) -> Expr:
        """int32 sum of code * q for each weight row of one vector."""
        rows, lanes = self.isa.rows, self.isa.acc_lanes
        total = None
        for shift in self.shifts:
            part = None
            for chain in range(self.chains):
                slot = self._slot(stream, row, group, shift, chain)
                one = (
                    load(self.wide, slot * rows, rows)
                    if self.wide is not None
                    else self.isa.widen(load(self.acc, slot * lanes, lanes))
                )
                part = one if part is None else part + one
            if shift:
                part = T.shift_right(part, const(shift, "int32", rows))
            total = part if total is None else total + part
        return total


def gemv(isa: Isa, name: str, grouped: bool = False, coding: str = "i2") -> Any:
    """``void name(w, q, <epilogue>, tiles, M, KB[, G, group_blocks])``.

    ``w``: uint8 tiles ``[tiles][KB][64]`` from the first of ``tiles`` 16-row tiles on, bytes of
    ``CODINGS[coding]``; ``q``: int32 view of int8 activations ``[M, KB * columns of a tile]``. Any
    ``tiles``, ``M`` >= 1.
    """

    def body(w: Buffer, q: Buffer, *rest: Any) -> None:
        out = Epilogue(*rest[: len(PARAMETERS)])
        tiles, M, *sizes = rest[len(PARAMETERS) :]
        decode = _Decode(isa, CODINGS[coding], w, q, out, *sizes)
        streams, batch = isa.gemv.streams, isa.gemv.batch
        with when(M == 1):
            with T.serial(T.floordiv(tiles, streams)) as several:
                decode.block(several * streams, 0, streams, 1)
            if streams > 1:
                with T.serial(T.floormod(tiles, streams)) as single:
                    decode.block(T.floordiv(tiles, streams) * streams + single, 0, 1, 1)
        with when(M > 1), T.serial(tiles) as tile:
            in_powers(M, batch, lambda m, size: decode.block(tile, m, 1, size))

    extra = GROUP_SIZES if grouped else ()
    return kernel(name, [*OPERANDS, *PARAMETERS, *SIZES, *extra], body)


@dataclass(frozen=True)
class _Decode:
    """One kernel's operands; ``block`` emits the code of some tiles and activation rows."""

    isa: Isa
    coding: Coding
    w: Buffer
    q: Buffer
    out: Epilogue
    KB: Expr
    G: Expr = None
    """Groups of a row, None for one scale a row."""
    group_blocks: Expr = None

    def block(self, tile: Expr, m: Expr, streams: int, batch: int) -> None:
        """``streams`` tiles from ``tile`` on times ``batch`` activation rows from ``m`` on."""
        most, chains = self.isa.gemv.batch, self.isa.gemv.chains
        # Chains fill the registers that the missing rows leave.
        chains = chains if batch * chains <= max(most, chains) else 1
        acc = Accumulators(self.isa, streams, batch, chains)
        if self.G is None:
            self._span(acc, tile, m, streams, 0, self.KB)
            self._each(tile, m, streams, batch, lambda r, n, i: self.out.write(
                m + r, n, acc.total(*i), self.isa.rows))  # fmt: skip
        else:
            self._groups(acc, tile, m, streams, batch)

    def _groups(self, acc: Accumulators, tile: Expr, m: Expr, streams: int, batch: int) -> None:
        """Group by group: exact sums, then float32 sums over the groups in order."""
        rows, groups = self.isa.rows, self.isa.groups
        sums = local(streams * batch * groups * rows, "float32")

        def place(index: tuple[int, int, int]) -> int:
            t, r, g = index
            return ((t * batch + r) * groups + g) * rows

        indices = [(t, r, g) for t in range(streams) for r in range(batch) for g in range(groups)]
        for index in indices:
            store(sums, place(index), const(0.0, "float32", rows), rows)
        with T.serial(self.G) as j:
            first = j * self.group_blocks
            self._span(acc, tile, m, streams, first, T.min(self.group_blocks, self.KB - first))
            for index in indices:
                t, r, g = index
                at = ((tile + t) * self.G + j) * TILE_ROWS + g * rows
                part = self.out.group_part(m + r, at, j, self.G, acc.total(*index), rows)
                store(sums, place(index), load(sums, place(index), rows) + part, rows)
        self._each(tile, m, streams, batch, lambda r, n, i: self.out.write_grouped(
            m + r, n, load(sums, place(i), rows), rows))  # fmt: skip

    def _span(
        self, acc: Accumulators, tile: Expr, m: Expr, streams: int, first: Expr, count: Expr
    ) -> None:
        """Accumulate ``count`` tiles' columns from tile ``first`` on, from zero."""
        if self.isa.flush_blocks is None:
            acc.clear()
            self._steps(acc, tile, m, streams, first, count)
            return
        acc.clear(wide=True)
        # In units of the narrowest tile: five fields fill an accumulator faster than four.
        span = self.isa.flush_blocks * MAX_FIELD // self.coding.quads
        with T.serial(T.floordiv(count + (span - 1), span)) as outer:
            acc.clear()
            start = first + outer * span
            self._steps(acc, tile, m, streams, start, T.min(span, count - outer * span))
            acc.flush()

    def _steps(
        self, acc: Accumulators, tile: Expr, m: Expr, streams: int, first: Expr, count: Expr
    ) -> None:
        """Blocks in turn; ``acc.chains`` of them a step, each with accumulators of its own."""
        chains = acc.chains
        with T.serial(T.floordiv(count, chains)) as step:
            for chain in range(chains):
                self._step(acc, tile, m, streams, first + step * chains + chain, chain)
        if chains > 1:
            with T.serial(T.floormod(count, chains)) as rest:
                at = first + T.floordiv(count, chains) * chains + rest
                self._step(acc, tile, m, streams, at, 0)

    def _step(
        self, acc: Accumulators, tile: Expr, m: Expr, streams: int, kb: Expr, chain: int
    ) -> None:
        isa, quads = self.isa, self.coding.quads
        for t in range(streams):
            base = ((tile + t) * self.KB + kb) * TILE
            if isa.gemv.prefetch_bytes:
                prefetch(self.w, base + isa.gemv.prefetch_bytes, isa.gemv.prefetch_locality)
            for g in range(isa.groups):
                v = load(self.w, base + g * isa.bytes, isa.bytes)
                for p, (codes, shift) in enumerate(self.coding.in_place(isa, v)):
                    for r in range(acc.batch):
                        at = (m + r) * (self.KB * quads) + kb * quads
                        a = isa.quad(self.q, at, p, isa.bytes)
                        acc.add(t, r, g, shift, codes, a, chain)

    def _each(
        self, tile: Expr, m: Expr, streams: int, batch: int,
        write: Callable[[int, Expr, tuple[int, int, int]], None],
    ) -> None:  # fmt: skip
        """``write(row, n, (stream, row, group))`` for every vector that has valid weight rows."""
        for t in range(streams):
            for r in range(batch):
                for g in range(self.isa.groups):
                    n = (tile + t) * TILE_ROWS + g * self.isa.rows
                    with when(n < self.out.rows):
                        write(r, n, (t, r, g))
