"""Ternary matrix products from the CPU's weight tiles, for any :class:`Schedule`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitcompile.targets.tir.dsl import Buffer, Expr, T, const, load, local, store, when
from bitcompile.targets.tir.opencl.device import barrier, call, device_kernel, divide, kept, shared
from bitcompile.targets.tir.opencl.schedule import TILE_ROWS, Schedule

FIELDS = 4
"""Codes of a byte, and words of 4 activations in a 16-column block."""
FIELD_MASK = 0x03030303
PARAMETERS = [
    ("w", "uint32*"),  # [tiles, KB, 16]: word r of a tile is 16 columns of row r
    ("q", "uint32*"),  # int8 [M, 16 KB]
    ("qsum", "int32*"),  # [M], or [M, G]
    ("s", "float32*"),  # [M]
    ("w_scale", "float32*"),  # [N], or [tiles, G, 16]
    ("bias", "float32*"),  # [N], read if has_bias
    ("residual", "float32*"),  # [M, N] from residual_at on, read if has_residual
    ("y", "float32*"),  # [M, N]
    *((n, "int32") for n in ("N", "M", "KB", "residual_at", "has_bias", "has_residual")),
]
GROUPED = [("G", "int32"), ("group_blocks", "int32")]


def matmul(name: str, schedule: Schedule, grouped: bool = False) -> Any:
    """``void name(<PARAMETERS>[, G, group_blocks])``.

    Work-group ``(i, j)``: ``schedule.tiles`` weight tiles and ``schedule.activation_rows`` rows.
    """
    cut = schedule.sequential() if grouped else schedule

    def body(group: Any, item: Any, *operands: Any) -> None:
        product = _Product(cut, group, item, *operands)
        product.grouped() if grouped else product.whole()

    return device_kernel(name, PARAMETERS + (GROUPED if grouped else []), cut.size, body)


@dataclass(frozen=True)
class _Product:
    """One kernel's operands; its methods emit the code of a work-item."""

    cut: Schedule
    group: tuple[Expr, Expr]
    item: tuple[Expr, Expr]
    w: Buffer
    q: Buffer
    qsum: Buffer
    s: Buffer
    w_scale: Buffer
    bias: Buffer
    residual: Buffer
    y: Buffer
    N: Expr
    M: Expr
    KB: Expr
    residual_at: Expr
    has_bias: Expr
    has_residual: Expr
    G: Expr = None
    group_blocks: Expr = None

    @property
    def _cells(self) -> list[tuple[int, int]]:
        """(activation row, weight row) of a work-item."""
        return [(r, n) for r in range(self.cut.batch) for n in range(self.cut.rows)]

    @property
    def _tile(self) -> Expr:
        lanes = TILE_ROWS // self.cut.rows
        return self.group[0] * self.cut.tiles + T.floordiv(self.item[0], lanes)

    @property
    def _row(self) -> Expr:
        """First weight row of the work-item in its tile."""
        return T.floormod(self.item[0], TILE_ROWS // self.cut.rows) * self.cut.rows

    @property
    def _m(self) -> Expr:
        """First activation row of the work-item."""
        block = self.item[1] * self.cut.batch if self.cut.blocks > 1 else 0
        return self.group[1] * self.cut.activation_rows + block

    @property
    def _slice(self) -> Expr:
        return self.item[1] if self.cut.slices > 1 else T.int32(0)

    def _inside(self, m: Expr) -> Expr:
        """Activation rows past the last one repeat it: computed, never stored."""
        return T.min(m, self.M - 1)

    def whole(self) -> None:
        """One scale a row: sums of all of K, then the outputs."""
        acc = self._cleared("int32")
        if self.cut.stage:
            self._staged(acc)
        else:
            self._span(acc, 0, self.KB, self.q, self._direct)
        if self.cut.slices > 1:
            self._join_slices(acc)
        with when(self._slice == 0):
            self._each(lambda i, m, n: self._rescaled(m, n, acc[i]))

    def grouped(self) -> None:
        """Group by group: exact sums, then float32 sums over the groups in order."""
        sums = self._cleared("float32")
        with T.serial(self.G) as j:
            first = j * self.group_blocks
            acc = self._cleared("int32")
            count = T.min(self.group_blocks, self.KB - first)
            self._span(acc, first, count, self.q, self._direct)
            for i, (r, n) in enumerate(self._cells):
                at = (self._clamped_tile * self.G + j) * TILE_ROWS + self._row + n
                exact = acc[i] - self.qsum[self._inside(self._m + r) * self.G + j]
                part = kept(self.w_scale[at] * T.cast(exact, "float32"))
                T.buffer_store(sums, sums[i] + part, [i])
        one = const(1.0, "float32", 1)
        self._each(lambda i, m, n: sums[i] * kept(divide(one, self.s[m])))

    @property
    def _clamped_tile(self) -> Expr:
        """Tiles past the last one repeat it."""
        return T.min(self._tile, T.floordiv(self.N - 1, TILE_ROWS))

    def _cleared(self, dtype: str) -> Buffer:
        buffer = local(len(self._cells), dtype)
        for i in range(len(self._cells)):
            T.buffer_store(buffer, const(0, dtype, 1), [i])
        return buffer

    def _direct(self, r: int, kb: Expr) -> Expr:
        """Where row r's activations of block ``kb`` begin in ``q``."""
        return (self._inside(self._m + r) * self.KB + kb) * FIELDS

    def _span(self, acc: Buffer, first: Expr, count: Expr, source: Buffer, place: Any) -> None:
        """Accumulate this slice's share of ``count`` 16-column blocks from ``first`` on."""
        cut = self.cut
        words, quads = local(cut.rows, "uint32"), local(cut.batch * FIELDS, "uint32")
        codes = local(cut.rows, "uint32")
        share = T.floordiv(count - self._slice + (cut.slices - 1), cut.slices)
        with T.serial(share) as step:
            kb = first + self._slice + step * cut.slices
            at = (self._clamped_tile * self.KB + kb) * TILE_ROWS + self._row
            store(words, 0, load(self.w, at, cut.rows), cut.rows)
            for r in range(cut.batch):
                store(quads, r * FIELDS, load(source, place(r, kb), FIELDS), FIELDS)
            for p in range(FIELDS):
                for n in range(cut.rows):
                    moved = T.shift_right(words[n], T.uint32(2 * p)) if p else words[n]
                    T.buffer_store(codes, T.bitwise_and(moved, T.uint32(FIELD_MASK)), [n])
                for i, (r, n) in enumerate(self._cells):
                    dot = call("int32", "bc_dot4_code", codes[n], quads[r * FIELDS + p], acc[i])
                    T.buffer_store(acc, dot, [i])

    def _staged(self, acc: Buffer) -> None:
        """All of K, with the work-group's activations in local memory a chunk at a time."""
        cut = self.cut
        chunk_words = cut.stage * FIELDS
        staged = shared(cut.activation_rows * chunk_words, "uint32")
        items, item = cut.size[0] * cut.size[1], self.item[1] * cut.size[0] + self.item[0]
        block = self.item[1] * cut.batch if cut.blocks > 1 else 0
        with T.serial(T.floordiv(self.KB + (cut.stage - 1), cut.stage)) as chunk:
            first = chunk * cut.stage
            words = T.min(cut.stage, self.KB - first) * FIELDS
            barrier()
            for r in range(cut.activation_rows):
                m = self._inside(self.group[1] * cut.activation_rows + r)
                with T.serial(T.floordiv(words - item + (items - 1), items)) as i:
                    word = self.q[(m * self.KB + first) * FIELDS + item + i * items]
                    T.buffer_store(staged, word, [r * chunk_words + item + i * items])
            barrier()
            self._span(acc, first, T.min(cut.stage, self.KB - first), staged,
                       lambda r, kb: (block + r) * chunk_words + (kb - first) * FIELDS)  # fmt: skip

    def _join_slices(self, acc: Buffer) -> None:
        """Slice 0 gets the sums of all, by halving; the others get what nobody reads."""
        lanes, cells = self.cut.lanes, len(self._cells)
        parts = shared(self.cut.slices * lanes * cells, "int32")
        mine = (self._slice * lanes + self.item[0]) * cells
        for i in range(cells):
            T.buffer_store(parts, acc[i], [mine + i])
        half = self.cut.slices // 2
        barrier()
        while half:
            with when(self._slice < half):
                for i in range(cells):
                    other = parts[mine + half * lanes * cells + i]
                    T.buffer_store(parts, parts[mine + i] + other, [mine + i])
            barrier()
            half //= 2
        for i in range(cells):
            T.buffer_store(acc, parts[mine + i], [i])

    def _rescaled(self, m: Expr, n: Expr, acc: Expr) -> Expr:
        scale = kept(divide(self.w_scale[n], self.s[m]))
        return T.cast(acc - self.qsum[m], "float32") * scale

    def _each(self, value: Any) -> None:
        """Store ``value(cell, m, n)`` for the valid cells, with bias and residual."""
        for i, (r, lane) in enumerate(self._cells):
            m, n = self._m + r, self._tile * TILE_ROWS + self._row + lane
            with when(T.And(m < self.M, n < self.N)):
                out = local(1, "float32")
                T.buffer_store(out, value(i, m, n), [0])
                at = m * self.N + n
                with when(self.has_bias != 0):
                    T.buffer_store(out, out[0] + self.bias[n], [0])
                with when(self.has_residual != 0):
                    T.buffer_store(out, out[0] + self.residual[self.residual_at + at], [0])
                T.buffer_store(self.y, out[0], [at])
