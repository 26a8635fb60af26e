"""The ONNX domain ``bitcompile``, version 1: how one operator is described.

The operators themselves live in ``custom_ops/``, one file each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitcompile.errors import InputError

DOMAIN = "bitcompile"
VERSION = 1
ONNX_OPSET = 23
"""Opset of the graphs we write: the first with RMSNormalization."""
IR_VERSION = 11
MIN_ONNXRUNTIME = "1.23"
"""First ONNX Runtime with opset 23 and the packed, rotary GroupQueryAttention our graphs use."""
ORT_API = 17
"""The ONNX Runtime C API version a plugin asks for."""

Attribute = int | float | str
Shape = Sequence[Any]


@dataclass(frozen=True)
class Input:
    """One input: its name, ONNX element type and meaning (with shape)."""

    name: str
    dtype: str
    doc: str
    optional: bool = False
    """A rank-0 zero stands for "absent" (omitted inputs break function bodies)."""


@dataclass(frozen=True)
class Weight:
    """One ternary weight of an operator: its inputs, and the attributes that give its shape."""

    data: str
    """Input with the packed weight."""
    scale: str
    """Input with its scales, float32 ``[N, 1]``."""
    rows: str
    columns: str

    def shape(self, attributes: Mapping[str, Any]) -> tuple[int, int]:
        """``(N, K)`` in a node with these attributes."""
        return int(attributes[self.rows]), int(attributes[self.columns])


@dataclass(frozen=True)
class OpDef:
    """One operator: schema, meaning, export and portable fallback in one value.

    ``reference(inputs, attributes)`` computes it in NumPy; ``output_shape(input shapes,
    attributes)`` gives the shape of its one float32 output; ``body(attributes)`` is the ONNX text
    of the model-local function that computes it without the plugin (see ``onnx.parser``).
    ``structural`` names the attributes on which the text of the body depends.
    """

    name: str
    doc: str
    inputs: tuple[Input, ...]
    attributes: Mapping[str, Attribute | None]
    """Name to default; None where the node must give a value."""
    reference: Callable[[Mapping[str, Any], Mapping[str, Attribute]], Any]
    output_shape: Callable[[Mapping[str, Shape], Mapping[str, Attribute]], Shape]
    body: Callable[[Mapping[str, Attribute]], str]
    structural: tuple[str, ...] = ()
    weights: tuple[Weight, ...] = ()

    def complete(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """``attributes`` with defaults filled in.

        Raises InputError for an unknown or missing one.
        """
        unknown = set(attributes) - set(self.attributes)
        if unknown:
            raise InputError(f"{self.name}: unknown attribute {sorted(unknown)[0]!r}")
        merged = {**self.attributes, **attributes}
        missing = [name for name, value in merged.items() if value is None]
        if missing:
            raise InputError(f"{self.name}: attribute {missing[0]!r} is required")
        return {name: value for name, value in merged.items() if value is not None}

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """Input name to value; raises InputError unless there is one value per input."""
        if len(values) != len(self.inputs):
            raise InputError(
                f"{self.name} takes {len(self.inputs)} inputs, not {len(values)}: "
                "absent ones are rank-0 zeros"
            )
        return {i.name: value for i, value in zip(self.inputs, values, strict=True)}

    def symbolic(self, *values: Any, **attributes: Attribute) -> Any:
        """The operator as one node while ``torch.onnx.export`` traces; returns a torch tensor."""
        import torch

        merged = self.complete(attributes)
        shapes = {name: value.shape for name, value in self.named(values).items()}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.name}",
            values,
            merged,
            dtype=torch.float32,
            shape=tuple(self.output_shape(shapes, merged)),
            version=VERSION,
        )


def is_absent(value: Any) -> bool:
    """Whether an array given for an optional input is the rank-0 zero that means "absent"."""
    return value.ndim == 0 and not value.any()
