"""The only definition of how ternary weights lie in memory.

A *code* is ``w + 1``: 0, 1, 2 for the weights -1, 0, 1. A :class:`Layout` says which bits of the
packed bytes hold the code of row ``n``, column ``k``; graphs, kernels and tests quote its id.
Rows and columns that do not fill a tile are padded with code 1 (weight 0), in the packed bytes
only: graph shapes keep the true ``N`` and ``K``.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Layout:
    """An ``i2`` layout: 2-bit codes in tiles of ``tile_n`` rows by ``tile_k`` columns.

    Inside a tile, bit pair ``p`` of byte ``r * (tile_k // 4) + j`` holds row ``r``, column
    ``p * stride + j * step``. The packed array has shape ``[ceil(N/tile_n), ceil(K/tile_k),
    tile_n * tile_k / 4]``, or ``[N, ceil(K/4)]`` for the row-major portable layout.
    """

    id: str
    tile_n: int
    tile_k: int
    interleaved: bool

    def shape(self, N: int, K: int) -> tuple[int, ...]:
        """Shape of the packed uint8 array of an ``[N, K]`` weight."""
        rows, cols = -(-N // self.tile_n), -(-K // self.tile_k)
        if self.tile_n == 1:
            return (rows, cols * self.tile_k // 4)
        return (rows, cols, self.tile_n * self.tile_k // 4)

    def encode(self, codes: Bytes) -> Bytes:
        """Pack ``codes`` uint8 ``[N, K]`` (values 0..2)."""
        N, K = codes.shape
        rows, cols = -(-N // self.tile_n), -(-K // self.tile_k)
        padded = np.ones((rows * self.tile_n, cols * self.tile_k), np.uint8)
        padded[:N, :K] = codes
        fields = padded.reshape(rows, self.tile_n, cols, *self._fields())
        if self.interleaved:  # column = p * (tile_k / 4) + j
            packed = sum(fields[..., p, :] << np.uint8(2 * p) for p in range(4))
        else:  # column = 4 * j + p
            packed = sum(fields[..., p] << np.uint8(2 * p) for p in range(4))
        packed = np.asarray(packed, np.uint8)  # [rows, tile_n, cols, tile_k / 4]
        return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(self.shape(N, K))

    def decode(self, data: Bytes, N: int, K: int) -> Bytes:
        """Codes uint8 ``[N, K]`` of a packed array; raises InputError if its shape is not ours."""
        if data.dtype != np.uint8 or data.shape != self.shape(N, K):
            raise InputError(
                f"packed weight is {data.dtype}{list(data.shape)}; layout {self.id} of a "
                f"[{N}, {K}] weight is uint8{list(self.shape(N, K))}: pack it again"
            )
        rows, cols = -(-N // self.tile_n), -(-K // self.tile_k)
        tiles = data.reshape(rows, cols, self.tile_n, self.tile_k // 4).transpose(0, 2, 1, 3)
        axis = -2 if self.interleaved else -1
        fields = np.stack([(tiles >> np.uint8(2 * p)) & np.uint8(3) for p in range(4)], axis=axis)
        return np.ascontiguousarray(fields.reshape(rows * self.tile_n, cols * self.tile_k)[:N, :K])

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

    def _fields(self) -> tuple[int, int]:
        return (4, self.tile_k // 4) if self.interleaved else (self.tile_k // 4, 4)


PORTABLE = Layout("i2", tile_n=1, tile_k=4, interleaved=False)
"""Row-major over K, four consecutive columns a byte, low bits first: what graphs carry."""

CPU_TILE = Layout("i2_n16k16", tile_n=16, tile_k=16, interleaved=True)
"""``[N/16][K/16][64 B]``: byte ``4r + j``, bit pair ``p`` = row ``r``, column ``4p + j``.

One 64-byte load holds 16 rows x 4 consecutive columns in each bit pair, so that a kernel decodes
by AND alone and a 4-byte dot product instruction needs no shuffle. All CPU targets share it.
"""

LAYOUTS: dict[str, Layout] = {layout.id: layout for layout in (PORTABLE, CPU_TILE)}


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
