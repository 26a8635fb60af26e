"""Building CUDA kernels with plain Python, on top of :mod:`bitcompile.targets.tir.dsl`.

A kernel is written for one thread; its parameters keep their order in the source, which is CUDA C
text that begins with the prelude.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder

from bitcompile.targets.tir.dsl import Buffer, Expr, T, kernel_parameters, local, store
from bitcompile.targets.tir.gates import Arithmetic
from bitcompile.targets.tir.objects import lowering

UNWANTED = ("tirx.StorageRewrite", "s_tir.CompactBufferAllocation")
"""Passes left out: the first lets arrays of a block share memory by a liveness that knows no other
threads, the second gives arrays in shared memory sizes that only run time knows."""
BLOCKS = 1 << 20
"""Nominal number of blocks along an axis: the host gives the true one."""
KERNEL_LAUNCH = 2
"""TVM's calling convention of a function that a grid of threads runs."""
TVM_SHARED, SHARED_ALIGN = "extern __shared__ __align__(64)", 128
"""Fixed arrays lie before the memory whose size the host gives. Behind an odd number of 64 bytes, a
warp's 512 bytes take five reads in place of four: 3 % of a stack of layers on an H100."""
PRELUDE = Path(__file__).with_name("prelude.cuh")
TARGET = {"kind": "cuda", "arch": "sm_80"}
"""TVM's text is the same for every architecture; the prelude and nvcc know them."""


@dataclass(frozen=True)
class Ids:
    """Where a thread stands."""

    block_x: Expr
    block_y: Expr
    thread: Expr

    @property
    def lane(self) -> Expr:
        """Number in the warp."""
        return self.thread % 32

    @property
    def warp(self) -> Expr:
        """Number of the warp in the block."""
        return T.floordiv(self.thread, 32)


def device_kernel(
    name: str, parameters: Sequence[tuple[str, str]], threads: int, body: Callable[..., None]
) -> tvm.tirx.PrimFunc:
    """A PrimFunc ``__global__ void name(parameters)`` of one-dimensional blocks.

    ``body(ids, *parameters)``; pointers are flat buffers.
    """
    with IRBuilder() as building, T.prim_func(s_tir=True):
        T.func_name(name)
        arguments = kernel_parameters(parameters)
        axes = [("blockIdx.x", BLOCKS), ("blockIdx.y", BLOCKS), ("threadIdx.x", threads)]
        with ExitStack() as stack:
            ids = [stack.enter_context(T.launch_thread(a, T.int32(n))) for a, n in axes]
            body(Ids(*ids), *arguments)
    return building.get()


def shared(count: int, dtype: str) -> Buffer:
    """An array of the block, of a size that the kernel fixes."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def dynamic() -> Buffer:
    """The block's memory whose size the host gives, as bytes; one a kernel."""
    return T.alloc_buffer((1 << 20,), "uint8", scope="shared.dyn")


def view(memory: Buffer, dtype: str) -> Buffer:
    """The same memory as elements of another type."""
    return T.decl_buffer((1 << 20,), dtype, data=memory.data, scope="shared.dyn")


def barrier() -> None:
    """Every thread of the block must come here, and sees what the others stored."""
    T.evaluate(T.tvm_storage_sync("shared"))


def call(dtype: str, function: str, *arguments: Expr) -> Expr:
    """Call of a function that only computes, of CUDA or of the prelude."""
    return T.call_pure_extern(dtype, function, *arguments)


def read(dtype: str, function: str, *arguments: Expr) -> Expr:
    """Call of a function that reads memory, which must stay where it is written."""
    result = local(1, dtype)
    store(result, 0, T.call_extern(dtype, function, *arguments), 1)
    return result[0]


def do(function: str, *arguments: Expr) -> None:
    """Call of a function for its effect."""
    T.evaluate(T.call_extern("void", function, *arguments))


def at(buffer: Buffer, index: Expr) -> Expr:
    """Pointer to an element."""
    return T.address_of(buffer[index])


