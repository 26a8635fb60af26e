"""From int32 sums to outputs: zero point, rescaling, bias, residual, and row tails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    const,
    exact,
    load,
    local,
    splat,
    store,
    typed,
    when,
)

Scaled = Callable[[Expr, Expr, Expr, int], Expr]
"""``(m, n, sums, lanes)`` to outputs without bias and residual."""

PARAMETERS = (
    ("qsum", "int32*"),  # [M] or [M, G]: sum of each quantised row (and group)
    ("s", "float32*"),  # [M] its quantisation scale
    ("w_scale", "float32*"),  # [N], or [tiles, G, 16]
    ("bias", "float32*"),  # [N], read if has_bias
    ("residual", "float32*"),  # [M, ldy], read if has_residual
    ("y", "float32*"),  # [M, ldy]
    ("rows", "int32"),  # valid weight rows from here on: tails end inside a tile
    ("ldy", "int32"),
    ("has_bias", "int32"),
    ("has_residual", "int32"),
)


GROUP_SIZES = (("G", "int32"), ("group_blocks", "int32"))
"""Further parameters of kernels for group-scaled weights: groups, 16-column blocks of a group."""


@dataclass(frozen=True)
class Epilogue:
    """The parameters above, in order; writes outputs of one activation row."""

    qsum: Buffer
    s: Buffer
    w_scale: Buffer
    bias: Buffer
    residual: Buffer
    y: Buffer
    rows: Expr
    ldy: Expr
    has_bias: Expr
    has_residual: Expr

    def write(self, m: Expr, n: Expr, acc: Expr, lanes: int) -> None:
        """``y[m, n : n + lanes]`` from ``acc``, int32 sums of code * q."""
        self._store(m, n, acc - splat(self.qsum[m], lanes), lanes, self._rescaled)

    def write_uniform(self, m: Expr, n: Expr, acc: Expr, scale: Expr, lanes: int) -> None:
        """:meth:`write` of whole vectors whose rows share ``scale``, a float32 of ``rescaling``."""
        whole = T.cast(acc - splat(self.qsum[m], lanes), typed("float32", lanes))
        self._finish(m, n, whole * splat(scale, lanes), lanes)

    def rescaling(self, m: Expr) -> Expr:
        """``fl(w_scale / s)`` of weight row 0: one division instead of one a vector."""
        return exact(self.w_scale[0] / self.s[m], 1)

    def uniform(self, count: int, lanes: int) -> Expr:
        """1 if weight rows 0 to ``count`` all exist and have one scale, else 0."""
        found = local(1, "int32")
        store(found, 0, T.int32(0), 1)
        with when(self.rows >= count):
            first = splat(T.reinterpret(self.w_scale[0], dtype="int32"), lanes)
            differs = local(lanes, "int32")
            store(differs, 0, const(0, "int32", lanes), lanes)
            for n in range(0, count, lanes):
                bits = T.reinterpret(load(self.w_scale, n, lanes), dtype=typed("int32", lanes))
                change = T.bitwise_xor(bits, first)
                store(differs, 0, T.bitwise_or(load(differs, 0, lanes), change), lanes)
            total = local(1, "int32")
            store(total, 0, T.int32(0), 1)
            for i in range(lanes):
                store(total, 0, T.bitwise_or(total[0], differs[i]), 1)
            with when(total[0] == 0):
                store(found, 0, T.int32(1), 1)
        return found[0]

    def write_grouped(self, m: Expr, n: Expr, total: Expr, lanes: int) -> None:
        """``y[m, n : n + lanes]`` from the float32 sums of the groups."""
        self._store(m, n, total, lanes, self._unscaled)

    def group_part(self, m: Expr, at: Expr, j: Expr, G: Expr, acc: Expr, lanes: int) -> Expr:
        """What group j adds: its int32 sums of code * q times the scales at ``at``."""
        whole = T.cast(acc - splat(self.qsum[m * G + j], lanes), typed("float32", lanes))
        return exact(load(self.w_scale, at, lanes) * whole, lanes)

    def _rescaled(self, m: Expr, n: Expr, acc: Expr, lanes: int) -> Expr:
        scale = load(self.w_scale, n, lanes) / splat(self.s[m], lanes)
        return T.cast(acc, typed("float32", lanes)) * scale

    def _unscaled(self, m: Expr, n: Expr, total: Expr, lanes: int) -> Expr:
        return total * splat(exact(const(1.0, "float32", 1) / self.s[m], 1), lanes)

    def _store(self, m: Expr, n: Expr, value: Expr, lanes: int, scaled: Scaled) -> None:
        """Finish and store ``lanes`` outputs, stopping at ``rows``.

        The full case is vector code; a tail goes through a stack copy, lane by lane, with the same
        roundings.
        """
        dtype = "int32" if scaled == self._rescaled else "float32"
        held = local(lanes, dtype)
        store(held, 0, value, lanes)
        with when(n + lanes <= self.rows):
            self._finish(m, n, scaled(m, n, load(held, 0, lanes), lanes), lanes)
        with when(n + lanes > self.rows):
            tail = local(lanes, dtype)
            store(tail, 0, load(held, 0, lanes), lanes)
            with T.serial(self.rows - n) as i:
                self._finish(m, n + i, scaled(m, n + i, tail[i], 1), 1)

    def _finish(self, m: Expr, n: Expr, value: Expr, lanes: int) -> None:
        out = local(lanes, "float32")
        store(out, 0, exact(value, lanes), lanes)
        at = m * self.ldy + n
        with when(self.has_bias != 0):
            store(out, 0, load(out, 0, lanes) + load(self.bias, n, lanes), lanes)
        with when(self.has_residual != 0):
            store(out, 0, load(out, 0, lanes) + load(self.residual, at, lanes), lanes)
        store(self.y, at, load(out, 0, lanes), lanes)
