"""Prefill: ternary matrix times many activation rows, weights unpacked once a panel."""

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
    kernel,
    load,
    local,
    store,
    when,
)
from bitcompile.targets.tir.epilogue import GROUP_SIZES, PARAMETERS, Epilogue
from bitcompile.targets.tir.gemv import OPERANDS, SIZES
from bitcompile.targets.tir.isa import MAX_FIELD, TILE, TILE_ROWS, Isa
from bitcompile.targets.tir.tiles import RegisterTile, register_tile


def gemm(isa: Isa, name: str, grouped: bool = False, coding: str = "i2") -> Any:
    """``void name(w, q, <epilogue>, tiles, M, KB[, G, group_blocks], panel, partial)``.

    One panel of weight rows: ``w`` uint8 tiles ``[tiles][KB][64]`` of ``CODINGS[coding]``,
    ``tiles`` <= the register tile's; ``q``: int32 view of int8 activations, ``[M rounded up to the
    register tile's rows, KB * columns of a tile]``; ``panel``: uint8 workspace of
    ``panel_bytes(isa)``; ``partial``: int32 (grouped: float32) workspace of ``partial_values(isa)``
    per ``gemm.rows`` activation rows.

    Weights are unpacked to one code a byte for ``k_blocks`` columns at a time (the panel stays in
    L1), every block of activation rows runs over that panel, and sums rest in ``partial`` between
    panels. ``group_blocks`` divides ``k_blocks``.
    """

    def body(w: Buffer, q: Buffer, *rest: Any) -> None:
        out = Epilogue(*rest[: len(PARAMETERS)])
        tiles, M, KB, *sizes, panel, partial = rest[len(PARAMETERS) :]
        prefill = _Prefill(isa, CODINGS[coding], w, q, out, panel, partial, KB, *sizes)
        blocks = prefill.k_blocks
        chunks = T.floordiv(KB + (blocks - 1), blocks)
        uniform = out.uniform(isa.gemm.tiles * TILE_ROWS, isa.rows) if not grouped else None
        blocks_of_rows = T.floordiv(M + (isa.gemm.rows - 1), isa.gemm.rows)
        with T.serial(chunks) as chunk:
            first = chunk * blocks
            count = T.min(blocks, KB - first)
            prefill.unpack(tiles, first, count)
            # A loop each: what the last chunk writes would burden the loop of the others.
            with when(chunk < chunks - 1), T.serial(blocks_of_rows) as mt:
                prefill.keep(mt, prefill.sums(mt, first, count, chunk))
            with when(chunk == chunks - 1), T.serial(blocks_of_rows) as mt:
                prefill.write(mt, M, prefill.sums(mt, first, count, chunk), uniform)

    extra = GROUP_SIZES if grouped else ()
    workspace = (("panel", "uint8*"), ("partial", "float32*" if grouped else "int32*"))
    return kernel(name, [*OPERANDS, *PARAMETERS, *SIZES, *extra, *workspace], body)


@dataclass(frozen=True)
class _Prefill:
    """One kernel's operands; its methods emit the steps of :func:`gemm`."""

    isa: Isa
    coding: Coding
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
    def k_blocks(self) -> int:
        """Tiles along K of a panel: as many columns as fit one of 16-column tiles."""
        return self.isa.gemm.k_blocks * MAX_FIELD // self.coding.quads

    @property
    def tile(self) -> RegisterTile:
        """Products of the register tile."""
        return register_tile(self.isa, self.coding.quads, self.panel, self.q, self.KB)

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
                    self.tile.unpack(kb, t * isa.groups + g, self.coding.plain(isa, v))

    def sums(self, mt: Expr, first: Expr, count: Expr, chunk: Expr) -> Buffer:
        """One register tile over one panel, with its earlier sums."""
        lanes, m = self.isa.rows, mt * self.isa.gemm.rows
        sums = local(len(self.cells) * lanes, "int32" if self.G is None else "float32")
        if self.G is None:
            # The earlier sums are read after the products: registers hold one tile, not two.
            acc = self.tile.multiply(m, first, 0, count)
            for i in range(len(self.cells)):
                store(sums, i * lanes, self.tile.total(acc, *self.cells[i]), lanes)
            self._add_earlier(sums, mt, chunk)
        else:
            for i in range(len(self.cells)):
                store(sums, i * lanes, const(0.0, "float32", lanes), lanes)
            self._add_earlier(sums, mt, chunk)
            self._add_groups(sums, m, first, count)
        return sums

    def keep(self, mt: Expr, sums: Buffer) -> None:
        """Leave sums to the next panel."""
        at, lanes = self._kept(mt), self.isa.rows
        for i in range(len(self.cells)):
            store(self.partial, at + i * lanes, load(sums, i * lanes, lanes), lanes)

    def write(self, mt: Expr, M: Expr, sums: Buffer, uniform: Expr) -> None:
        """The outputs of whole sums."""
        m = mt * self.isa.gemm.rows
        if self.G is not None:
            self._write(m, M, sums, self.out.write_grouped)
            return
        with when(uniform == 0):
            self._write(m, M, sums, self.out.write)
        with when(uniform != 0):
            self._write_uniform(m, M, sums)

    def _write(self, m: Expr, M: Expr, sums: Buffer, write: Callable[..., None]) -> None:
        """The outputs of every row and vector that exist."""
        lanes = self.isa.rows
        for r in range(self.isa.gemm.rows):
            with when(m + r < M):
                for v in range(self.vectors):
                    n = self._first_row(v)
                    with when(n < self.out.rows):
                        at = (r * self.vectors + v) * lanes
                        write(m + r, n, load(sums, at, lanes), lanes)

    def _write_uniform(self, m: Expr, M: Expr, sums: Buffer) -> None:
        """The same where all weight rows exist and share a scale: most panels of most models."""
        lanes = self.isa.rows
        for r in range(self.isa.gemm.rows):
            with when(m + r < M):
                scale = local(1, "float32")
                store(scale, 0, self.out.rescaling(m + r), 1)
                for v in range(self.vectors):
                    acc = load(sums, (r * self.vectors + v) * lanes, lanes)
                    self.out.write_uniform(m + r, self._first_row(v), acc, scale[0], lanes)

    def _first_row(self, v: int) -> int:
        """Weight row of the first lane of vector ``v``."""
        return (v // self.isa.groups) * TILE_ROWS + (v % self.isa.groups) * self.isa.rows

    def _kept(self, mt: Expr) -> Expr:
        return mt * (len(self.cells) * self.isa.rows)

    def _add_earlier(self, sums: Buffer, mt: Expr, chunk: Expr) -> None:
        at, lanes = self._kept(mt), self.isa.rows
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
