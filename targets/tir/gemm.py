"""Prefill: ternary matrix times many activation rows, weights unpacked once a panel."""

from __future__ import annotations

from typing import Any

from bitcompile.targets.tir.dsl import (
    Buffer,
    T,
    const,
    kernel,
    load,
    local,
    store,
    when,
)
from bitcompile.targets.tir.epilogue import PARAMETERS, Epilogue
from bitcompile.targets.tir.gemv import OPERANDS, SIZES, broadcast_quad
from bitcompile.targets.tir.isa import MAX_FIELD, TILE, TILE_ROWS, Isa, field_shifted


def gemm(isa: Isa, name: str) -> Any:
    """``void name(w, q, <epilogue>, tiles, M, KB, panel, partial)`` for one panel of weight rows.

    ``w``: uint8 tiles ``[tiles][KB][64]``, ``tiles`` <= the register tile's; ``q``: int32 view of
    int8 activations, ``[M rounded up to the register tile's rows, 16 KB]``; ``panel``: uint8
    workspace of ``panel_bytes(isa)``; ``partial``: int32 workspace of ``partial_values(isa)`` per
    ``gemm.rows`` activation rows.

    Weights are unpacked to one code a byte for ``k_blocks`` columns at a time (the panel stays in
    L1), every block of activation rows runs over that panel, and int32 sums rest in ``partial``
    between panels.
    """
    MR, NB, KC = isa.gemm.rows, isa.gemm.tiles, isa.gemm.k_blocks
    vectors = NB * isa.groups
    quads = TILE // 4 // 4  # 4-column steps of a 16-column block

    def unpack(w: Buffer, panel: Buffer, tiles: Any, KB: Any, first: Any, count: Any) -> None:
        """``panel[k4][tile][group][bytes]``: codes of 4 consecutive columns per weight row."""
        with T.serial(count) as kb:
            for t in range(NB):
                # A missing tile repeats the first one: computed, never stored.
                tile = T.if_then_else(t < tiles, t, 0)
                for g in range(isa.groups):
                    v = load(w, (tile * KB + first + kb) * TILE + g * isa.bytes, isa.bytes)
                    for p in range(MAX_FIELD):
                        at = ((kb * quads + p) * vectors + t * isa.groups + g) * isa.bytes
                        store(panel, at, field_shifted(v, p, isa.bytes)[0], isa.bytes)

    def multiply(q: Buffer, panel: Buffer, acc: Buffer, m: Any, KB: Any, first: Any,
                 count: Any) -> None:  # fmt: skip
        lanes = isa.acc_lanes
        for i in range(MR * vectors):
            store(acc, i * lanes, const(0, isa.acc_dtype, lanes), lanes)
        with T.serial(count * quads) as k4:
            for r in range(MR):
                a = broadcast_quad(q, (m + r) * (KB * quads) + first * quads + k4, isa)
                for v in range(vectors):
                    at = (r * vectors + v) * lanes
                    w = load(panel, (k4 * vectors + v) * isa.bytes, isa.bytes)
                    store(acc, at, isa.ternary_dot(load(acc, at, lanes), w, a), lanes)

    def body(w: Buffer, q: Buffer, *rest: Any) -> None:
        out = Epilogue(*rest[: len(PARAMETERS)])
        tiles, M, KB, panel, partial = rest[len(PARAMETERS) :]
        lanes, rows = isa.acc_lanes, isa.rows
        chunks = T.floordiv(KB + (KC - 1), KC)
        with T.serial(chunks) as chunk:
            first = chunk * KC
            count = T.min(KC, KB - first)
            unpack(w, panel, tiles, KB, first, count)
            with T.serial(T.floordiv(M + (MR - 1), MR)) as mt:
                m = mt * MR
                acc = local(MR * vectors * lanes, isa.acc_dtype)
                multiply(q, panel, acc, m, KB, first, count)
                sums = local(MR * vectors * rows, "int32")
                for i in range(MR * vectors):
                    store(sums, i * rows, isa.widen(load(acc, i * lanes, lanes)), rows)
                rest_at = mt * (MR * vectors * rows)
                with when(chunk > 0):
                    for i in range(MR * vectors):
                        earlier = load(partial, rest_at + i * rows, rows)
                        store(sums, i * rows, load(sums, i * rows, rows) + earlier, rows)
                with when(chunk < chunks - 1):
                    for i in range(MR * vectors):
                        store(partial, rest_at + i * rows, load(sums, i * rows, rows), rows)
                with when(chunk == chunks - 1):
                    for r in range(MR):
                        with when(m + r < M):
                            for v in range(vectors):
                                n = (v // isa.groups) * TILE_ROWS + (v % isa.groups) * rows
                                with when(n < out.rows):
                                    total = load(sums, (r * vectors + v) * rows, rows)
                                    out.write(m + r, n, total, rows)

    return kernel(
        name,
        [*OPERANDS, *PARAMETERS, *SIZES, ("panel", "uint8*"), ("partial", "int32*")],
        body,
    )


def panel_bytes(isa: Isa) -> int:
    """Bytes of the unpacked panel."""
    return isa.gemm.k_blocks * TILE * MAX_FIELD * isa.gemm.tiles


def partial_values(isa: Isa) -> int:
    """int32 values of partial sums per block of ``gemm.rows`` activation rows."""
    return isa.gemm.rows * isa.gemm.tiles * TILE_ROWS
