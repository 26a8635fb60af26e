"""From int32 sums to outputs: zero point, rescaling, bias, residual, and row tails."""

from __future__ import annotations

from dataclasses import dataclass

from bitcompile.targets.tir.dsl import (
    Buffer,
    Expr,
    T,
    exact,
    load,
    local,
    splat,
    store,
    when,
)

PARAMETERS = (
    ("qsum", "int32*"),  # [M] sum of each quantised row
    ("s", "float32*"),  # [M] its quantisation scale
    ("w_scale", "float32*"),  # [N]
    ("bias", "float32*"),  # [N], read if has_bias
    ("residual", "float32*"),  # [M, ldy], read if has_residual
    ("y", "float32*"),  # [M, ldy]
    ("rows", "int32"),  # valid weight rows from here on: tails end inside a tile
    ("ldy", "int32"),
    ("has_bias", "int32"),
    ("has_residual", "int32"),
)


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
        """``y[m, n : n + lanes]`` from ``acc`` (sum of code * q), stopping at ``rows``.

        The full case is vector code; a tail goes through a stack copy, lane by lane, with the same
        roundings.
        """
        total = local(lanes, "int32")
        store(total, 0, acc - splat(self.qsum[m], lanes), lanes)
        with when(n + lanes <= self.rows):
            self._finish(m, n, load(total, 0, lanes), lanes)
        with when(n + lanes > self.rows):
            tail = local(lanes, "int32")
            store(tail, 0, load(total, 0, lanes), lanes)
            with T.serial(self.rows - n) as i:
                self._finish(m, n + i, tail[i], 1)

    def _finish(self, m: Expr, n: Expr, acc: Expr, lanes: int) -> None:
        dtype = f"float32x{lanes}" if lanes > 1 else "float32"
        scale = load(self.w_scale, n, lanes) / splat(self.s[m], lanes)
        out = local(lanes, "float32")
        store(out, 0, exact(T.cast(acc, dtype) * scale, lanes), lanes)
        at = m * self.ldy + n
        with when(self.has_bias != 0):
            store(out, 0, load(out, 0, lanes) + load(self.bias, n, lanes), lanes)
        with when(self.has_residual != 0):
            store(out, 0, load(out, 0, lanes) + load(self.residual, at, lanes), lanes)
        store(self.y, at, load(out, 0, lanes), lanes)
