"""The ternary weight types of GGUF files, to packed weights.

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
- **Q2_0**: blocks of 64 columns (llama.cpp) or 128 (the fork it comes from, under the same type
  id); an fp16 scale, then four consecutive columns a byte, low bits first. Code 3 stands for
  2 x scale, which a table may hold and a ternary weight does not.

Blocks that share their row's scale become one scale a row, others group-scaled weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitcompile.errors import InputError
from bitcompile.frontends.exact import RULE, exactly_ternary
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


@dataclass(frozen=True)
class Block:
    """Columns of a block, its bytes, and where in them its fp16 scale lies."""

    columns: int
    nbytes: int
    scale: int

    def scales(self, blocks: Bytes) -> F32:
        """float32 ``[blocks]`` of their bytes ``[blocks, nbytes]``."""
        stored = np.ascontiguousarray(blocks[:, self.scale : self.scale + 2])
        return stored.view(np.float16)[:, 0].astype(np.float32)

    def data(self, blocks: Bytes) -> Bytes:
        """Their bytes without the scales."""
        return np.delete(blocks, (self.scale, self.scale + 1), axis=1)


BLOCKS = {
    "TQ1_0": Block(256, 54, 52),
    "TQ2_0": Block(256, 66, 64),
    "Q2_0 g64": Block(64, 18, 0),
    "Q2_0 g128": Block(128, 34, 0),
}
"""The types made of blocks by ``gguf_file.Tensor.type_name``: of Q2_0 with its columns."""


def i2s_fits(N: int, K: int, order: str) -> bool:
    """Whether bitnet.cpp could use an ``[N, K]`` weight in this order."""
    return K % _I2S_BLOCK[order] == 0 and (order != "n4" or N % 4 == 0)


def i2s_codes(data: Bytes, N: int, K: int, order: str) -> Bytes:
    """Codes uint8 ``[N, K]`` of the ``N K / 4`` code bytes of an I2_S tensor."""
    step = {"k128": 32, "k64": 16, "n4": K}[order]
    fields = (data.reshape(-1, 1, step) >> _SHIFTS[:, None]) & np.uint8(3)
    return fields.reshape(N, K)


def i2s_weight(name: str, raw: Bytes, N: int, K: int, order: str) -> PackedTernary:
    """The weight an I2_S tensor holds; raises InputError if it holds a code 3."""
    if not i2s_fits(N, K, order):
        raise InputError(
            f"{name} is [{N}, {K}], which I2_S order {order!r} cannot hold "
            f"({I2S_ORDERS[order]}): give another order"
        )
    codes = i2s_codes(raw[: N * K // 4], N, K, order)
    scale = raw[N * K // 4 :][:4].view(np.float32)
    _check(name, codes, scale)
    return _packed(codes, np.full((N, 1), scale[0], np.float32), 0)


def block_weight(name: str, type_name: str, raw: Bytes, N: int, K: int) -> PackedTernary:
    """The weight that a tensor of one of :data:`BLOCKS` holds.

    Blocks of zeros have scale 0 and take that of their row, if its others share one. Raises
    InputError if a code is not ternary.
    """
    block = BLOCKS[type_name]
    codes, scale = _block_codes(name, type_name, raw)
    _check(name, codes, scale)
    codes[scale == 0] = 1  # whatever is multiplied by 0
    codes, scale = codes.reshape(N, K), scale.reshape(N, K // block.columns)
    row = scale.max(axis=1, keepdims=True)
    if ((scale != row) & (scale != 0)).any():
        return _packed(codes, scale, block.columns)
    return _packed(codes, row, 0)


def block_values(name: str, type_name: str, raw: Bytes, shape: tuple[int, ...]) -> F32:
    """The float32 values of a tensor of one of :data:`BLOCKS`, which need not be ternary."""
    codes, scale = _block_codes(name, type_name, raw)
    return ((codes.astype(np.float32) - 1) * scale[:, None]).reshape(shape)


def _block_codes(name: str, type_name: str, raw: Bytes) -> tuple[Bytes, F32]:
    """Codes uint8 ``[blocks, columns]`` and scales ``[blocks]``."""
    block = BLOCKS[type_name]
    blocks = raw.reshape(-1, block.nbytes)
    return _CODES[type_name.split()[0]](name, block.data(blocks)), block.scales(blocks)


def _q2_codes(name: str, data: Bytes) -> Bytes:
    return PORTABLE.decode(data, len(data), 4 * data.shape[1])


def _tq2_codes(name: str, data: Bytes) -> Bytes:
    fields = (data.reshape(-1, 2, 1, 32) >> _SHIFTS[::-1, None]) & np.uint8(3)
    return fields.reshape(len(data), -1)


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


_CODES = {"TQ1_0": _tq1_codes, "TQ2_0": _tq2_codes, "Q2_0": _q2_codes}


def float_weight(name: str, values: npt.NDArray[np.generic]) -> PackedTernary:
    """A float ``[N, K]`` that is ternary as it stands (:mod:`bitcompile.frontends.exact`)."""
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        raise InputError(f"{name} holds NaN or Inf: damaged file")
    packed = exactly_ternary(wide)
    if packed is None:
        raise InputError(
            f"{name} is not ternary: {RULE}; only ternary models "
            "(I2_S, TQ1_0, TQ2_0, Q2_0, or floats of such) can be compiled"
        )
    return packed


def _check(name: str, codes: Bytes, scale: F32) -> None:
    if (codes == 3).any():
        raise InputError(f"{name} is not ternary: a packed code is 3")
    if not np.isfinite(scale).all() or (scale < 0).any():
        raise InputError(f"{name} has a scale that is negative, NaN or Inf: damaged file")


def _packed(codes: Bytes, scale: F32, group_size: int) -> PackedTernary:
    return PackedTernary(
        PORTABLE.encode(codes), scale, PORTABLE, (codes.shape[0], codes.shape[1]), group_size
    )
