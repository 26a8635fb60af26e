"""How a device's work is cut: plain data, one value of :class:`Schedule` for decode and prefill."""

from __future__ import annotations

from dataclasses import dataclass, replace

TILE_ROWS = 16


@dataclass(frozen=True)
class Schedule:
    """A work-group of a ternary product: ``tiles`` 16-row weight tiles times some activation rows.

    Work-items lie in two axes: ``lanes`` along the weight rows, and ``slices`` parts of K (decode)
    or ``blocks`` blocks of activation rows (prefill).
    """

    rows: int
    """Weight rows of a work-item, read as one vector: 1, 2 or 4."""
    tiles: int
    batch: int = 1
    """Activation rows of a work-item."""
    slices: int = 1
    """Work-items that share weight rows, each with a part of K; joined in local memory. A power of
    two."""
    blocks: int = 1
    """Work-items with different activation rows."""
    stage: int = 0
    """16-column blocks of activations that local memory holds at a time, 0 to do without."""

    @property
    def lanes(self) -> int:
        """Work-items along the weight rows."""
        return TILE_ROWS // self.rows * self.tiles

    @property
    def size(self) -> tuple[int, int]:
        """Work-items of a work-group."""
        return self.lanes, self.slices * self.blocks

    @property
    def activation_rows(self) -> int:
        """Activation rows of a work-group."""
        return self.batch * self.blocks

    def sequential(self) -> Schedule:
        """The same for group-scaled weights, whose float32 sums run over the groups in order."""
        return replace(self, slices=1, tiles=self.tiles * self.slices, stage=0)


@dataclass(frozen=True)
class Schedules:
    """What one OpenCL target is tuned by."""

    decode: Schedule
    prefill: Schedule
