"""Prefill: ternary matrix times many activation rows, weights unpacked once a panel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    kernel,
    load,
    local,
    store,
    when,
)
from bitcompile.targets.tir.epilogue import GROUP_SIZES, PARAMETERS, Epilogue
from bitcompile.targets.tir.gemv import OPERANDS, SIZES
from bitcompile.targets.tir.isa import MAX_FIELD, TILE, TILE_ROWS, Isa, field_shifted
from bitcompile.targets.tir.tiles import RegisterTile, register_tile


def gemm(isa: Isa, name: str, grouped: bool = False) -> Any:
    """``void name(w, q, <epilogue>, tiles, M, KB[, G, group_blocks], panel, partial)``.

    One panel of weight rows: ``w`` uint8 tiles ``[tiles][KB][64]``, ``tiles`` <= the register
    tile's; ``q``: int32 view of int8 activations, ``[M rounded up to the register tile's rows,
    16 KB]``; ``panel``: uint8 workspace of ``panel_bytes(isa)``; ``partial``: int32 (grouped:
    float32) workspace of ``partial_values(isa)`` per ``gemm.rows`` activation rows.

    Weights are unpacked to one code a byte for ``k_blocks`` columns at a time (the panel stays in
    L1), every block of activation rows runs over that panel, and sums rest in ``partial`` between
    panels. ``group_blocks`` divides ``k_blocks``.
    """

    def body(w: Buffer, q: Buffer, *rest: Any) -> None:
        out = Epilogue(*rest[: len(PARAMETERS)])
        tiles, M, KB, *sizes, panel, partial = rest[len(PARAMETERS) :]
        prefill = _Prefill(isa, w, q, out, panel, partial, KB, *sizes)
        chunks = T.floordiv(KB + (isa.gemm.k_blocks - 1), isa.gemm.k_blocks)
        with T.serial(chunks) as chunk:
            first = chunk * isa.gemm.k_blocks
            count = T.min(isa.gemm.k_blocks, KB - first)
            prefill.unpack(tiles, first, count)
            with T.serial(T.floordiv(M + (isa.gemm.rows - 1), isa.gemm.rows)) as mt:
                prefill.rows(mt, M, first, count, chunk, chunks)

    extra = GROUP_SIZES if grouped else ()
    workspace = (("panel", "uint8*"), ("partial", "float32*" if grouped else "int32*"))
    return kernel(name, [*OPERANDS, *PARAMETERS, *SIZES, *extra, *workspace], body)


@dataclass(frozen=True)
class _Prefill:
    """One kernel's operands; its methods emit the steps of :func:`gemm`."""

    isa: Isa
    w: Buffer
    q: Buffer
    out: Epilogue
    panel: Buffer
    partial: Buffer
    KB: Expr
    G: Expr = None
    """Groups of a row, None for one scale a row."""
    group_blocks: Expr = None

    @property
    def tile(self) -> RegisterTile:
        """Products of the register tile."""
        return register_tile(self.isa, self.panel, self.q, self.KB)

    @property
    def vectors(self) -> int:
        """Weight vectors of the register tile."""
        return self.tile.vectors

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(activation row, weight vector) of the register tile."""
        return [(r, v) for r in range(self.isa.gemm.rows) for v in range(self.vectors)]

    def unpack(self, tiles: Expr, first: Expr, count: Expr) -> None:
        """One code a byte, in the order the register tile reads."""
        isa = self.isa
        with T.serial(count) as kb:
            for t in range(isa.gemm.tiles):
                # A missing tile repeats the first one: computed, never stored.
                tile = T.if_then_else(t < tiles, t, 0)
                for g in range(isa.groups):
                    base = (tile * self.KB + first + kb) * TILE + g * isa.bytes
                    v = load(self.w, base, isa.bytes)
                    codes = [field_shifted(v, p, isa.bytes)[0] for p in range(MAX_FIELD)]
                    self.tile.unpack(kb, t * isa.groups + g, codes)

    def rows(self, mt: Expr, M: Expr, first: Expr, count: Expr, chunk: Expr, chunks: Expr) -> None:
        """One register tile over one panel: continue its sums, then keep or write them."""
        lanes, m = self.isa.rows, mt * self.isa.gemm.rows
        at = mt * (len(self.cells) * lanes)
        sums = local(len(self.cells) * lanes, "int32" if self.G is None else "float32")
        if self.G is None:
            # The earlier sums are read after the products: registers hold one tile, not two.
            acc = self.tile.multiply(m, first, 0, count)
            for i in range(len(self.cells)):
                store(sums, i * lanes, self.tile.total(acc, *self.cells[i]), lanes)
            self._add_earlier(sums, at, chunk)
        else:
            for i in range(len(self.cells)):
                store(sums, i * lanes, const(0.0, "float32", lanes), lanes)
            self._add_earlier(sums, at, chunk)
            self._add_groups(sums, m, first, count)
        with when(chunk < chunks - 1):
            for i in range(len(self.cells)):
                store(self.partial, at + i * lanes, load(sums, i * lanes, lanes), lanes)
        with when(chunk == chunks - 1):
            write = self.out.write if self.G is None else self.out.write_grouped
            for r in range(self.isa.gemm.rows):
                with when(m + r < M):
                    for v in range(self.vectors):
                        n = self._first_row(v)
                        with when(n < self.out.rows):
                            at_cell = (r * self.vectors + v) * lanes
                            write(m + r, n, load(sums, at_cell, lanes), lanes)

    def _first_row(self, v: int) -> int:
        """Weight row of the first lane of vector ``v``."""
        return (v // self.isa.groups) * TILE_ROWS + (v % self.isa.groups) * self.isa.rows

    def _add_earlier(self, sums: Buffer, at: Expr, chunk: Expr) -> None:
        lanes = self.isa.rows
        with when(chunk > 0):
            for i in range(0, len(self.cells) * lanes, lanes):
                earlier = load(self.partial, at + i, lanes)
                store(sums, i, load(sums, i, lanes) + earlier, lanes)

    def _add_groups(self, sums: Buffer, m: Expr, first: Expr, count: Expr) -> None:
        """Continue float32 sums group by group, in order."""
        size, lanes = self.group_blocks, self.isa.rows
        with T.serial(T.floordiv(count + (size - 1), size)) as inner:
            j = T.floordiv(first, size) + inner
            acc = self.tile.multiply(m, first, inner * size, T.min(size, count - inner * size))
            for i, (r, v) in enumerate(self.cells):
                tile, lane = divmod(self._first_row(v), TILE_ROWS)
                # A missing tile has no scales to read: it takes the first one's.
                held = T.if_then_else(tile * TILE_ROWS < self.out.rows, tile, 0)
                at = (held * self.G + j) * TILE_ROWS + lane
                part = self.out.group_part(m + r, at, j, self.G, self.tile.total(acc, r, v), lanes)
                store(sums, i * lanes, load(sums, i * lanes, lanes) + part, lanes)


def panel_bytes(isa: Isa) -> int:
    """Bytes of the unpacked panel."""
    return isa.gemm.k_blocks * TILE * MAX_FIELD * isa.gemm.tiles


def partial_values(isa: Isa) -> int:
    """int32 values of partial sums per block of ``gemm.rows`` activation rows."""
    return isa.gemm.rows * isa.gemm.tiles * TILE_ROWS
