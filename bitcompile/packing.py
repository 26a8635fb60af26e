"""The only definition of how ternary weights lie in memory.

A *code* is ``w + 1``: 0, 1, 2 for the weights -1, 0, 1. A :class:`Layout` says which bits of the
packed bytes hold the code of row ``n``, column ``k``; graphs, kernels and tests quote its id.
Rows and columns that do not fill a tile are padded with code 1 (weight 0), in the packed bytes
only: graph shapes keep the true ``N`` and ``K``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from bitcompile.errors import InputError

Bytes = npt.NDArray[np.uint8]
Ternary = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float32]

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Columns that may share a scale; 0 stands for a whole row."""


def groups(K: int, group_size: int) -> int:
    """Scales along ``K`` columns; raises InputError for a group size without kernels."""
    if group_size == 0:
        return 1
    if group_size not in GROUP_SIZES:
        raise InputError(
            f"weights have one scale per {group_size} columns; supported are 0 (one per row), "
            + ", ".join(map(str, GROUP_SIZES))
        )
    return -(-K // group_size)


@dataclass(frozen=True, eq=False)
class Codec:
    """How one byte holds several codes: row ``b`` of ``codes`` (uint8 ``[256, fields]``) is byte b.

    A byte that no codes make decodes to 3, which no weight has.
    """

    codes: Bytes

    @property
    def fields(self) -> int:
        """Codes a byte."""
        return int(self.codes.shape[1])

    def join(self, fields: Bytes) -> Bytes:
        """Bytes ``[...]`` of codes ``[..., fields]``."""
        index = fields[..., 0].astype(np.uint16)
        for f in range(1, self.fields):
            index |= fields[..., f].astype(np.uint16) << np.uint16(2 * f)
        return np.asarray(self._bytes[index])

    @cached_property
    def _bytes(self) -> Bytes:
        """The byte of every combination of codes, first field in the lowest two bits."""
        table = np.zeros(4**self.fields, np.uint8)
        place = 4 ** np.arange(self.fields)
        table[self.codes.astype(np.int64) @ place] = np.arange(256, dtype=np.uint8)
        return table


I2 = Codec(((np.arange(256)[:, None] >> (2 * np.arange(4))) & 3).astype(np.uint8))
"""Bit pairs, low bits first."""


def _five_trits() -> Bytes:
    """Codes uint8 ``[256, 5]`` of the quadrant code: see :data:`T5`."""
    byte = np.arange(256)
    spare = byte >= 0xC0
    index = np.where(spare, 64 + (byte - 0xC0) // 3, byte & 63)
    fifth = np.where(spare, (byte - 0xC0) % 3, byte >> 6)
    fields = np.concatenate([index[:, None] // 3 ** np.arange(4) % 3, fifth[:, None]], axis=1)
    fields[index >= 3**4] = 3
    return fields.astype(np.uint8)


T5 = Codec(_five_trits())
"""Five codes a byte. Four of them are the number ``i = c0 + 3 c1 + 9 c2 + 27 c3``, below 81.

``i < 64`` is ``i + 64 c4``, so that two table look-ups and a mask decode it; the 17 numbers left
are ``0xC0 + 3 (i - 64) + c4``. The 13 bytes from 0xF3 on are unused.
"""


@dataclass(frozen=True, eq=False)
class Layout:
    """A weight in tiles: which row and column each field of each byte of a tile holds.

    Rows and columns inside a tile are split into named axes, most significant first; ``data`` lists
    the axes that count the tile's bytes, ``field`` those that count the codes of a byte, again most
    significant first. With ``rows={"r": 16}, columns={"p": 4, "j": 4}, data="rj", field="p"``, code
    ``p`` of byte ``4 r + j`` is row ``r``, column ``4 p + j``.

    The packed array has shape ``[ceil(N/tile_n), ceil(K/tile_k), bytes of a tile]``, or ``[N,
    ceil(K/4)]`` for the row-major portable layout.
    """

    id: str
    rows: Mapping[str, int]
    columns: Mapping[str, int]
    data: str
    field: str
    codec: Codec = I2

    @property
    def tile_n(self) -> int:
        """Rows of a tile."""
        return prod(self.rows.values())

    @property
    def tile_k(self) -> int:
        """Columns of a tile."""
        return prod(self.columns.values())

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return self.tile_n * self.tile_k // self.codec.fields

    def sizes(self, axes: str) -> tuple[int, ...]:
        """Extents of axes."""
        every = {**self.rows, **self.columns}
        return tuple(every[axis] for axis in axes)

    @property
    def order(self) -> tuple[int, ...]:
        """Permutation of ``[R, *rows, C, *columns]`` to ``[R, C, *data, *field]`` (tiles R, C)."""
        natural = ["R", *self.rows, "C", *self.columns]
        return tuple(natural.index(axis) for axis in ("R", "C", *self.data, *self.field))

    def shape(self, N: int, K: int) -> tuple[int, ...]:
        """Shape of the packed uint8 array of an ``[N, K]`` weight."""
        R, C = -(-N // self.tile_n), -(-K // self.tile_k)
        return (R, C * self.tile_bytes) if self.tile_n == 1 else (R, C, self.tile_bytes)

    def encode(self, codes: Bytes) -> Bytes:
        """Pack ``codes`` uint8 ``[N, K]`` (values 0..2)."""
        N, K = codes.shape
        R, C = -(-N // self.tile_n), -(-K // self.tile_k)
        padded = np.ones((R * self.tile_n, C * self.tile_k), np.uint8)
        padded[:N, :K] = codes
        split = padded.reshape(R, *self.rows.values(), C, *self.columns.values())
        fields = split.transpose(self.order).reshape(*self.shape(N, K), self.codec.fields)
        return self.codec.join(fields)

    def decode(self, data: Bytes, N: int, K: int) -> Bytes:
        """Codes uint8 ``[N, K]`` of a packed array; raises InputError if its shape is not ours."""
        if data.dtype != np.uint8 or data.shape != self.shape(N, K):
            raise InputError(
                f"packed weight is {data.dtype}{list(data.shape)}; layout {self.id} of a "
                f"[{N}, {K}] weight is uint8{list(self.shape(N, K))}: pack it again"
            )
        R, C = -(-N // self.tile_n), -(-K // self.tile_k)
        split = self.codec.codes[data].reshape(R, C, *self.sizes(self.data + self.field))
        natural = split.transpose(np.argsort(self.order))
        return np.ascontiguousarray(natural.reshape(R * self.tile_n, C * self.tile_k)[:N, :K])

    def holds(self, group_size: int) -> bool:
        """Whether every tile lies in one group of ``group_size`` columns (0: a whole row)."""
        return self.tile_n == 1 or group_size % self.tile_k == 0

    def scale_shape(self, N: int, K: int, group_size: int = 0) -> tuple[int, ...]:
        """Shape of the float32 scales of an ``[N, K]`` weight.

        One scale a row is ``[N, 1]`` in every layout. Groups are ``[N, G]`` in the portable layout,
        and ``[ceil(N/tile_n), G, tile_n]`` in tiles: a kernel reads those of a tile's rows at once.
        """
        G = groups(K, group_size)
        if group_size == 0 or self.tile_n == 1:
            return (N, G)
        return (-(-N // self.tile_n), G, self.tile_n)

    def encode_scale(self, scale: Scales, group_size: int = 0) -> Scales:
        """Scales ``[N, G]`` as they are stored; rows that fill a tile are 0."""
        N, G = scale.shape
        if group_size == 0 or self.tile_n == 1:
            return scale
        padded = np.zeros((-(-N // self.tile_n) * self.tile_n, G), np.float32)
        padded[:N] = scale
        return np.ascontiguousarray(padded.reshape(-1, self.tile_n, G).transpose(0, 2, 1))

    def decode_scale(self, stored: Scales, N: int, K: int, group_size: int = 0) -> Scales:
        """Scales ``[N, G]`` of a stored array; raises InputError if its shape is not ours."""
        expected = self.scale_shape(N, K, group_size)
        if stored.shape != expected:
            raise InputError(
                f"weight scales are {list(stored.shape)}; layout {self.id} of a [{N}, {K}] weight "
                f"with group size {group_size} is {list(expected)}: pack them again"
            )
        if len(expected) == 2:
            return stored
        return np.ascontiguousarray(stored.transpose(0, 2, 1).reshape(-1, expected[1])[:N])


PORTABLE = Layout("i2", rows={}, columns={"p": 4}, data="", field="p")
"""Row-major over K, four consecutive columns a byte, low bits first: what graphs carry."""

CPU_TILE = Layout("i2_n16k16", rows={"r": 16}, columns={"p": 4, "j": 4}, data="rj", field="p")
"""``[N/16][K/16][64 B]``: byte ``4r + j``, bit pair ``p`` = row ``r``, column ``4p + j``.

One 64-byte load holds 16 rows x 4 consecutive columns in each bit pair, so that a kernel decodes
by AND alone and a 4-byte dot product instruction needs no shuffle. All CPU targets share it.
"""

T5_TILE = Layout(
    "t5_n16k20", rows={"r": 16}, columns={"p": 5, "j": 4}, data="rj", field="p", codec=T5
)
"""``[N/16][K/20][64 B]``: byte ``4r + j``, code ``p`` = row ``r``, column ``4p + j``.

The CPU tile with five codes a byte (1.6 bits a weight): a fifth fewer bytes from memory for about
twice the decoding.
"""

CUDA_TILE = Layout(
    "i2_n16k128",
    rows={"h": 2, "g": 8},
    columns={"t": 4, "u": 2, "c": 4, "b": 4},
    data="gctb",
    field="uh",
)
"""``[N/16][K/128][512 B]``: the operands of ``mma.m16n8k32`` as the lanes of a warp hold them.

Lane ``4g + c`` has 16 bytes: word ``t``, byte ``b``, bit pair ``2u + h`` = row ``8h + g``, column
``32t + 16u + 4c + b`` (PTX ISA, matrix fragments for mma.m16n8k32). One copy serves decode and
prefill, and needs no shared memory.
"""

LAYOUTS: dict[str, Layout] = {
    layout.id: layout for layout in (PORTABLE, CPU_TILE, T5_TILE, CUDA_TILE)
}


def layout(id: str) -> Layout:
    """The layout named ``id``; raises InputError for an unknown one."""
    if id not in LAYOUTS:
        raise InputError(f"unknown weight layout {id!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[id]


@dataclass(frozen=True)
class PackedTernary:
    """A ternary weight matrix as it is stored.

    ``data``: uint8, shape ``layout.shape(*shape)``; ``scale``: float32 ``[N, G]``, multiplied to
    the integer product of each row and group of ``group_size`` columns (0: the whole row, G = 1);
    ``shape``: ``(N, K)``.
    """

    data: Bytes
    scale: Scales
    layout: Layout
    shape: tuple[int, int]
    group_size: int = 0

    @classmethod
    def pack(
        cls,
        weight: Ternary,
        scale: npt.ArrayLike,
        layout: Layout = PORTABLE,
        group_size: int = 0,
    ) -> PackedTernary:
        """Pack int8 ``[N, K]`` in {-1, 0, 1}.

        ``scale`` is a scalar, one value per row, or ``[N, G]`` with a ``group_size``. Raises
        InputError if a value is not ternary or a scale is not finite or has another shape.
        """
        if weight.ndim != 2 or weight.size == 0:
            raise InputError(f"a ternary weight must be a non-empty [N, K], not {weight.shape}")
        if weight.min() < -1 or weight.max() > 1:
            raise InputError(f"weight is not ternary: values {weight.min()}..{weight.max()}")
        N, K = weight.shape
        shape = (N, groups(K, group_size))
        rows = np.asarray(scale, np.float32)
        rows = rows.reshape(-1, 1) if rows.ndim < 2 else rows
        if rows.shape not in ((1, 1), (N, 1), shape):
            raise InputError(f"weight scales are {list(rows.shape)}, not {list(shape)}")
        if not np.isfinite(rows).all():
            raise InputError("weight scale is not finite: the checkpoint is damaged")
        spread = np.ascontiguousarray(np.broadcast_to(rows, shape))
        codes = (weight + np.int8(1)).astype(np.uint8)
        return cls(layout.encode(codes), spread, layout, (N, K), group_size)

    def ternary(self) -> Ternary:
        """The weights, int8 ``[N, K]``; raises InputError if a code is 3."""
        codes = self.layout.decode(self.data, *self.shape)
        if codes.max() > 2:
            raise InputError("weight is not ternary: a packed code is 3")
        return codes.astype(np.int8) - np.int8(1)

    def to(self, layout: Layout) -> PackedTernary:
        """The same weights in another layout."""
        codes = self.layout.decode(self.data, *self.shape)
        if codes.max() > 2:
            raise InputError("weight is not ternary: a packed code is 3")
        return PackedTernary(layout.encode(codes), self.scale, layout, self.shape, self.group_size)
