"""The nodes of an artifact as text, for the program that measures them on a device.

A line is a node as ``custom_ops/csrc/host.h`` reads it; ``calibrate.txt`` has one for each kind of
node that the graph holds, with their number before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitcompile.custom_ops import OPS
from bitcompile.opset import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "calibrate.txt"
PROGRAM = "calibrate"
Shape = tuple[bool, Sequence[int | str], bool]
"""Of an input: whether it is uint8 (else float32), its dimensions, whether calls give it."""


def describe(op: str, attributes: Mapping[str, Any], inputs: Sequence[Shape]) -> str:
    """``BitLinear K=203 N=37 layout=... | *f32:Mx203 u8:3x13x64 f32:37x1 f32: f32:``."""
    words = [op, *(f"{name}={value}" for name, value in sorted(attributes.items())), "|"]
    for is_bytes, shape, varies in inputs:
        size = "x".join(map(str, shape))
        words.append(f"{'*' if varies else ''}{'u8' if is_bytes else 'f32'}:{size}")
    return " ".join(words)


def nodes(graph: ir.Graph, target: str, library: str) -> str:
    """``calibrate.txt`` of a lowered graph for a plugin ``library`` of ``target``."""
    lines = Counter(_line(node) for node in graph if node.domain == DOMAIN)
    return "".join(
        [f"target {target}\nlibrary {library}\n"]
        + [f"{count} {line}\n" for line, count in lines.items()]
    )


def _line(node: ir.Node) -> str:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    last = OPS[node.op_type].inputs[-1].name
    shapes: list[Shape] = []
    for place, value in zip(OPS[node.op_type].inputs, node.inputs, strict=True):
        constant = value.const_value if value is not None else None
        if constant is not None:
            shapes.append(
                (place.dtype == "uint8", tuple(int(n) for n in constant.shape.numpy()), False)
            )
        else:
            columns = attributes["N"] if place.name == last else attributes["K"]
            shapes.append((False, ("M", columns), True))
    return describe(node.op_type, attributes, shapes)
