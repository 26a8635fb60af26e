"""The kernel that shows, at every start, whether a device's arithmetic is what the others need."""

from __future__ import annotations

from typing import Any

from bitcompile.targets.tir.dsl import Buffer, T
from bitcompile.targets.tir.opencl.device import call, device_kernel, divide, kept, rounded
from bitcompile.targets.tir.opencl.rows import LANES

PARAMETERS = [("w", "uint32*"), ("a", "uint32*"), ("c", "int32*"), ("x", "float32*")]
PARAMETERS += [("y", "float32*"), ("z", "float32*"), ("whole", "int32*"), ("real", "float32*")]


def probe(name: str) -> Any:
    """``void name(w, a, c, x, y, z, whole, real)``: one case a work-item.

    ``whole`` ``[cases, 2]``: both dot products of ``w`` and ``a`` plus ``c``, the second with codes
    below 128; ``real`` ``[cases, 4]``: ``x / y``, ``sqrt(x)``, ``x * y + z``, ``rint(z)``.
    """

    def body(group: Any, item: Any, w: Buffer, a: Buffer, c: Buffer, x: Buffer, y: Buffer,
             z: Buffer, whole: Buffer, real: Buffer) -> None:  # fmt: skip
        i = group[0] * LANES + item[0]
        codes = T.bitwise_and(w[i], T.uint32(0x7F7F7F7F))
        T.buffer_store(whole, call("int32", "bc_dot4", w[i], a[i], c[i]), [2 * i])
        T.buffer_store(whole, call("int32", "bc_dot4_code", codes, a[i], c[i]), [2 * i + 1])
        T.buffer_store(real, divide(x[i], y[i]), [4 * i])
        T.buffer_store(real, call("float32", "bc_sqrt", x[i]), [4 * i + 1])
        T.buffer_store(real, kept(x[i] * y[i]) + z[i], [4 * i + 2])
        T.buffer_store(real, T.cast(rounded(z[i]), "float32"), [4 * i + 3])

    return device_kernel(name, PARAMETERS, (LANES, 1), body)
