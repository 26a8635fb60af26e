"""Reading memory and nothing else: the bound for every product with few tokens."""

from __future__ import annotations

from typing import Any

from bitcompile.targets.tir.cuda.device import Ids, at, device_kernel, do, long, put, variable
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

THREADS = 512
LOADS = 8
"""16-byte loads of a thread, all under way at once."""

PARAMETERS = [("data", "uint32*"), ("out", "uint32*"), ("loads", "int32")]


def read(name: str) -> Any:
    """Reads ``loads`` pieces of 16 bytes. Grid: ceil(loads / (THREADS * LOADS)).

    ``out[0]`` is written only if all bits meet a pattern, so that no load can be left out.
    """

    def body(ids: Ids, data: Buffer, out: Buffer, loads: Expr) -> None:
        held = local(4 * LOADS, "uint32")
        total = variable(T.uint32(0), "uint32")
        for i in range(LOADS):
            piece = (ids.block_x * LOADS + i) * THREADS + ids.thread
            for j in range(4):
                put(held, T.uint32(0), i * 4 + j)
            with when(piece < loads):
                do("bc_load_weights", at(held, i * 4), at(data, long(piece) * 4))
        for i in range(4 * LOADS):
            put(total, T.bitwise_xor(total[0], held[i]))
        with when(total[0] == T.uint32(0x9E3779B9)):
            put(out, total[0], 0)

    return device_kernel(name, PARAMETERS, THREADS, body)
