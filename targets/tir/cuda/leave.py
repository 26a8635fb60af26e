"""How finished tiles of many tokens leave: through shared memory, several results a store.

A warpgroup of :func:`gemm.wgmma` holds sums of 64 rows. Rows that share a scale leave a part of the
tile after the other, by turns of two rooms: scaled, transposed on the way into the room, and stored
while the next part is scaled. Bulk copies of a token's row each were slower: a thread starts one
in some hundred clocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bitcompile.targets.tir.cuda.device import Ids, at, call, do, long, put, read, variable, view
from bitcompile.targets.tir.cuda.feed import WORKERS
from bitcompile.targets.tir.cuda.rows import BFLOAT16, FLOAT, FLOAT16, each
from bitcompile.targets.tir.dsl import Buffer, Expr, T, local, when

ROWS = 128
"""Weight rows of a block."""
PAD = 4
"""More floats than rows between tokens of the finished tile in shared memory: no bank conflicts."""
GROUP_ROWS, GROUP_THREADS = ROWS // 2, WORKERS // 2
"""Of one of the two warpgroups."""
PART, PITCH, PIECES = 64, 2 * GROUP_ROWS + 16, GROUP_THREADS // 8
"""16-bit results: tokens of a part, bytes between them (no bank conflicts), tokens at a time."""
WIDE_PART, WIDE_PITCH, WIDE_PIECES = PART // 2, 4 * (GROUP_ROWS + PAD), GROUP_THREADS // 16
"""The same of 32-bit results."""
LEAVING = 2 * PART * PITCH
"""Bytes of shared memory that a warpgroup's two rooms take."""


def store_tile(ids: Ids, done: Buffer, offset: Expr, first_n: Expr, first_m: Expr, tokens: int,
               threads: int, residual: Buffer, y: Buffer, M: Expr, N: Expr, type_y: Expr,
           has_residual: Expr, rows: int = ROWS,
           scaled: Callable[[Buffer, Expr, Expr], None] | None = None) -> None:  # fmt: skip
    """Store a tile of results ``[tokens, rows + PAD]``, four rows a thread at a time.

    ``scaled(values, token, n)`` makes results of four values of a token, those from row n on.
    """
    values, old = local(4, "float32"), local(4, "float32")
    quads = rows // 4

    def store(i: Expr) -> None:
        token, n = T.floordiv(i, quads), first_n + (i % quads) * 4
        m = first_m + token
        with when(T.And(m < M, n < N)):
            to = long(m) * N + n
            do(
                "bc_load_shared4",
                at(values, 0),
                at(done, offset + token * (rows + PAD) + i % quads * 4),
            )
            if scaled:
                scaled(values, token, n)
            with when(N % 4 == 0):
                with when(has_residual != 0):
                    do("bc_load4", at(old, 0), residual.data, to, type_y)
                    for j in range(4):
                        put(values, values[j] + old[j], j)
                do("bc_store4", y.data, to, at(values, 0), type_y)
            with when(N % 4 != 0), T.serial(4) as j, when(n + j < N):
                with when(has_residual != 0):
                    more = read("float32", "bc_load", residual.data, to + j, type_y)
                    put(values, values[j] + more, j)
                do("bc_store", y.data, to + j, values[j], type_y)

    each(ids, T.int32(tokens * quads), store, threads)


