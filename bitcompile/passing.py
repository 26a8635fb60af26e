"""What a graph pass is, and the runner that applies a list of them.

A pass edits an ``onnx_ir.Model`` in place and says what it did: how often it applied, and where it
refused and why. Between passes the runner verifies that the graph is still whole and that no
ternary weight was lost, and can write each graph as text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from bitcompile.custom_ops import OPS
from bitcompile.errors import BitcompileError, UsageError, writing
from bitcompile.opset import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

HEADS = ("q8", "q4", "float")
LOGITS = ("last", "all")


@dataclass(frozen=True)
class Options:
    """The choices that shape a graph; command-line options are named after the fields."""

    head: str = "q8"
    """Embedding and head table: 8 or 4 bits a weight, or what the target computes natively."""
    logits: str = "last"
    """Logits of the last position, or of all."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UsageError(f"unknown head {self.head!r}: choose one of {', '.join(HEADS)}")
        if self.logits not in LOGITS:
            raise UsageError(f"unknown logits {self.logits!r}: choose one of {', '.join(LOGITS)}")


@dataclass(frozen=True)
class Refusal:
    """A place that looked like a pass's pattern and was left as it is."""

    where: str
    """Name of the node."""
    reason: str


@dataclass(frozen=True)
class Record:
    """What one pass did to a model."""

    name: str
    count: int
    """How many times it applied."""
    refusals: tuple[Refusal, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return self.count > 0


class Pass(ABC):
    """One change to a graph. Its docstring says what it matches, makes, and when it refuses."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, model: ir.Model) -> Record:
        """Edit ``model`` in place."""


Match = TypeVar("Match")


class Rewrite(Pass, Generic[Match]):
    """A pass in three steps that share nothing but the match: pattern, check, rewrite."""

    @abstractmethod
    def pattern(self, node: ir.Node) -> Match | None:
        """What is matched at ``node``; None where this is not the pattern at all."""

    @abstractmethod
    def check(self, match: Match) -> str | None:
        """Why the match must be left as it is, with the value that says so; None to go on."""

    @abstractmethod
    def rewrite(self, graph: ir.Graph, match: Match) -> None:
        """Replace what was matched."""

    def apply(self, model: ir.Model) -> Record:
        """Try every node once, in graph order."""
        graph, count, refusals = model.graph, 0, []
        for node in tuple(graph):
            match = self.pattern(node) if node.graph is graph else None
            if match is None:
                continue
            reason = self.check(match)
            if reason is None:
                self.rewrite(graph, match)
                count += 1
            else:
                refusals.append(Refusal(node.name or node.op_type, reason))
        return Record(self.name, count, tuple(refusals))


def run(
    model: ir.Model, passes: Sequence[Pass], dump: Path | None = None, first: int = 1
) -> tuple[Record, ...]:
    """Apply ``passes`` to ``model`` in order, in place; the record of each.

    ``dump`` is a directory that receives ``NN-<pass>.txt`` after each pass (see :func:`listing`),
    NN counted from ``first``, and ``00-start.txt`` if ``first`` is 1. Raises BitcompileError if a
    pass breaks the graph, UsageError or ToolchainError if ``dump`` cannot be written, and what the
    passes raise.
    """
    before = _invariants(model)
    _dump(model, dump if first == 1 else None, "00-start")
    records = []
    for number, step in enumerate(passes, first):
        records.append(step.apply(model))
        _sweep(model)
        _dump(model, dump, f"{number:02d}-{step.name}")
        _verify(model, before, step.name)
    return tuple(records)


def ternary_weights(model: ir.Model) -> int:
    """Ternary weights the nodes of ``model`` multiply by; merging and fusing keep the sum."""
    total = 0
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in OPS:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        for weight in OPS[node.op_type].weights:
            rows, columns = weight.shape(attributes)
            total += rows * columns
    return total


def listing(model: ir.Model) -> str:
    """The graph as text, one line a node and no weights: made to be read and compared.

    ``output: type[shape] = Op<attributes>(inputs)``; an absent optional input is ``_``, and
    initializers that are read come first.
    """
    graph = model.graph
    lines = [f"input {_typed(value)}" for value in graph.inputs]
    lines += [f"const {_typed(value)}" for value in graph.initializers.values()]
    for node in graph:
        attributes = ", ".join(
            f"{name}={node.attributes[name].value}" for name in sorted(node.attributes)
        )
        inputs = ", ".join("_" if value is None else str(value.name) for value in node.inputs)
        outputs = ", ".join(_typed(value) for value in node.outputs)
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        lines.append(f"{outputs} = {op}{f'<{attributes}>' if attributes else ''}({inputs})")
    lines += [f"output {_typed(value)}" for value in graph.outputs]
    return "\n".join(lines) + "\n"


def _typed(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = ",".join(str(dim) for dim in value.shape) if value.shape is not None else "?"
    return f"{value.name}: {dtype}[{shape}]"


def _dump(model: ir.Model, folder: Path | None, name: str) -> None:
    if folder is None:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(listing(model), encoding="utf-8")


def _sweep(model: ir.Model) -> None:
    """Drop initializers that nothing reads any more, so that their memory can go."""
    graph = model.graph
    for name, value in tuple(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


@dataclass(frozen=True)
class _Invariants:
    """What no pass may change."""

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    ternary: int


def _invariants(model: ir.Model) -> _Invariants:
    graph = model.graph
    names = tuple(v.name for v in graph.inputs), tuple(v.name for v in graph.outputs)
    return _Invariants(*names, ternary_weights(model))


def _verify(model: ir.Model, before: _Invariants, name: str) -> None:
    """Raise BitcompileError if pass ``name`` left a graph that is not whole."""
    after = _invariants(model)
    if after != before:
        raise BitcompileError(f"pass {name} changed {before} to {after}: please report this")
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise BitcompileError(
                    f"pass {name} left {value.name!r} of node {node.name!r} without an earlier "
                    "producer: please report this"
                )
        known.update(node.outputs)
    for value in model.graph.outputs:
        if value not in known:
            raise BitcompileError(
                f"pass {name} left output {value.name!r} without a producer: please report this"
            )
