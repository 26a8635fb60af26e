"""The OpenCL part of a plugin: every kernel's source text and the table the C host reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitcompile.target import Kernel
from bitcompile.targets.tir.opencl.schedule import Schedule, Schedules
from bitcompile.targets.tir.plugin import PROGRAMS, DeviceCode

SOURCES = ("opencl.c", "opencl_driver.c")
OFFLOADS = ("auto", "prefill", "all", "none")
"""Calls that go to the device; ``custom_ops/csrc/opencl.c`` says what auto is."""
NAMES = ("quantize", "norm_quantize", "group_sums", "gemv", "gemm", "gemv_grouped", "gemm_grouped",
         "glu_relu2", "glu_silu", "glu_gelu_tanh", "glu_gelu_erf", "head_quantize8",
         "head_quantize4", "head8", "head4", "probe")  # fmt: skip
"""The kernels, in the order of ``opencl.h``."""


@dataclass(frozen=True)
class _Made:
    """A kernel, its work-group and the part of the output that one computes."""

    function: Any
    items: tuple[int, int]
    rows: tuple[int, int] = (1, 1)


def symbol(name: str) -> str:
    """Name of a kernel in the OpenCL source."""
    return f"bc_{name}"


def kernel_table(target: str) -> tuple[Kernel, ...]:
    """The rows of a plugin's kernel table."""
    return tuple(Kernel(name, target, symbol(name)) for name in NAMES)


def device_code(target: str, schedules: Schedules, offload: str, cpu: bool) -> DeviceCode:
    """What makes a plugin run on OpenCL devices.

    ``cpu``: there are CPU kernels in the plugin, for what the device is not given or cannot do.
    """
    key = f"opencl {target} {schedules} {offload} {cpu}"
    programs = PROGRAMS if cpu else {}  # without the CPU's kernels there is nothing to choose
    return DeviceCode(SOURCES, lambda: _table(target, schedules, offload, cpu), key, programs)


def _products(schedules: Schedules) -> Iterator[tuple[str, _Made]]:
    from bitcompile.targets.tir.opencl.matmul import matmul
    from bitcompile.targets.tir.opencl.schedule import TILE_ROWS

    roles: tuple[tuple[str, Schedule], ...] = (
        ("gemv", schedules.decode),
        ("gemm", schedules.prefill),
    )
    for role, schedule in roles:
        for grouped in (False, True):
            name = f"{role}_grouped" if grouped else role
            cut = schedule.sequential() if grouped else schedule
            made = matmul(symbol(name), schedule, grouped)
            yield name, _Made(made, cut.size, (TILE_ROWS * cut.tiles, cut.activation_rows))


def _kernels(schedules: Schedules) -> dict[str, _Made]:
    from bitcompile.targets.tir.gates import GATES
    from bitcompile.targets.tir.opencl import head, probe, rows

    one_row = (rows.LANES, 1)
    made = {
        "quantize": _Made(rows.quantize(symbol("quantize")), one_row),
        "norm_quantize": _Made(rows.norm_quantize(symbol("norm_quantize")), one_row),
        "group_sums": _Made(rows.group_sums(symbol("group_sums")), one_row),
        "probe": _Made(probe.probe(symbol("probe")), one_row),
        **dict(_products(schedules)),
    }
    for activation in GATES:
        name = f"glu_{activation}"
        made[name] = _Made(rows.glu(symbol(name), activation), one_row, one_row)
    for bits in (8, 4):
        name = f"head_quantize{bits}"
        made[name] = _Made(head.head_quantize(symbol(name), bits), one_row)
        items = (head.WORDS, head.ROWS)
        made[f"head{bits}"] = _Made(head.head(symbol(f"head{bits}"), bits), items, (head.ROWS, 1))
    return {name: made[name] for name in NAMES}


def sources(schedules: Schedules) -> tuple[str, str]:
    """OpenCL C of every kernel, and of the probe alone."""
    from bitcompile.targets.tir.opencl.device import source

    functions = {symbol(name): made.function for name, made in _kernels(schedules).items()}
    probe = symbol("probe")
    return source(functions), source({probe: functions[probe]})


def _table(target: str, schedules: Schedules, offload: str, cpu: bool) -> str:
    """``device.c``."""
    whole, probe = sources(schedules)
    lines = ['#include "kernels.h"', '#include "opencl.h"', ""]
    lines.append("const Device *const bc_device = &bc_opencl_device;")
    lines.append(f"const Device *const bc_cl_cpu = {'&bc_cpu_device' if cpu else 'NULL'};")
    lines.append(f"bc_open_fn *const bc_cl_cpu_open = {'bc_cpu_open' if cpu else 'NULL'};")
    lines.append(f'const char bc_cl_target[] = "{target}";')
    lines.append(f'const char bc_cl_offload[] = "{offload}";')
    lines.append("const bc_cl_kernel bc_cl_kernels[CLK_KERNELS] = {")
    for name, made in _kernels(schedules).items():
        sizes = (f"{{{a}, {b}}}" for a, b in (made.items, made.rows))
        lines.append(f'  {{"{symbol(name)}", {", ".join(sizes)}}},')
    lines += ["};", *_text("bc_cl_source", whole), *_text("bc_cl_probe", probe), ""]
    return "\n".join(lines)


def _text(name: str, text: str) -> Iterator[str]:
    """A C array of the text's bytes (a string literal of this length is not portable C)."""
    data = text.encode("ascii") + b"\0"
    yield f"const char {name}[] = {{"
    for at in range(0, len(data), 32):
        yield "  " + ", ".join(map(str, data[at : at + 32])) + ","
    yield "};"
