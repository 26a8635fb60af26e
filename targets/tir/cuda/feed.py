"""How one lane of a Hopper block feeds tokens to its warpgroups that multiply."""

from __future__ import annotations

from bitcompile.targets.tir.cuda.device import Ids, at, barrier, do, long, put, shared, variable
from bitcompile.targets.tir.cuda.tile import TOKEN_UNIT, TOKENS
from bitcompile.targets.tir.dsl import Buffer, Expr, T, when

WORKERS = 256
"""Two warpgroups of 64 rows each; a warp of a third brings the operands."""
HOPPER_THREADS = WORKERS + 128
WORKER_REGISTERS, OTHER_REGISTERS = 240, 24
"""Of a thread: the three warpgroups start with 168 each; the last gives up what the others take."""


class Ring:
    """Which stage comes next, and in which phase its barriers are."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.slot, self.phase = (variable(T.int32(0), "int32") for _ in range(2))

    def advance(self) -> None:
        """To the next stage."""
        put(self.slot, self.slot[0] + 1)
        with when(self.slot[0] == self.stages):
            put(self.slot, T.int32(0))
            put(self.phase, T.bitwise_xor(self.phase[0], T.int32(1)))


class Feed:
    """Tokens on their way to the warps that multiply, through stages of shared memory in turn.

    A stage is ``full`` when its tokens have landed and ``free`` when every warp has read them.
    ``tokens``: of a stage, whose unit of columns fills ``size`` bytes.
    """

    def __init__(self, ids: Ids, stages: int, tokens: int, size: int) -> None:
        self.ids, self.stages, self.tokens, self.size = ids, stages, tokens, size
        self.full, self.free = shared(stages, "uint64"), shared(stages, "uint64")

    def open(self) -> None:
        """Make the barriers."""
        with when(self.ids.thread == 0):
            for i in range(self.stages):
                do("bc_barrier_init", at(self.full, i), T.int32(1))
                do("bc_barrier_init", at(self.free, i), T.int32(WORKERS // 32))
            do("bc_barrier_fence")
        barrier()

    def bring(self, q: Buffer, to: Buffer, base: Expr, places: Expr, grid: Expr, blocks: Expr,
              units: Expr, token_groups: Expr) -> None:  # fmt: skip
        """By one lane of the last warpgroup: tokens of each of the ``places`` of this block."""
        ring = Ring(self.stages)
        do("bc_wait_for_earlier")
        with T.serial(places) as number:
            place = variable(self.ids.block_x + number * grid, "int32")[0]
            first = variable(T.floordiv(place, blocks) * (self.tokens // TOKENS), "int32")[0]
            with T.serial(units) as unit:
                slot = ring.slot[0]
                empty = T.bitwise_xor(ring.phase[0], T.int32(1))
                do("bc_barrier_wait", at(self.free, slot), empty)
                do("bc_barrier_expect", at(self.full, slot), T.int32(self.size))
                start = (long(unit) * token_groups + first) * TOKEN_UNIT
                do("bc_copy_bulk", at(to, base + slot * self.size), q.data, start,
                   T.int32(self.size), at(self.full, slot))  # fmt: skip
                ring.advance()
