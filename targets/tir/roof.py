"""What the machine itself can do: read bandwidth and integer multiply peak, for ``bench``."""

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
)
from bitcompile.targets.tir.isa import Isa

READ_BYTES = 256
"""Bytes one step of the read kernel covers."""
READ_AHEAD = 2048
"""Prefetch distance that reads memory fastest (into every cache level), by measurement."""
DOT_CHAINS = 12
"""Independent accumulators: more than latency times throughput of a dot product."""


def read_roof(isa: Isa, name: str) -> Any:
    """``void name(data, out, steps)``: reads ``256 steps`` bytes, xor-ed into out uint8 [64]."""
    lanes = isa.bytes

    def body(data: Buffer, out: Buffer, steps: Expr) -> None:
        acc = local(READ_BYTES, "uint8")
        for i in range(READ_BYTES // lanes):
            store(acc, i * lanes, const(0, "uint8", lanes), lanes)
        with T.serial(steps) as step:
            for i in range(READ_BYTES // lanes):
                at = step * READ_BYTES + i * lanes
                if (i * lanes) % 64 == 0:
                    prefetch(data, at + READ_AHEAD, 3)
                mixed = T.bitwise_xor(load(acc, i * lanes, lanes), load(data, at, lanes))
                store(acc, i * lanes, mixed, lanes)
        total = load(acc, 0, lanes)
        for i in range(1, READ_BYTES // lanes):
            total = T.bitwise_xor(total, load(acc, i * lanes, lanes))
        store(out, 0, total, lanes)

    return kernel(name, [("data", "uint8*"), ("out", "uint8*"), ("steps", "int32")], body)


def peak_macs(isa: Isa) -> int:
    """Multiply-accumulates of one round of :func:`dot_roof`."""
    return DOT_CHAINS * isa.bytes * (1 if isa.matrix_dot is None else 2)


def dot_roof(isa: Isa, name: str) -> Any:
    """``void name(seed, out, steps)``: ``steps`` rounds of 12 independent products of prefill.

    ``seed``: 64 bytes; ``out``: int32 [16] that keeps the work alive. Returns nothing to compare.
    """
    lanes, rows = isa.acc_lanes, isa.rows
    product = isa.matrix_dot or isa.ternary_dot

    def body(seed: Buffer, out: Buffer, steps: Expr) -> None:
        acc = local(DOT_CHAINS * lanes, isa.acc_dtype)
        for i in range(DOT_CHAINS):
            store(acc, i * lanes, const(i, isa.acc_dtype, lanes), lanes)
        w = load(seed, 0, isa.bytes)
        a = T.reinterpret(w, dtype=f"int8x{isa.bytes}")
        with T.serial(steps):
            for i in range(DOT_CHAINS):
                at = i * lanes
                store(acc, at, product(load(acc, at, lanes), w, a), lanes)
        total = isa.widen(load(acc, 0, lanes))
        for i in range(1, DOT_CHAINS):
            total = total + isa.widen(load(acc, i * lanes, lanes))
        store(out, 0, total, rows)

    return kernel(name, [("seed", "uint8*"), ("out", "int32*"), ("steps", "int32")], body)
