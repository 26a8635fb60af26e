"""Decode: ternary matrix times few activation rows, each weight byte read once from memory."""

from __future__ import annotations

from typing import Any

from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    kernel,
    load,
    local,
    prefetch,
    store,
    when,
)
from bitcompile.targets.tir.epilogue import PARAMETERS, Epilogue
from bitcompile.targets.tir.isa import MAX_FIELD, TILE, TILE_ROWS, Isa

OPERANDS = (("w", "uint8*"), ("q", "int32*"))
SIZES = (("tiles", "int32"), ("M", "int32"), ("KB", "int32"))
"""16-row weight tiles, activation rows, 16-column blocks."""


def broadcast_quad(q: Buffer, index: Expr, isa: Isa) -> Expr:
    """Four consecutive int8 activations (one int32 at ``index``) beside every weight row."""
    return T.reinterpret(T.broadcast(q[index], isa.rows), dtype=f"int8x{isa.bytes}")


class Accumulators:
    """Register accumulators of a block: by stream, activation row, vector of the tile, and shift.

    Fields decoded in place carry a factor ``2**shift``; each shift has its own accumulator and is
    divided out once at the end.
    """

    def __init__(self, isa: Isa, streams: int, batch: int) -> None:
        self.isa = isa
        probe = const(0, "uint8", isa.bytes)
        self.shifts = sorted({isa.decode_field(probe, p, isa.bytes)[1] for p in range(MAX_FIELD)})
        self.count = streams * batch * isa.groups * len(self.shifts)
        self.batch = batch
        self.acc = local(self.count * isa.acc_lanes, isa.acc_dtype)
        self.wide = local(self.count * isa.rows, "int32") if isa.flush_blocks else None

    def _slot(self, stream: int, row: int, group: int, shift: int) -> int:
        groups = self.isa.groups
        number = (stream * self.batch + row) * groups + group
        return number * len(self.shifts) + self.shifts.index(shift)

    def clear(self, wide: bool = False) -> None:
        """Zero the accumulators, or their widened totals."""
        buffer, dtype, lanes = (
            (self.wide, "int32", self.isa.rows)
            if wide
            else (self.acc, self.isa.acc_dtype, self.isa.acc_lanes)
        )
        for i in range(self.count):
            store(buffer, i * lanes, const(0, dtype, lanes), lanes)

    def add(self, stream: int, row: int, group: int, shift: int, w: Expr, a: Expr) -> None:
        """Accumulate one dot product."""
        lanes = self.isa.acc_lanes
        at = self._slot(stream, row, group, shift) * lanes
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
            slot = self._slot(stream, row, group, shift)
            part = (
                load(self.wide, slot * rows, rows)
                if self.wide is not None
                else self.isa.widen(load(self.acc, slot * lanes, lanes))
            )
            if shift:
                part = T.shift_right(part, const(shift, "int32", rows))
            total = part if total is None else total + part
        return total


def gemv(isa: Isa, name: str) -> Any:
    """``void name(w, q, <epilogue>, tiles, M, KB)``.

    ``w``: uint8 tiles ``[tiles][KB][64]`` from the first of ``tiles`` 16-row tiles on; ``q``: int32
    view of int8 activations ``[M, 16 KB]``. Any ``tiles``, ``M`` >= 1.
    """
    streams = isa.gemv.streams

    def block(w: Buffer, q: Buffer, out: Epilogue, tile: Expr, m: Expr, KB: Expr,
              streams: int, batch: int) -> None:  # fmt: skip
        acc = Accumulators(isa, streams, batch)

        def step(kb: Expr) -> None:
            for t in range(streams):
                base = ((tile + t) * KB + kb) * TILE
                if isa.gemv.prefetch_bytes:
                    prefetch(w, base + isa.gemv.prefetch_bytes, isa.gemv.prefetch_locality)
                for g in range(isa.groups):
                    v = load(w, base + g * isa.bytes, isa.bytes)
                    for p in range(MAX_FIELD):
                        codes, shift = isa.decode_field(v, p, isa.bytes)
                        for r in range(batch):
                            a = broadcast_quad(q, (m + r) * (KB * 4) + kb * 4 + p, isa)
                            acc.add(t, r, g, shift, codes, a)

        if isa.flush_blocks is None:
            acc.clear()
            with T.serial(KB) as kb:
                step(kb)
        else:
            acc.clear(wide=True)
            span = isa.flush_blocks
            with T.serial(T.floordiv(KB + (span - 1), span)) as outer:
                acc.clear()
                with T.serial(T.min(span, KB - outer * span)) as inner:
                    step(outer * span + inner)
                acc.flush()
        for t in range(streams):
            for r in range(batch):
                for g in range(isa.groups):
                    n = (tile + t) * TILE_ROWS + g * isa.rows
                    with when(n < out.rows):
                        out.write(m + r, n, acc.total(t, r, g), isa.rows)

    def body(w: Buffer, q: Buffer, *rest: Any) -> None:
        out = Epilogue(*rest[: len(PARAMETERS)])
        tiles, M, KB = rest[len(PARAMETERS) :]
        batch = isa.gemv.batch
        with when(M == 1):
            if streams > 1:
                with T.serial(T.floordiv(tiles, streams)) as pair:
                    block(w, q, out, pair * streams, 0, KB, streams, 1)
                with T.serial(T.floormod(tiles, streams)) as rest_tile:
                    first = T.floordiv(tiles, streams) * streams
                    block(w, q, out, first + rest_tile, 0, KB, 1, 1)
            else:
                with T.serial(tiles) as tile:
                    block(w, q, out, tile, 0, KB, 1, 1)
        with when(M > 1), T.serial(tiles) as tile:
            with T.serial(T.floordiv(M, batch)) as rows:
                block(w, q, out, tile, rows * batch, KB, 1, batch)
            with T.serial(T.floormod(M, batch)) as row:
                block(w, q, out, tile, T.floordiv(M, batch) * batch + row, KB, 1, 1)

    return kernel(
        name,
        [*OPERANDS, *PARAMETERS, *SIZES],
        body,
    )
