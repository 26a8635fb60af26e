"""Kernel variants of AArch64: i8mm, dotprod and neon. All vectors have 16 bytes."""

from __future__ import annotations

from tvm.tirx import Shuffle

from bitcompile.targets.tir.dsl import Buffer, Expr, T, const, halves, intrinsic, load, typed
from bitcompile.targets.tir.isa import Gemm, Gemv, Isa, shifted_bytes


def _signed(w: Expr) -> Expr:
    """Weight bytes as int8: the products are signed, and field values stay below 128."""
    return T.reinterpret(w, dtype="int8x16")


def _sdot(acc: Expr, w: Expr, a: Expr) -> Expr:
    return intrinsic("llvm.aarch64.neon.sdot", "int32x4", acc, _signed(w), a)


def _smmla(acc: Expr, w: Expr, a: Expr) -> Expr:
    return intrinsic("llvm.aarch64.neon.smmla", "int32x4", acc, a, _signed(w))


def _lane(q: Buffer, index: Expr, p: int, lanes: int) -> Expr:
    """Lane ``p`` of 16 activations: one load serves four dot products, which take it by lane."""
    quads = load(q, index, 4)
    return T.reinterpret(T.broadcast(Shuffle([quads], [T.int32(p)]), 4), dtype=f"int8x{lanes}")


def _dotprod_field(v: Expr, p: int, lanes: int) -> tuple[Expr, int]:
    """By AND alone; the top field, which would be negative there, by a shift alone."""
    if p == 3:
        return T.shift_right(v, const(6, "uint8", lanes)), 0
    return T.bitwise_and(v, const(3 << 2 * p, "uint8", lanes)), 2 * p


def _products(acc: Expr, w: Expr, a: Expr) -> Expr:
    """Products of bytes into int16 (smlal, smlal2). Exact only while the sums fit."""
    wide = T.cast(_signed(w), "int16x16") * T.cast(a, "int16x16")
    return acc + wide


def _fours_to_int32(acc: Expr) -> Expr:
    """Sums of four neighbours of int16 [16]."""
    pairs = [intrinsic("llvm.aarch64.neon.saddlp", "int32x4", half) for half in halves(acc, 16)]
    return intrinsic("llvm.aarch64.neon.addp", "int32x4", *pairs)


def _dot4_neon(acc: Expr, w: Expr, a: Expr) -> Expr:
    """One product a lane fits into int16, whatever the bytes."""
    return acc + _fours_to_int32(T.cast(_signed(w), "int16x16") * T.cast(a, "int16x16"))


def _neon_field(v: Expr, p: int, lanes: int) -> tuple[Expr, int]:
    """Factors 1 and 4 only: 16 would leave int16 room for 8 blocks, and take more registers."""
    if p == 3:
        return T.shift_right(v, const(6, typed("uint8", 1), lanes)), 0
    moved = shifted_bytes(v, 4, lanes) if p == 2 else v
    shift = 2 * (p % 2)
    return T.bitwise_and(moved, const(3 << shift, "uint8", lanes)), shift


_GEMV = Gemv(streams=1, batch=2, prefetch_bytes=2048, prefetch_locality=3)

I8MM = Isa(
    name="i8mm",
    target={"kind": "llvm", "mattr": ["+neon", "+dotprod", "+i8mm"]},
    bytes=16,
    dot4=_sdot,
    ternary_dot=_sdot,
    acc_dtype="int32",
    widen=lambda acc: acc,
    decode_field=_dotprod_field,
    flush_blocks=None,
    features=("asimddp", "i8mm"),
    quad=_lane,
    signed=True,
    matrix_dot=_smmla,
    gemv=_GEMV,
    # Six rows would need more registers than there are.
    gemm=Gemm(rows=4, tiles=1, k_blocks=32),
)

DOTPROD = Isa(
    name="dotprod",
    target={"kind": "llvm", "mattr": ["+neon", "+dotprod"]},
    bytes=16,
    dot4=_sdot,
    ternary_dot=_sdot,
    acc_dtype="int32",
    widen=lambda acc: acc,
    decode_field=_dotprod_field,
    flush_blocks=None,
    features=("asimddp",),
    quad=_lane,
    signed=True,
    gemv=_GEMV,
    gemm=Gemm(rows=4, tiles=1, k_blocks=32, quads=4),
)

NEON = Isa(
    name="neon",
    target={"kind": "llvm", "mattr": ["+neon"]},
    bytes=16,
    dot4=_dot4_neon,
    ternary_dot=_products,
    acc_dtype="int16",
    acc_parts=4,
    fused=False,
    widen=_fours_to_int32,
    decode_field=_neon_field,
    # The factor of 4 adds at most 2 * 4 * 127 a block, the two of 1 and the one moved down less:
    # 32 blocks stay below 2**15 (see AVX2 for |q| <= 127).
    flush_blocks=32,
    quad=_lane,
    signed=True,
    gemv=Gemv(streams=1, batch=1, prefetch_bytes=1024, prefetch_locality=3),
    # A panel holds plain codes: 32 blocks add at most 128 * 2 * 127 = 32512.
    gemm=Gemm(rows=3, tiles=1, k_blocks=32, quads=4),
)

ISAS = (I8MM, DOTPROD, NEON)