def shuffle_xor(value: Expr, distance: int) -> Expr:
    """``value`` of the lane whose number differs in one bit."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, distance, 32, 32)


@contextmanager
def rolled(count: Expr) -> Iterator[Expr]:
    """A loop that the compiler leaves one."""
    with T.serial(count, annotations={"disable_unroll": True}) as i:
        yield i


def variable(value: Expr, dtype: str) -> Buffer:
    """A register with a first value; element 0 of a local array."""
    result = local(1, dtype)
    store(result, 0, value, 1)
    return result


def put(buffer: Buffer, value: Expr, index: Expr = 0) -> None:
    """Store one element."""
    store(buffer, index, value, 1)


def now(value: Expr) -> Expr:
    """A uint32 that is worked out here, and not again where it is needed."""
    return read("uint32", "bc_now", value)


def address(pointer: Expr) -> Expr:
    """An address in shared memory, worked out here."""
    return now(call("uint32", "bc_shared", pointer))


def kept(value: Expr, lane: Expr = 0) -> Expr:
    """An int32 of the warp, ``value`` of ``lane``, by a shuffle: in a register from here on.

    What comes from a special register would be read again where it is needed.
    """
    mask = T.uint32(0xFFFFFFFF)
    return variable(call("int32", "__shfl_sync", mask, value, T.int32(lane)), "int32")[0]


def long(value: Expr) -> Expr:
    """``value`` as an offset that may exceed 32 bits."""
    return T.cast(value, "int64")


ARITHMETIC = Arithmetic(
    exact=lambda value, lanes: variable(value, "float32")[0],
    divide=lambda a, b, lanes: variable(call("float32", "__fdiv_rn", a, b), "float32")[0],
    round_to_int=lambda value, lanes: variable(call("int32", "__float2int_rn", value), "int32")[0],
)
"""Of single values. A variable a step keeps the text short; the compiler is told not to fuse
(``-fmad=false``)."""


def source(
    functions: Mapping[str, Any],
    helpers: str = "",
    residents: Mapping[str, int] | None = None,
    registers: Mapping[str, int] | None = None,
) -> str:
    """CUDA C of ``{symbol: PrimFunc}``, with the prelude and more functions that they call.

    ``residents``: how many blocks of a kernel must fit a multiprocessor at once, which bounds its
    registers; ``registers``: that bound itself, for blocks of any size.
    """
    goal = tvm.target.Target(TARGET)
    attributes = {"target": goal, "tirx.noalias": True, "tirx.is_global_func": True}
    module = tvm.IRModule(
        {
            symbol: function.with_attr(
                {**attributes, "global_symbol": symbol, "calling_conv": KERNEL_LAUNCH}
            )
            for symbol, function in functions.items()
        }
    )
    passes = [step for step in lowering() if step.info.name not in UNWANTED]
    lowered = tvm.ir.transform.Sequential(passes)(module)
    text = tvm.get_global_func("target.build.cuda")(lowered, goal).inspect_source()
    kernels = FLOAT_LITERAL.sub(_float32, text[text.index('extern "C"') :])
    bounds = {symbol: rf"__launch_bounds__(\1, {n})" for symbol, n in (residents or {}).items()}
    bounds |= {symbol: f"__maxnreg__({n})" for symbol, n in (registers or {}).items()}
    for symbol, bound in bounds.items():
        pattern = rf"__launch_bounds__\((\d+)\) {symbol}\("
        kernels, found = re.subn(pattern, rf"{bound} {symbol}(", kernels)
        assert found, f"TVM gave {symbol} no bound to replace"
    kernels = kernels.replace(TVM_SHARED, f"extern __shared__ __align__({SHARED_ALIGN})")
    assert kernels.count("extern __shared__") == kernels.count(f"__align__({SHARED_ALIGN})")
    return PRELUDE.read_text("utf-8") + helpers + kernels


FLOAT_LITERAL = re.compile(r"(-?0x[0-9a-f.]+p[+-]\d+)f")


def _float32(literal: re.Match[str]) -> str:
    """TVM writes a float32 constant with the digits of the double it came from."""
    return float(np.float32(float.fromhex(literal[1]))).hex() + "f"
