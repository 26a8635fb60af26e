"""What an instruction set gives a ternary kernel: vector width and dot products.

The generators in this folder are written once against :class:`Isa`; a new instruction set is one
value of it. All arithmetic here is exact, so every variant yields the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitcompile.targets.tir.dsl import Buffer, Expr, T, const, typed

TILE = 64
"""Bytes of a weight tile of the CPU layout: 16 rows x 16 columns."""
TILE_ROWS = 16
MAX_FIELD = 4
"""Fields (2-bit codes) in a byte."""

Dot = Callable[[Expr, Expr, Expr], Expr]

Quad = Callable[[Buffer, Expr, int, int], Expr]
"""``(q, index, p, lanes)``: the four int8 activations that int32 ``index + p`` of q holds, repeated
to fill ``lanes`` bytes."""


def broadcast_quad(q: Buffer, index: Expr, p: int, lanes: int) -> Expr:
    """Four consecutive int8 activations beside every weight row, by a broadcasting load."""
    return T.reinterpret(T.broadcast(q[index + p], lanes // 4), dtype=f"int8x{lanes}")


def shifted_bytes(v: Expr, bits: int, lanes: int) -> Expr:
    """``v >> bits`` with bits crossing from the byte above: the caller masks them away."""
    words = T.reinterpret(v, dtype=typed("uint16", lanes // 2))
    moved = T.shift_right(words, const(bits, "uint16", lanes // 2))
    return T.reinterpret(moved, dtype=typed("uint8", lanes))


def field_in_place(v: Expr, p: int, lanes: int) -> tuple[Expr, int]:
    """Bit pair ``p`` decoded by AND alone: ``(code * 4**p, 2 p)``."""
    return T.bitwise_and(v, const(3 << 2 * p, "uint8", lanes)), 2 * p


def field_shifted(v: Expr, p: int, lanes: int) -> tuple[Expr, int]:
    """Bit pair ``p`` moved down: ``(code, 0)``."""
    moved = shifted_bytes(v, 2 * p, lanes) if p else v
    return T.bitwise_and(moved, const(3, "uint8", lanes)), 0


@dataclass(frozen=True)
class Gemv:
    """Parameters of the decode schedule."""

    streams: int = 1
    """16-row tiles walked at once for one activation row."""
    chains: int = 1
    """Tiles along K a step, each with accumulators of its own: hides the latency of a product."""
    batch: int = 4
    """Activation rows that share one read of a tile when there are several: a power of two, then
    smaller ones."""
    prefetch_bytes: int = 16384
    prefetch_locality: int = 2
    """LLVM's number: 3 into every cache, 2 into L2 and L3, 0 past both: what is read once need not
    be moved from one to the next."""


@dataclass(frozen=True)
class Gemm:
    """Parameters of the prefill schedule: the register tile and the K block."""

    rows: int
    """Activation rows of the register tile."""
    tiles: int
    """16-row weight tiles of the register tile."""
    k_blocks: int
    """16-column blocks of a panel, unpacked once for many activation rows."""
    quads: int = 1
    """4-column steps of the innermost loop's body."""


@dataclass(frozen=True)
class Head:
    """Parameters of the head's schedule: the register tile."""

    rows: int = 2
    """Activation rows: a power of two, then smaller ones."""
    table_rows: int = 1


@dataclass(frozen=True)
class Isa:
    """One kernel variant of a CPU plugin."""

    name: str
    target: Mapping[str, Any]
    """TVM target description."""
    bytes: int
    """Weight bytes of one vector: 4 per int32 lane."""
    dot4: Dot
    """``acc int32 + sum of 4 products`` for any uint8 (int8 if ``signed``) and int8; exact."""
    ternary_dot: Dot
    """The same for field values and |q| <= 127, into accumulators of type ``acc_dtype``."""
    acc_dtype: str
    widen: Callable[[Expr], Expr]
    """Accumulators to one int32 lane per weight row."""
    decode_field: Callable[[Expr, int, int], tuple[Expr, int]]
    """``(v, p, lanes) -> (codes * 2**shift, shift)``."""
    flush_blocks: int | None
    """16-column blocks after which gemv accumulators must be widened; None for never."""
    split_trits: Callable[[Expr, int], tuple[Expr, tuple[Expr, int]]] | None = None
    """``(v, lanes)`` of layout t5 to four codes as bit pairs and ``(fifth code << shift, shift)``;
    None: by arithmetic (``codes.split_trits``)."""
    features: tuple[str, ...] = ()
    """CPU features it needs, as named in ``custom_ops/csrc/cpu_*.c``."""
    fused: bool = True
    """Whether ``ternary_dot`` is one instruction, its addition included."""
    acc_parts: int = 1
    """Accumulator lanes of one weight row."""
    quad: Quad = broadcast_quad
    signed: bool = False
    """Whether ``dot4`` takes signed weights."""
    word_dot: Dot | None = None
    """``acc int32 + sums of 2 products`` of int16, where the head is faster with that."""
    matrix_dot: Dot | None = None
    """``acc int32 [2, 2] + w int8 [2, 8] . a int8 [2, 8]`` (acc[a][w]), where there is such an
    instruction: prefill then uses it."""
    gemv: Gemv = field(default_factory=Gemv)
    gemm: Gemm = field(default_factory=lambda: Gemm(rows=4, tiles=1, k_blocks=16))
    head: Head = field(default_factory=Head)

    @property
    def rows(self) -> int:
        """Weight rows (int32 lanes) of one vector."""
        return self.bytes // 4

    @property
    def groups(self) -> int:
        """Vectors of one 64-byte tile."""
        return TILE // self.bytes

    @property
    def acc_lanes(self) -> int:
        """Lanes of one accumulator."""
        return self.rows * self.acc_parts
