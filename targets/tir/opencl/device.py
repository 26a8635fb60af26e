"""Building OpenCL kernels with plain Python, on top of :mod:`bitcompile.targets.tir.dsl`.

A kernel is written for one work-item; its parameters keep their order in the OpenCL source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm_ffi import structural_map

from bitcompile.targets.tir.dsl import Buffer, Expr, T, kernel_parameters
from bitcompile.targets.tir.gates import Arithmetic
from bitcompile.targets.tir.objects import lowering

GROUPS = 1 << 22
"""More work-groups than an axis ever has: the host gives the true number."""
PRELUDE = Path(__file__).with_name("prelude.cl")


def device_kernel(
    name: str,
    parameters: Sequence[tuple[str, str]],
    size: tuple[int, int],
    body: Callable[..., None],
) -> tvm.tirx.PrimFunc:
    """A PrimFunc ``kernel void name(parameters)`` with work-groups of ``size`` items.

    ``body(group, item, *parameters)`` gets the two-dimensional ids of the work-group and of the
    work-item in it.
    """
    with IRBuilder() as building, T.prim_func(s_tir=True):
        T.func_name(name)
        arguments = kernel_parameters(parameters)
        axes = [("blockIdx.x", GROUPS), ("blockIdx.y", GROUPS)]
        axes += [("threadIdx.x", size[0]), ("threadIdx.y", size[1])]
        frames = [T.launch_thread(axis, T.int32(extent)) for axis, extent in axes]
        ids = [frame.__enter__() for frame in frames]
        body((ids[0], ids[1]), (ids[2], ids[3]), *arguments)
        for frame in reversed(frames):
            frame.__exit__(None, None, None)
    return building.get()


def shared(count: int, dtype: str) -> Buffer:
    """An array in the work-group's local memory."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def barrier() -> None:
    """Every work-item of the group must come here, and sees what the others stored."""
    T.evaluate(T.tvm_storage_sync("shared"))


def call(dtype: str, function: str, *arguments: Expr) -> Expr:
    """Call of an OpenCL built-in or of a function of the prelude."""
    return T.call_pure_extern(dtype, function, *arguments)


def divide(a: Expr, b: Expr) -> Expr:
    """``fl(a / b)``."""
    return call("float32", "bc_divide", a, b)


def bits(value: Expr) -> Expr:
    """The bits of a float32 as int32."""
    return call("int32", "as_int", value)


def rounded(value: Expr) -> Expr:
    """rint(value) as int32."""
    return call("int32", "convert_int", call("float32", "rint", value))


def kept(value: Expr, dtype: str = "float32") -> Expr:
    """``value`` in a variable: an expression used twice would else be written, and run, twice."""
    variable = T.alloc_buffer((1,), dtype, scope="local")
    T.buffer_store(variable, value, [0])
    return variable[0]


ARITHMETIC = Arithmetic(
    exact=lambda value, lanes: kept(value),  # the prelude switches contraction off
    divide=lambda a, b, lanes: kept(divide(a, b)),
    round_to_int=lambda value, lanes: kept(rounded(value), "int32"),
)
"""One work-item's arithmetic, for the gates."""


def join(values: Buffer, item: Expr, width: int, combine: Callable[[Expr, Expr], Expr]) -> None:
    """``values[0]`` = all ``width`` values, a power of two, joined by neighbours, for all items."""
    h = 1
    barrier()
    while h < width:
        with T.If(item % (2 * h) == 0), T.Then():
            T.buffer_store(values, combine(values[item], values[item + h]), [item])
        barrier()
        h *= 2


def source(functions: Mapping[str, Any]) -> str:
    """OpenCL C of ``{name: PrimFunc}``, the prelude first."""
    goal = tvm.target.Target({"kind": "opencl"})
    attributes = {"target": goal, "tirx.noalias": True, "calling_conv": 2}  # a device kernel
    texts = [PRELUDE.read_text("ascii")]
    for name, function in functions.items():  # one at a time: a module repeats all declarations
        module = tvm.IRModule({name: function.with_attr({"global_symbol": name, **attributes})})
        lowered = tvm.ir.transform.Sequential(lowering(text=True))(module)
        exact = tvm.IRModule({g: _literals_as_bits(f) for g, f in lowered.functions.items()})
        built = tvm.get_global_func("target.build.opencl")(exact, goal)
        texts.append(str(built.inspect_source()))
    return "\n".join(texts)


def _literals_as_bits(function: Any) -> Any:
    """float32 constants as the bits of an integer: TVM prints them with seven digits, two short."""
    return function.with_body(structural_map(function.body, (tvm.tirx.FloatImm, _as_bits)))


def _as_bits(literal: Any) -> Expr:
    bits = int(np.float32(literal.value).view(np.int32))
    return T.call_pure_extern("float32", "as_float", T.int32(bits))
