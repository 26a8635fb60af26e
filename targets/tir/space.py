"""The schedules worth trying on a CPU, compiled side by side for ``bitcompile tune``.

Every point of the space computes the same bits: it only orders and places the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitcompile.targets.tir.codes import CODINGS
from bitcompile.targets.tir.gemm import gemm, panel_bytes, partial_values
from bitcompile.targets.tir.gemv import gemv
from bitcompile.targets.tir.isa import Gemm, Gemv, Isa
from bitcompile.targets.tir.linking import zig
from bitcompile.targets.tir.objects import compile_object
from bitcompile.targets.tir.roof import dot_roof, peak_macs, read_roof

CHAINS = (1, 2)
STREAMS = (1, 2, 4)
ACCUMULATORS = 4
"""Most streams x chains: more would not fit the registers."""
PREFETCH = (
    (3072, 3), (4096, 3), (8192, 3), (16384, 3), (16384, 2), (32768, 2), (6144, 0), (8192, 0),
)  # fmt: skip
"""(bytes ahead, locality)."""
REGISTER_TILES = {64: ((6, 4), (12, 2)), 32: ((4, 1), (6, 1)), 16: ((2, 1), (4, 1))}
"""(activation rows, weight tiles) by the bytes of a vector: as many sums as there are registers."""
PANEL_BYTES = (16 << 10, 32 << 10)
QUADS = (1, 2)


def gemv_points(isa: Isa) -> Iterator[Gemv]:
    """Decode schedules; the present one first."""
    yield isa.gemv
    for streams in STREAMS:
        for chains in CHAINS:
            for distance, locality in PREFETCH:
                made = replace(
                    isa.gemv,
                    streams=streams,
                    chains=chains,
                    prefetch_bytes=distance,
                    prefetch_locality=locality,
                )
                if made != isa.gemv and streams * chains <= ACCUMULATORS:
                    yield made


def gemm_points(isa: Isa) -> Iterator[Gemm]:
    """Prefill schedules; the present one first."""
    yield isa.gemm
    seen: list[Gemm] = []
    for rows, tiles in REGISTER_TILES[isa.bytes]:
        for panel in PANEL_BYTES:
            # Narrow sums bound the columns of a panel, and a panel holds whole groups of scales.
            bound = panel // (256 * tiles) // 16 * 16
            blocks = bound if isa.flush_blocks is None else min(bound, isa.gemm.k_blocks)
            for quads in QUADS:
                made = Gemm(rows, tiles, blocks, quads)
                if blocks and made != isa.gemm and made not in seen:
                    seen.append(made)
                    yield made


def compile_space(isa: Isa, triple: str, out: Path) -> list[dict[str, Any]]:
    """Write the library ``out`` with every point; what to call in it, as ``tuning.measure`` reads.

    Also ``bc_read`` and ``bc_dot``, the machine's roofs.
    """
    functions: dict[str, Any] = {"bc_read": read_roof(isa, "bc_read")}
    functions["bc_dot"] = dot_roof(isa, "bc_dot")
    calls: list[dict[str, Any]] = [
        {"symbol": "bc_read", "kind": "read"},
        {"symbol": "bc_dot", "kind": "dot", "macs": peak_macs(isa)},
    ]
    for coding in CODINGS:
        for i, decode in enumerate(gemv_points(isa)):
            symbol = f"bc_gemv_{coding}_{i}"
            functions[symbol] = gemv(replace(isa, gemv=decode), symbol, False, coding)
            calls.append(_call(symbol, "gemv", coding, asdict(decode)))
        for i, prefill in enumerate(gemm_points(isa)):
            symbol, tuned = f"bc_gemm_{coding}_{i}", replace(isa, gemm=prefill)
            functions[symbol] = gemm(tuned, symbol, False, coding)
            sizes = {"panel": panel_bytes(tuned), "partial": partial_values(tuned)}
            calls.append(_call(symbol, "gemm", coding, asdict(prefill)) | sizes)
    objects = out.with_suffix(".o")
    compile_object(functions, isa.target, objects)
    zig(["cc", "-target", triple, "-shared", "-s", str(objects), "-o", str(out)])
    objects.unlink()
    return calls


def _call(symbol: str, kind: str, coding: str, point: dict[str, Any]) -> dict[str, Any]:
    tile = CODINGS[coding].layout.id
    return {"symbol": symbol, "kind": kind, "layout": tile, "point": point}
