"""How kernels decode the weight layouts of the CPU tile: bytes to 2-bit codes in vectors.

A new byte code is one :class:`Coding` here, with its layout in ``bitcompile.packing``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitcompile.packing import CPU_TILE, T5_TILE, Layout
from bitcompile.targets.tir.dsl import Expr, T, const, load, local, store, typed
from bitcompile.targets.tir.isa import MAX_FIELD, Isa, field_shifted

Fields = list[tuple[Expr, int]]
"""``(codes << shift, shift)`` of each field of a byte, in the order of the columns."""


@dataclass(frozen=True)
class Coding:
    """One byte code."""

    layout: Layout
    in_place: Callable[[Isa, Expr], Fields]
    """Fields of a vector as cheaply as the instruction set can: each at its own shift."""
    plain: Callable[[Isa, Expr], list[Expr]]
    """One code a byte, for a panel that is read many times."""

    @property
    def quads(self) -> int:
        """4-column steps of a tile: one for each field of a byte."""
        return self.layout.codec.fields


def _pairs_in_place(isa: Isa, v: Expr) -> Fields:
    return [isa.decode_field(v, p, isa.bytes) for p in range(MAX_FIELD)]


def _pairs_plain(isa: Isa, v: Expr) -> list[Expr]:
    return [field_shifted(v, p, isa.bytes)[0] for p in range(MAX_FIELD)]


def _trits_in_place(isa: Isa, v: Expr) -> Fields:
    four, fifth = _split(isa, v)
    return [*_pairs_in_place(isa, four), fifth]


def _trits_plain(isa: Isa, v: Expr) -> list[Expr]:
    four, (fifth, shift) = _split(isa, v)
    return [*_pairs_plain(isa, four), field_shifted(fifth, shift // 2, isa.bytes)[0]]


def _split(isa: Isa, v: Expr) -> tuple[Expr, tuple[Expr, int]]:
    """A byte of four codes as bit pairs, and the fifth code at its shift."""
    return (isa.split_trits or split_trits)(v, isa.bytes)


def _third(v: Expr, lanes: int) -> Expr:
    """``v // 3`` of each byte below 128, multiplied in 16-bit lanes."""
    half = lanes // 2
    words = T.reinterpret(v, dtype=typed("uint16", half))
    low = T.bitwise_and(words, const(255, "uint16", half))
    high = T.shift_right(words, const(8, "uint16", half))
    factor, nine = const(171, "uint16", half), const(9, "uint16", half)
    low, high = (T.shift_right(part * factor, nine) for part in (low, high))
    joined = T.bitwise_or(low, T.shift_left(high, const(8, "uint16", half)))
    return T.reinterpret(joined, dtype=typed("uint8", lanes))


def split_trits(v: Expr, lanes: int) -> tuple[Expr, tuple[Expr, int]]:
    """The quadrant code (``packing.T5``) by arithmetic, on any instruction set.

    With ``i = c0 + 3 c1 + 9 c2 + 27 c3``, the bit pairs are ``c0 + 4 c1 + 16 c2 + 64 c3 = i + c1 +
    7 c2 + 37 c3``; each ``c`` is the number of times that 27, 9, 3 can be taken from ``i``.
    """

    def u8(value: int) -> Expr:
        return const(value, "uint8", lanes)

    # Stack slots, not expressions: TVM would copy a shared expression into each of its uses.
    spare, third, rest, pairs = (local(lanes, "uint8") for _ in range(4))
    store(spare, 0, T.min(v - u8(0xC0), u8(63)), lanes)
    store(third, 0, _third(load(spare, 0, lanes), lanes), lanes)
    high = v >= u8(0xC0)
    three = load(third, 0, lanes) + load(third, 0, lanes) + load(third, 0, lanes)
    top = field_shifted(v, 3, lanes)[0]
    fifth = T.Select(high, load(spare, 0, lanes) - three, top)
    index = T.Select(high, load(third, 0, lanes) + u8(64), T.bitwise_and(v, u8(63)))
    store(rest, 0, index, lanes)
    store(pairs, 0, load(rest, 0, lanes), lanes)
    for place, gain in ((27, 37), (27, 37), (9, 7), (9, 7), (3, 1), (3, 1)):
        left = load(rest, 0, lanes)
        taken = left >= u8(place)
        added = load(pairs, 0, lanes) + T.Select(taken, u8(gain), u8(0))
        store(pairs, 0, added, lanes)
        store(rest, 0, T.Select(taken, left - u8(place), left), lanes)
    return load(pairs, 0, lanes), (fifth, 0)


CODINGS: dict[str, Coding] = {
    "i2": Coding(CPU_TILE, _pairs_in_place, _pairs_plain),
    "t5": Coding(T5_TILE, _trits_in_place, _trits_plain),
}
