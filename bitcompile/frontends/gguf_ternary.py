"""The ternary weight types of GGUF files, to codes and scales.

A code is ``w + 1``. Each type's bytes (bitnet.cpp ``src/ggml-bitnet-mad.cpp``; llama.cpp
``ggml-quants.c``, and the ``gguf`` package's ``quants.py``):

- **I2_S** (bitnet.cpp): four codes a byte at shifts 6, 4, 2, 0, one float32 scale behind all codes.
  Which codes share a byte depends on the machine that wrote the file (:data:`I2S_ORDERS`), and
  nothing in the file says which it was: see :mod:`bitcompile.frontends.gguf_order`.
- **TQ2_0**: blocks of 256 columns; halves of 128, byte p holds columns p, p+32, p+64, p+96 at
  shifts 0, 2, 4, 6; then an fp16 scale.
- **TQ1_0**: blocks of 256 columns; 32 bytes of five trits (column p + 32 i), 16 of five
  (160 + p + 16 i), 4 of four (240 + p + 4 i); then an fp16 scale. Base 3, most significant trit
  first, stored as ``ceil(256 v / 243)``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bitcompile.errors import InputError
from bitcompile.packing import PORTABLE, PackedTernary

Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

I2S_ORDERS = {
    "k128": "columns p, p+32, p+64, p+96 of 128: x86 builds of bitnet.cpp",
    "k64": "columns p, p+16, p+32, p+48 of 64: ARM builds of bitnet.cpp",
    "n4": "rows r, r+1, r+2, r+3: x86 builds without ACT_PARALLEL",
}
"""Which codes share a byte of I2_S, by name."""
_I2S_BLOCK = {"k128": 128, "k64": 64, "n4": 128}
"""Columns a kernel of bitnet.cpp takes at once: K is a multiple."""
_SHIFTS = np.array([6, 4, 2, 0], np.uint8)

BLOCK = 256
"""Columns of a block of TQ1_0 and TQ2_0."""
BLOCK_BYTES = {"TQ1_0": 54, "TQ2_0": 66}


def i2s_fits(N: int, K: int, order: str) -> bool:
    """Whether bitnet.cpp could use an ``[N, K]`` weight in this order."""
    return K % _I2S_BLOCK[order] == 0 and (order != "n4" or N % 4 == 0)


def i2s_codes(data: Bytes, N: int, K: int, order: str) -> Bytes:
    """Codes uint8 ``[N, K]`` of the ``N K / 4`` code bytes of an I2_S tensor."""
    step = {"k128": 32, "k64": 16, "n4": K}[order]
    fields = (data.reshape(-1, 1, step) >> _SHIFTS[:, None]) & np.uint8(3)
    return fields.reshape(N, K)


def i2s_weight(name: str, raw: Bytes, N: int, K: int, order: str) -> tuple[Bytes, F32]:
    """Codes ``[N, K]`` and scales ``[N, 1]`` of an I2_S tensor; InputError if it holds a code 3."""
    if not i2s_fits(N, K, order):
        raise InputError(
            f"{name} is [{N}, {K}], which I2_S order {order!r} cannot hold "
            f"({I2S_ORDERS[order]}): give another order"
        )
    codes = i2s_codes(raw[: N * K // 4], N, K, order)
    scale = raw[N * K // 4 :][:4].view(np.float32)[0]
    _check(name, codes, scale)
    return codes, np.full((N, 1), scale, np.float32)


def tq_weight(name: str, type_name: str, raw: Bytes, N: int, K: int) -> tuple[Bytes, F32]:
    """Codes ``[N, K]`` and scales ``[N, 1]`` of a TQ1_0 or TQ2_0 tensor.

    Blocks of zeros have scale 0 and take that of their row. Raises InputError if a code is not
    ternary, or if the blocks of a row have different scales.
    """
    blocks = raw.reshape(-1, BLOCK_BYTES[type_name])
    codes = (_tq1_codes if type_name == "TQ1_0" else _tq2_codes)(name, blocks[:, :-2])
    scale = np.ascontiguousarray(blocks[:, -2:]).view(np.float16).astype(np.float32)
    _check(name, codes, scale)
    codes[scale[:, 0] == 0] = 1  # whatever is multiplied by 0
    codes, scale = codes.reshape(N, K), scale.reshape(N, K // BLOCK)
    row = scale.max(axis=1, keepdims=True)
    if ((scale != row) & (scale != 0)).any():
        raise InputError(
            f"{name} has different scales in the {BLOCK}-column blocks of a row: "
            f"{type_name} is supported where a row has one scale, as BitNet models have"
        )
    return codes, row


def _tq2_codes(name: str, data: Bytes) -> Bytes:
    fields = (data.reshape(-1, 2, 1, 32) >> _SHIFTS[::-1, None]) & np.uint8(3)
    return fields.reshape(-1, BLOCK)


def _tq1_codes(name: str, data: Bytes) -> Bytes:
    value = np.full(256, 255, np.uint8)
    for v in range(243):
        value[math.ceil(v * 256 / 243)] = v
    numbers = value[data]
    if (numbers == 255).any() or (numbers[:, 48:] % 3).any():
        raise InputError(f"{name} is not ternary: a byte stands for no five trits")
    parts = [
        (numbers[:, None, begin:end] // np.array(powers, np.uint8)[:, None] % np.uint8(3))
        for begin, end, powers in (
            (0, 32, (81, 27, 9, 3, 1)),
            (32, 48, (81, 27, 9, 3, 1)),
            (48, 52, (81, 27, 9, 3)),
        )
    ]
    return np.concatenate([part.reshape(len(data), -1) for part in parts], axis=1)


def float_weight(name: str, values: npt.NDArray[np.generic]) -> tuple[Bytes, F32]:
    """Codes and scales of float ``[N, K]`` that is ternary: ``{-s, 0, s}`` with one s a tensor."""
    wide = values.astype(np.float32)
    scale = np.abs(wide).max()
    if not np.isfinite(scale):
        raise InputError(f"{name} holds NaN or Inf: damaged file")
    codes = (np.sign(wide) + 1).astype(np.uint8)
    if ((np.abs(wide) != scale) & (wide != 0)).any():
        raise InputError(
            f"{name} is not ternary: its magnitudes are not 0 and one other; only ternary models "
            "(I2_S, TQ1_0, TQ2_0, or floats of such) can be compiled"
        )
    return codes, np.full((len(codes), 1), scale, np.float32)


def _check(name: str, codes: Bytes, scale: F32 | np.float32) -> None:
    if (codes == 3).any():
        raise InputError(f"{name} is not ternary: a packed code is 3")
    if not np.isfinite(scale).all() or (np.asarray(scale) < 0).any():
        raise InputError(f"{name} has a scale that is negative, NaN or Inf: damaged file")


def packed(codes: Bytes, scale: F32) -> PackedTernary:
    """Codes ``[N, K]`` and scales ``[N, 1]`` in the portable layout."""
    return PackedTernary(PORTABLE.encode(codes), scale, PORTABLE, (codes.shape[0], codes.shape[1]))
