"""Kernel variants of x86-64: AVX-512 VNNI, AVX2 and portable."""

from __future__ import annotations

from bitcompile.targets.tir.dsl import Expr, T, const, intrinsic
from bitcompile.targets.tir.isa import (
    Gemm,
    Gemv,
    Isa,
    dot4_generic,
    field_in_place,
    field_shifted,
    shifted_bytes,
)


def _vpdpbusd(acc: Expr, w: Expr, a: Expr) -> Expr:
    return intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", acc, w, a)


def _vpmaddubsw(acc: Expr, w: Expr, a: Expr) -> Expr:
    """Products of byte pairs into int16. Exact only while the sums fit: see ``flush_blocks``."""
    return acc + intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", w, a)


def _pairs_to_int32(acc: Expr) -> Expr:
    one = const(1, "int16", 16)
    return intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", acc, one)


def _dot4_avx2(acc: Expr, w: Expr, a: Expr) -> Expr:
    """Even and odd bytes as 16-bit lanes, whose products vpmaddwd adds in pairs."""
    w16, a16 = T.reinterpret(w, dtype="int16x16"), T.reinterpret(a, dtype="int16x16")
    eight = const(8, "int16", 16)
    w_even = T.bitwise_and(w16, const(255, "int16", 16))
    w_odd = T.reinterpret(
        T.shift_right(T.reinterpret(w, dtype="uint16x16"), const(8, "uint16", 16)),
        dtype="int16x16",
    )
    a_even = T.shift_right(T.shift_left(a16, eight), eight)
    a_odd = T.shift_right(a16, eight)
    for w_part, a_part in ((w_even, a_even), (w_odd, a_odd)):
        acc = acc + intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", w_part, a_part)
    return acc


def _avx2_field(v: Expr, p: int, lanes: int) -> tuple[Expr, int]:
    """Factors 1 and 4 only: a factor 64 would leave room for one product in int16."""
    moved = shifted_bytes(v, 4, lanes) if p >= 2 else v
    shift = 2 * (p % 2)
    return T.bitwise_and(moved, const(3 << shift, "uint8", lanes)), shift


AVX512_VNNI = Isa(
    name="avx512-vnni",
    target={"kind": "llvm", "mcpu": "cascadelake"},
    bytes=64,
    dot4=_vpdpbusd,
    ternary_dot=_vpdpbusd,
    acc_dtype="int32",
    widen=lambda acc: acc,
    decode_field=field_in_place,
    flush_blocks=None,
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"),
    gemv=Gemv(streams=1, batch=4, prefetch_bytes=8192, prefetch_locality=3),
    gemm=Gemm(rows=6, tiles=4, k_blocks=32),
)

AVX2 = Isa(
    name="avx2",
    target={"kind": "llvm", "mcpu": "haswell"},
    bytes=32,
    dot4=_dot4_avx2,
    ternary_dot=_vpmaddubsw,
    acc_dtype="int16",
    acc_parts=2,
    widen=_pairs_to_int32,
    decode_field=_avx2_field,
    # An in-place factor of 4 adds at most 2 * (2 * 8 * 127) = 4064 a block: 8 blocks stay below
    # 2**15. |q| <= 127 because fl(x * fl(fl(1/t) * 127)) rounds to at most 127 for |x| <= t.
    flush_blocks=8,
    features=("avx2",),
    gemv=Gemv(streams=2, batch=2),
    # A panel holds plain codes: 16 blocks add at most 64 * 2 * 2 * 127 = 32512.
    gemm=Gemm(rows=6, tiles=1, k_blocks=16),
)

PORTABLE = Isa(
    name="portable",
    target={"kind": "llvm", "mcpu": "x86-64"},
    bytes=16,
    dot4=lambda acc, w, a: dot4_generic(acc, w, a, 16),
    ternary_dot=lambda acc, w, a: dot4_generic(acc, w, a, 16),
    acc_dtype="int32",
    widen=lambda acc: acc,
    decode_field=field_shifted,
    flush_blocks=None,
    gemv=Gemv(streams=1, batch=1),
    gemm=Gemm(rows=2, tiles=1, k_blocks=16),
)

ISAS = (AVX512_VNNI, AVX2, PORTABLE)
