"""Building TIR kernels with plain Python: parameters, vector loads and stores, exact arithmetic.

Kernels are straight-line vector code; Python loops unroll, TIR loops stay. Importing this module
imports TVM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Shuffle
from tvm.tirx.script import builder

T = builder
Expr = Any
Buffer = Any

UNBOUNDED = (1 << 30,)
"""Nominal extent of a pointer parameter: callers guarantee the range, kernels never check it."""


def kernel(
    name: str, parameters: Sequence[tuple[str, str]], body: Callable[..., None]
) -> tvm.tirx.PrimFunc:
    """A PrimFunc ``void name(parameters)``; pointers reach ``body`` as flat buffers.

    ``parameters``: (name, type) pairs with types such as ``"uint8*"``, ``"int32"``, ``"float32"``.
    """
    with IRBuilder() as building, T.prim_func(s_tir=True):
        T.func_name(name)
        body(*kernel_parameters(parameters))
    return building.get()


def kernel_parameters(parameters: Sequence[tuple[str, str]]) -> list[Any]:
    """Declare the parameters of the PrimFunc being built: flat buffers and scalars."""
    handles = [
        T.arg(p, T.handle(t[:-1]) if t.endswith("*") else getattr(T, t)()) for p, t in parameters
    ]
    return [
        T.decl_buffer(UNBOUNDED, t[:-1], data=handle) if t.endswith("*") else handle
        for handle, (_, t) in zip(handles, parameters, strict=True)
    ]


def local(count: int, dtype: str) -> Buffer:
    """A stack array; kept in registers as long as every index is a constant."""
    return T.alloc_buffer((count,), dtype, scope="local")


def load(buffer: Buffer, index: Expr, lanes: int) -> Expr:
    """``lanes`` consecutive elements."""
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def store(buffer: Buffer, index: Expr, value: Expr, lanes: int) -> None:
    """Store ``lanes`` consecutive elements."""
    T.buffer_store(buffer, value, [T.ramp(index, 1, lanes) if lanes > 1 else index])


def splat(value: Expr, lanes: int) -> Expr:
    """``value`` in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def const(value: float | int, dtype: str, lanes: int) -> Expr:
    """A constant in every lane."""
    return splat(tvm.tirx.const(value, dtype), lanes)


def constants(values: np.ndarray) -> Expr:
    """A vector of the given constants."""
    dtype = values.dtype.name
    scalars = [tvm.tirx.const(value, dtype) for value in values.tolist()]
    return Shuffle(scalars, [T.int32(i) for i in range(len(scalars))])


def typed(dtype: str, lanes: int) -> str:
    """The TVM name of a vector type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def intrinsic(name: str, dtype: str, *arguments: Expr) -> Expr:
    """Call of an LLVM intrinsic without side effects."""
    number = tvm.target.codegen.llvm_lookup_intrinsic_id(name)
    if number == 0:
        raise ValueError(f"this LLVM has no intrinsic {name}")
    return T.call_llvm_pure_intrin(T.uint32(number), *arguments, dtype=dtype)


def prefetch(buffer: Buffer, index: Expr, locality: int) -> None:
    """Prefetch for reading; ``locality`` 3 = every cache level .. 0 = none (LLVM's numbers)."""
    number = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.prefetch")
    address = T.address_of(buffer[index])
    arguments = (address, T.int32(0), T.int32(locality), T.int32(1))
    T.evaluate(T.call_llvm_intrin(T.uint32(number), *arguments, dtype="void"))


def exact(value: Expr, lanes: int) -> Expr:
    """``value`` rounded here: keeps LLVM from fusing a product into a following addition.

    TVM lets LLVM contract ``a * b + c`` everywhere, which would make float results depend on the
    instruction set.
    """
    return intrinsic("llvm.arithmetic.fence", typed("float32", lanes), value)


ROUND = 12582912.0
"""1.5 * 2**23: adding it rounds a float32 below 2**22 in magnitude to an integer, half to even."""


def round_to_int(value: Expr, lanes: int) -> Expr:
    """rint(value) as int32, for |value| < 2**22, without libm or a rounding instruction."""
    shifted = exact(exact(value, lanes) + const(ROUND, "float32", lanes), lanes)
    bits = T.reinterpret(shifted, dtype=typed("int32", lanes))
    return bits - const(0x4B400000, "int32", lanes)


def halves(value: Expr, lanes: int) -> tuple[Expr, Expr]:
    """The lower and the upper half of a vector's lanes."""
    low = Shuffle([value], [T.int32(i) for i in range(lanes // 2)])
    high = Shuffle([value], [T.int32(i) for i in range(lanes // 2, lanes)])
    return low, high


def lanes_of(vectors: list[Expr], order: Sequence[int]) -> Expr:
    """A vector of the lanes ``order`` of ``vectors``, counted through all of them."""
    return Shuffle(vectors, [T.int32(i) for i in order])


def in_powers(count: Expr, most: int, emit: Callable[[Expr, int], None]) -> None:
    """``emit(first, size)`` for the parts of ``count``: ``most``, a power of two, then smaller."""
    with T.serial(T.floordiv(count, most)) as part:
        emit(part * most, most)
    size = most
    while size > 1:
        done = T.floordiv(count, size) * size
        size //= 2
        with when(T.floormod(T.floordiv(count, size), 2) != 0):
            emit(done, size)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Statements under a run-time condition."""
    with T.If(condition), T.Then():
        yield
