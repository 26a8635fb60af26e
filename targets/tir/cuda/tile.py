"""Sizes that every CUDA kernel and the host (``custom_ops/csrc/cuda.c``) agree on.

Weights lie in fragment order (``packing.CUDA_TILE``): a *unit* is 16 rows by 128 columns, 512
bytes, 16 for each lane of a warp. A lane's four words are the operands of four tensor-core products
of 32 columns; bit pair f of a word's bytes is row ``lane / 4 + 8 (f % 2)``, column
``4 (lane % 4) + 16 (f / 2)`` and the three after it.

Quantised activations lie in units too: ``q[K / 128][M / 8]``, 8 tokens by 128 columns, 1024 bytes;
the 16-byte piece p of token r stands at place ``p ^ r`` of its row, as Hopper's 128-byte swizzle
has it, so that a tile of tokens is one contiguous copy into shared memory. One token that goes to
:mod:`gemv` is in plain order.
"""

from __future__ import annotations

TILE_ROWS = 16
UNIT_COLUMNS = 128
UNIT_WORDS = 128
"""32-bit words of a unit of weights."""
TOKENS = 8
TOKEN_UNIT = 1024
"""Bytes of a unit of activations."""
