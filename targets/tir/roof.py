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
APART_CHAINS = 6
"""The same where a product is apart from its addition, which takes one cycle: operands and sums
fit 16 registers."""


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
    return _chains(isa) * isa.bytes * (1 if isa.matrix_dot is None else 2)


def _chains(isa: Isa) -> int:
    return DOT_CHAINS if isa.fused else APART_CHAINS


def dot_roof(isa: Isa, name: str) -> Any:
    """``void name(seed, out, steps)``: ``steps`` rounds of independent products of prefill.

    ``seed``: 256 bytes; ``out``: int32 [16] that keeps the work alive. Returns nothing to compare.
    """
    lanes, rows, chains = isa.acc_lanes, isa.rows, _chains(isa)
    product, signed = isa.matrix_dot or isa.ternary_dot, f"int8x{isa.bytes}"

    def body(seed: Buffer, out: Buffer, steps: Expr) -> None:
        acc = local(chains * lanes, isa.acc_dtype)
        for i in range(chains):
            store(acc, i * lanes, const(i, isa.acc_dtype, lanes), lanes)
        weights = local(isa.bytes, "uint8")
        store(weights, 0, load(seed, 0, isa.bytes), isa.bytes)
        with T.serial(steps):
            for i in range(chains):
                # LLVM computes a product only once that additions or steps have in common.
                a = load(seed, 0 if isa.fused else i * isa.bytes, isa.bytes)
                a, w, at = T.reinterpret(a, dtype=signed), load(weights, 0, isa.bytes), i * lanes
                store(acc, at, product(load(acc, at, lanes), w, a), lanes)
            if not isa.fused:
                following = load(weights, 0, isa.bytes) + const(1, "uint8", isa.bytes)
                store(weights, 0, following, isa.bytes)
        total = isa.widen(load(acc, 0, lanes))
        for i in range(1, chains):
            total = total + isa.widen(load(acc, i * lanes, lanes))
        store(out, 0, total, rows)

    return kernel(name, [("seed", "uint8*"), ("out", "int32*"), ("steps", "int32")], body)
