"""A plain W2A8 product of one row in Triton: what a user would write first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.autotune(
    configs=[
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
        for rows, columns, warps in ((4, 256, 4), (8, 256, 4), (16, 128, 4), (8, 512, 8))
    ],
    key=["N", "K4"],
)
@triton.jit
def _product(w, q, y, N, K4, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K4, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < N)[:, None] & (columns < K4)[None, :]
        codes = tl.load(w + rows[:, None] * K4 + columns[None, :], mask=inside, other=0x55)
        for f in tl.static_range(4):
            value = tl.load(q + columns * 4 + f, mask=columns < K4, other=0).to(tl.int32)
            total += (((codes >> (2 * f)) & 3).to(tl.int32) - 1) * value[None, :]
    tl.store(y + rows, tl.sum(total, axis=1).to(tl.float32), mask=rows < N)


def launch(w: torch.Tensor, q: torch.Tensor, y: torch.Tensor) -> None:
    """``y [N] = w q`` for row-major codes ``[N, K / 4]``."""
    N, K4 = w.shape
    _product[lambda meta: (triton.cdiv(N, meta["ROWS"]),)](w, q, y, N, K4)
