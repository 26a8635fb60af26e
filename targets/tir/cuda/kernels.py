"""Every CUDA kernel: what generates it, and the header by which the host knows their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from bitcompile.targets.tir.cuda import (
    decode,
    feed,
    fused,
    gemm,
    gemv,
    grouped,
    head,
    leave,
    roof,
    rows,
)
from bitcompile.targets.tir.cuda.device import source
from bitcompile.targets.tir.cuda.tile import TILE_ROWS


@dataclass(frozen=True)
class DeviceKernel:
    """One kernel of the plugin."""

    name: str
    generate: Callable[[str], Any]
    residents: int = 1
    """Blocks that must fit a multiprocessor at once, which bounds registers."""
    registers: int | None = None
    """Most registers of a thread, in place of ``residents``: blocks that must fit then need not be
    of the largest size (2 % of a stack of layers on an H100)."""
    feature: str | None = None
    """Only for architectures whose name ends so: instructions that no other has."""


TILES = (
    gemm.Tile(tokens=256, stages=5),
    gemm.Tile(tokens=192, stages=7),
    gemm.Tile(tokens=176, stages=7),
    gemm.Tile(tokens=160, stages=8),
    gemm.Tile(tokens=128, stages=10, span=2),
    gemm.Tile(tokens=96, stages=12, span=2),
    gemm.Tile(tokens=64, stages=16, span=2),
)
GEMVS = tuple(
    (f"bc_gemv{ahead}{kind}", ahead, bool(kind), kind == "_extras")
    for ahead in gemv.AHEAD for kind in ("", "_early", "_extras")
)  # fmt: skip
FUSED = tuple(
    (f"bc_fused{share}_{'wide' if wide else 'narrow'}{'_gate' if gate else ''}", share, wide, gate)
    for share in fused.MOST_WARPS for wide in (False, True) for gate in (False, True)
)  # fmt: skip
KERNELS = (
    DeviceKernel("bc_rows", rows.rows),
    DeviceKernel("bc_any_rows", rows.any_rows),
    *(DeviceKernel(name, partial(fused.fused, share=share, wide=wide, gate=gate),
                   registers=fused.REGISTERS) for name, share, wide, gate in FUSED),
    DeviceKernel("bc_decode8", partial(decode.decode, tokens=8), 2),
    DeviceKernel("bc_decode16", partial(decode.decode, tokens=16)),
    DeviceKernel("bc_gemm", gemm.gemm, 2),
    DeviceKernel("bc_grouped", grouped.grouped, 2),
    DeviceKernel("bc_grouped_many", grouped.grouped_many),
    *(DeviceKernel(f"bc_grouped_wgmma{columns}", partial(grouped.grouped_wgmma, columns=columns),
                   feature="90a") for columns in grouped.WGMMA_COLUMNS),
    DeviceKernel("bc_head_quantize8", partial(head.head_quantize, bits=8)),
    DeviceKernel("bc_head_quantize4", partial(head.head_quantize, bits=4)),
    *(DeviceKernel(f"bc_head{bits}_{tokens}", partial(head.head, bits=bits, tokens=tokens),
                   2 if tokens == 1 else 1) for bits in (8, 4) for tokens in head.AHEAD),
    DeviceKernel("bc_read", roof.read, 2),
    *(DeviceKernel(name, partial(gemv.gemv, ahead=ahead, early=early, extras=extras),
                   registers=gemv.REGISTERS) for name, ahead, early, extras in GEMVS),
    *(DeviceKernel(tile.name, partial(gemm.wgmma, tile=tile), feature="90a")
      for tile in TILES),
)  # fmt: skip

SIZES = {
    "BC_ROWS_THREADS": rows.THREADS,
    "BC_ROWS_PART": rows.PART,
    "BC_ROWS_LONGEST": rows.LONGEST,
    "BC_GEMV_AHEAD": gemv.AHEAD[-1],
    "BC_GEMV_MOST_WARPS": gemv.MOST_WARPS,
    "BC_GEMV_SUMS": gemv.SUMS,
    "BC_GEMV_LONGEST": gemv.LONGEST,
    "BC_DECODE_WARPS": decode.WARPS,
    "BC_DECODE_IN_FLIGHT": decode.IN_FLIGHT,
    "BC_DECODE_ROW_PAD": decode.ROW_PAD,
    "BC_GEMM_ROWS": leave.ROWS,
    "BC_GEMM_PAD": leave.PAD,
    "BC_GEMM_THREADS": gemm.THREADS,
    "BC_GEMM_STAGES": gemm.STAGES,
    "BC_WGMMA_THREADS": feed.HOPPER_THREADS,
    "BC_GROUPED_WARPS": grouped.WARPS,
    "BC_GROUPED_GROUP": 4 * (grouped.RESULTS + TILE_ROWS),
    "BC_GROUPED_MANY_THREADS": grouped.MANY_THREADS,
    "BC_GROUPED_MANY_LEAST": grouped.MANY_LEAST,
    "BC_GROUPED_WGMMA_SHARED": grouped.WGMMA_SHARED,
    "BC_HEAD_THREADS": head.THREADS,
    "BC_HEAD_ROWS": head.ROWS,
    "BC_READ_THREADS": roof.THREADS,
    "BC_READ_LOADS": roof.LOADS,
}
ARGUMENTS = {
    "rows": rows.PARAMETERS,
    "fused": fused.PARAMETERS,
    "gemv": gemv.PARAMETERS,
    "decode": decode.PARAMETERS,
    "gemm": gemm.PARAMETERS,
    "grouped": grouped.PARAMETERS,
    "head_quantize": head.QUANTISE_PARAMETERS,
    "head": head.PARAMETERS,
    "read": roof.PARAMETERS,
}


@cache
def kernel_source(arch: str) -> str:
    """CUDA C of the kernels that ``arch`` (such as ``80`` or ``90a``) has."""
    chosen = [k for k in KERNELS if k.feature is None or arch.endswith(k.feature)]
    functions = {kernel.name: kernel.generate(kernel.name) for kernel in chosen}
    tokens = sorted({tile.tokens for tile in TILES}) if arch.endswith("90a") else ()
    helpers = "".join(gemm.wgmma_source(count) for count in tokens)
    if tokens:
        helpers += grouped.wgmma_source()
    residents = {kernel.name: kernel.residents for kernel in chosen if not kernel.registers}
    registers = {kernel.name: kernel.registers for kernel in chosen if kernel.registers}
    return source(functions, helpers, residents, registers)


def _tile(tile: gemm.Tile) -> tuple[str | int, ...]:
    return tile.name.upper(), tile.tokens, feed.HOPPER_THREADS, tile.shared


def header() -> str:
    """``cuda_kernels.h``: sizes, and a structure of arguments for each kind of kernel."""
    lines = ["/* Generated by targets/tir/cuda/kernels.py. */", "enum {"]
    lines += [f"  {name} = {value}," for name, value in SIZES.items()] + ["};"]
    lines += ["enum {", *(f"  {kernel.name.upper()}," for kernel in KERNELS), "};"]
    ways = [
        (
            name.upper(),
            share,
            fused.MOST_WARPS[share],
            fused.MOST_TILES[share],
            int(wide),
            int(gate),
        )
        for name, share, wide, gate in FUSED
    ]
    for name, values in (("FUSED_WAYS", ways), ("TILES", [_tile(tile) for tile in TILES])):
        numbers = ", ".join("{" + ", ".join(map(str, value)) + "}" for value in values)
        lines.append(f"#define BC_{name} {numbers}")
    for kind, parameters in ARGUMENTS.items():
        lines.append(f"typedef struct bc_{kind}_args {{")
        for name, dtype in parameters:
            c_type = {"int32": "int32_t", "float32": "float"}.get(dtype, "const void *")
            lines.append(f"  {c_type} {name};")
        lines.append(f"}} bc_{kind}_args;")
        pointers = ", ".join(f"(void *)&(a).{name}" for name, _ in parameters)
        lines.append(f"#define BC_{kind.upper()}_ARGS(a) {{{pointers}}}")
    return "\n".join(lines) + "\n"