@dataclass
class Leaving:
    """How a warpgroup's ``acc``, its rows by ``count`` tokens, become results."""

    ids: Ids
    """With the number of a thread in its warpgroup."""
    row: Expr
    """First of the warp's, in the warpgroup's."""
    room: Buffer
    out: Expr
    """Where the warpgroup's two rooms begin, in bytes."""
    acc: Buffer
    count: int
    scale: Buffer
    """``[groups][count]``: of the tokens."""
    pairs: Buffer
    """``[groups][count / 2][4]``: of two tokens, totals (as bits), and ratios if rows are alike."""
    group: Expr
    w_scale: Buffer
    bias: Buffer
    residual: Buffer
    y: Buffer
    M: Expr
    N: Expr
    type_y: Expr
    has_bias: Expr
    has_residual: Expr

    def __post_init__(self) -> None:
        self.values, self.four = local(PART // 2, "float32"), local(4, "uint32")
        self.pieces, self.done = local(16, "uint32"), view(self.room, "float32")
        lane = self.ids.lane
        self.g, self.c = T.floordiv(lane, 4), lane % 4

    def go(self, first_n: Expr, first_m: Expr, quick: Expr) -> None:
        """The results from this row and token on; ``quick``: by a shorter way."""
        with when(quick != 0):
            with when(self.type_y == FLOAT):
                self._wide(first_n, first_m)
            for type_, extra in itertools.product((FLOAT16, BFLOAT16), (0, 1)):
                with when(T.And(self.type_y == type_, self.has_residual == extra)):
                    self._narrow(first_n, first_m, type_, bool(extra))
        with when(quick == 0):
            self._slowly(first_n, first_m)

    def fetch(self, first_n: Expr, first_m: Expr, part: int) -> None:
        """What is added to a part of 16-bit results, to their room."""
        token, piece = self._share(8)
        to, n = self._address(token * PITCH + piece * 16), first_n + piece * 8
        for i in range(0, min(PART, self.count - part * PART), PIECES):
            m = first_m + part * PART + i + token
            place = to + T.uint32(part % 2 * PART * PITCH + i * PITCH)
            wanted = T.cast(T.And(m < self.M, n < self.N), "int32")
            byte = (long(m) * self.N + n) * 2
            do("bc_copy_async16_if", place, self.residual.data, byte, wanted)

    def _narrow(self, first_n: Expr, first_m: Expr, type_: int, extra: bool) -> None:
        """16-bit results, a part after the other by turns of two rooms."""
        lane = self.ids.lane
        lane_token = lane % 8 + T.floordiv(lane, 16) * 8
        lane_row = self.row + T.floordiv(lane, 8) % 2 * 8
        to = self._address(lane_token * PITCH + lane_row * 2)
        token, piece = self._share(8)
        from_, n = self._address(token * PITCH + piece * 16), first_n + piece * 8
        for part, first in enumerate(range(0, self.count, PART)):
            tokens, place = min(PART, self.count - first), part % 2 * PART * PITCH
            self._load_values(first, tokens)
            if extra:
                do("bc_copy_wait")
                do("bc_group", self.group)
            for j in range(0, tokens // 8, 2):
                here = to + T.uint32(place + j * 8 * PITCH)
                if extra:
                    do("bc_load_matrix4_turned", at(self.four, 0), here)
                for i in range(4):
                    two = [self._result(first, j + i // 2, i % 2, e) for e in range(2)]
                    if extra:
                        two = [
                            one + call("float32", "bc_widen_of", self.four[i], e, type_)
                            for e, one in enumerate(two)
                        ]
                    put(self.four, call("uint32", "bc_narrow2", *two, type_), i)
                do("bc_store_matrix4", here, at(self.four, 0))
            do("bc_group", self.group)
            if extra and first + PART < self.count:
                self.fetch(first_n, first_m, part + 1)
            ms = [first_m + first + i + token for i in range(0, tokens, PIECES)]
            self._send(ms, n, 2, from_ + T.uint32(place), PIECES * PITCH)

    def _wide(self, first_n: Expr, first_m: Expr) -> None:
        """32-bit results likewise, in smaller parts."""
        to = self._address(self.c * (2 * WIDE_PITCH) + (self.row + self.g) * 4)
        token, piece = self._share(16)
        from_, n = self._address(token * WIDE_PITCH + piece * 16), first_n + piece * 4
        for part, first in enumerate(range(0, self.count, WIDE_PART)):
            tokens, place = min(WIDE_PART, self.count - first), part % 2 * WIDE_PART * WIDE_PITCH
            self._load_values(first, tokens)
            for j, half, e in itertools.product(range(tokens // 8), range(2), range(2)):
                one = call("int32", "__float_as_int", self._result(first, j, half, e))
                here = to + T.uint32(place + (j * 8 + e) * WIDE_PITCH + half * 32)
                do("bc_store_shared", here, one)
            do("bc_group", self.group)
            ms = [first_m + first + i + token for i in range(0, tokens, WIDE_PIECES)]
            self._send(ms, n, 4, from_ + T.uint32(place), WIDE_PIECES * WIDE_PITCH)

    def _slowly(self, first_n: Expr, first_m: Expr) -> None:
        """Whatever results; who stores one makes it of its sum."""
        begin = variable(T.floordiv(self.out, 4), "int32")[0]
        to = self._address(self.c * (2 * WIDE_PITCH) + (self.row + self.g) * 4)
        for first in range(0, self.count, PART):
            tokens = min(PART, self.count - first)
            self._load_values(first, tokens)
            for j, half, e in itertools.product(range(tokens // 8), range(2), range(2)):
                here = to + T.uint32((j * 8 + e) * WIDE_PITCH + half * 32)
                do("bc_store_shared", here, self._sum(first, j, half, e))
            do("bc_group", self.group)
            store_tile(
                self.ids, self.done, begin, first_n, first_m + first, tokens, GROUP_THREADS,
                self.residual, self.y, self.M, self.N, self.type_y, self.has_residual, GROUP_ROWS,
                partial(self._scaled, first),
            )  # fmt: skip
            do("bc_group", self.group)

    def _scaled(self, first: int, values: Buffer, token: Expr, n: Expr) -> None:
        """Results of four sums of a token, in their place."""
        scale = variable(self.scale[self.group * self.count + first + token], "float32")[0]
        inverse = variable(call("float32", "__frcp_rn", scale), "float32")[0]
        with T.unroll(4) as j, when(n + j < self.N):
            by = call("float32", "bc_divide", self.w_scale[n + j], scale, inverse)
            value = call("int32", "__float_as_int", values[j])
            put(values, T.cast(value, "float32") * by, j)
            with when(self.has_bias != 0):
                put(values, values[j] + self.bias[n + j], j)

    def _address(self, byte: Expr) -> Expr:
        """Of a byte of the rooms, in shared memory."""
        return read("uint32", "bc_shared", at(self.room, self.out + byte))

    def _share(self, pieces: int) -> tuple[Expr, Expr]:
        """A thread's token and piece of it, of ``pieces`` of 16 bytes."""
        return T.floordiv(self.ids.thread, pieces), self.ids.thread % pieces

    def _load_values(self, first: int, tokens: int) -> None:
        """Totals and ratios of the lane's tokens among these."""
        for j in range(tokens // 8):
            pair = self.group * (2 * self.count) + (first + j * 8) * 2 + self.c * 4
            do("bc_load_shared4", at(self.values, j * 4), at(self.pairs, pair))

    def _sum(self, first: int, j: int, half: int, e: int) -> Expr:
        """Of a row and a token of those whose ``values`` are loaded, from ``first`` on."""
        total = call("int32", "__float_as_int", self.values[j * 4 + e])
        return self.acc[(first // 8 + j) * 4 + half * 2 + e] - total

    def _result(self, first: int, j: int, half: int, e: int) -> Expr:
        small = call("float32", "bc_small_float", self._sum(first, j, half, e))
        return small * self.values[j * 4 + 2 + e]

    def _send(self, ms: list[Expr], n: Expr, size: int, from_: Expr, step: int) -> None:
        """16 bytes of each of these tokens, ``step`` apart in shared memory, all under way."""
        for i in range(len(ms)):
            do("bc_load_shared16", at(self.pieces, i * 4), from_ + T.uint32(i * step))
        for i, m in enumerate(ms):
            byte, wanted = (long(m) * self.N + n) * size, T.And(m < self.M, n < self.N)
            do("bc_store16_if", self.y.data, byte, at(self.pieces, i * 4), T.cast(wanted, "int32"))
