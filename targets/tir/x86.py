"""Kernel variants of x86-64: AVX-512 VNNI with and without VBMI, AVX-VNNI, AVX2 and portable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitcompile.packing import T5
from bitcompile.targets.tir.dsl import Expr, T, const, constants, intrinsic, typed
from bitcompile.targets.tir.isa import (
    Dot,
    Gemm,
    Gemv,
    Head,
    Isa,
    field_in_place,
    field_shifted,
    shifted_bytes,
)


def _vpdpbusd(acc: Expr, w: Expr, a: Expr) -> Expr:
    return intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", acc, w, a)


def _vpdpbusd_256(acc: Expr, w: Expr, a: Expr) -> Expr:
    return intrinsic("llvm.x86.avx512.vpdpbusd.256", "int32x8", acc, w, a)


def _vpermb(table: np.ndarray, index: Expr) -> Expr:
    """``table[index & 63]`` of 64 bytes."""
    return intrinsic("llvm.x86.avx512.permvar.qi.512", "uint8x64", constants(table), index)


def _split_trits(v: Expr, lanes: int) -> tuple[Expr, tuple[Expr, int]]:
    """The quadrant code by look-ups in the low six bits, one table below 0xC0 and one above."""
    pairs = (T5.codes[:, :4] << (2 * np.arange(4))).sum(axis=1).astype(np.uint8)
    top = (T5.codes[:, 4] << 6).astype(np.uint8)
    spare = v >= const(0xC0, "uint8", lanes)
    four = T.Select(spare, _vpermb(pairs[192:], v), _vpermb(pairs[:64], v))
    kept = T.bitwise_and(v, const(0xC0, "uint8", lanes))
    return four, (T.Select(spare, _vpermb(top[192:], v), kept), 6)


def _vpmaddubsw(acc: Expr, w: Expr, a: Expr) -> Expr:
    """Products of byte pairs into int16. Exact only while the sums fit: see ``flush_blocks``."""
    return acc + intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", w, a)


def _vpmaddwd(acc: Expr, w: Expr, a: Expr) -> Expr:
    return acc + intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", w, a)


def _pmaddwd(acc: Expr, w: Expr, a: Expr) -> Expr:
    return acc + intrinsic("llvm.x86.sse2.pmadd.wd", "int32x4", w, a)


def _pairs_to_int32(acc: Expr) -> Expr:
    one = const(1, "int16", 16)
    return intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", acc, one)


def _dot4_by_words(word_dot: Dot, lanes: int) -> Dot:
    """Even and odd bytes as ``lanes`` 16-bit ones, whose products pmaddwd adds in pairs."""
    unsigned, signed = typed("uint16", lanes), typed("int16", lanes)

    def dot4(acc: Expr, w: Expr, a: Expr) -> Expr:
        words, numbers = T.reinterpret(w, dtype=unsigned), T.reinterpret(a, dtype=signed)
        eight = const(8, "int16", lanes)
        w_even = T.bitwise_and(words, const(255, "uint16", lanes))
        w_odd = T.shift_right(words, const(8, "uint16", lanes))
        a_even = T.shift_right(T.shift_left(numbers, eight), eight)
        a_odd = T.shift_right(numbers, eight)
        acc = word_dot(acc, T.reinterpret(w_even, dtype=signed), a_even)
        return word_dot(acc, T.reinterpret(w_odd, dtype=signed), a_odd)

    return dot4


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
    gemv=Gemv(streams=1, chains=2, batch=4, prefetch_bytes=6144, prefetch_locality=3),
    gemm=Gemm(rows=6, tiles=4, k_blocks=32),
    head=Head(rows=4, table_rows=2),
)

AVX512_VBMI = replace(
    AVX512_VNNI,
    name="avx512-vbmi",
    target={"kind": "llvm", "mcpu": "icelake-server"},
    split_trits=_split_trits,
    features=(*AVX512_VNNI.features, "avx512vbmi"),
)

AVX_VNNI = Isa(
    name="avx-vnni",
    target={"kind": "llvm", "mcpu": "alderlake"},
    bytes=32,
    dot4=_vpdpbusd_256,
    ternary_dot=_vpdpbusd_256,
    acc_dtype="int32",
    widen=lambda acc: acc,
    decode_field=field_in_place,
    flush_blocks=None,
    features=("avx2", "avxvnni"),
    gemv=Gemv(streams=1, batch=1),
    gemm=Gemm(rows=6, tiles=1, k_blocks=32),
)

AVX2 = Isa(
    name="avx2",
    target={"kind": "llvm", "mcpu": "haswell"},
    bytes=32,
    dot4=_dot4_by_words(_vpmaddwd, 16),
    ternary_dot=_vpmaddubsw,
    acc_dtype="int16",
    acc_parts=2,
    fused=False,
    widen=_pairs_to_int32,
    decode_field=_avx2_field,
    # An in-place factor of 4 adds at most 2 * (2 * 8 * 127) = 4064 a block: 8 blocks stay below
    # 2**15. |q| <= 127 because fl(x * fl(fl(1/t) * 127)) rounds to at most 127 for |x| <= t.
    flush_blocks=8,
    features=("avx2",),
    word_dot=_vpmaddwd,
    gemv=Gemv(streams=1, batch=2),
    # A panel holds plain codes: 16 blocks add at most 64 * 2 * 2 * 127 = 32512.
    gemm=Gemm(rows=6, tiles=1, k_blocks=16),
)

PORTABLE = Isa(
    name="portable",
    target={"kind": "llvm", "mcpu": "x86-64"},
    bytes=16,
    dot4=_dot4_by_words(_pmaddwd, 8),
    ternary_dot=_dot4_by_words(_pmaddwd, 8),
    acc_dtype="int32",
    fused=False,
    widen=lambda acc: acc,
    decode_field=field_shifted,
    flush_blocks=None,
    word_dot=_pmaddwd,
    gemv=Gemv(streams=1, batch=1),
    gemm=Gemm(rows=2, tiles=1, k_blocks=16),
    head=Head(rows=1),
)

ISAS = (AVX512_VBMI, AVX512_VNNI, AVX_VNNI, AVX2, PORTABLE)
