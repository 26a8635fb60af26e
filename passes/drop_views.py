"""Drop changes of shape that change nothing."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bitcompile.passes import graph as edit
from bitcompile.passing import Pass, Record

_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast")

_Atom = tuple[int, int | str, int | str]
"""Part of a source axis: (axis, how many such parts lie before it in the axis, its size)."""
_Axes = list[list[_Atom]]


class DropViews(Pass):
    """``view_n(... view_1(x))`` -> ``x`` where the views undo each other.

    A view is a Reshape, Transpose, Squeeze, Unsqueeze, Identity, or Cast to the same type: the
    exporter's ``[B,S,H*D] -> [B,S,H,D] -> [B,H,S,D] -> [B,S,H,D] -> [B,S,H*D]`` around attention.
    Each source axis is followed through the chain by the sizes of its parts. Left as they are:
    chains that move an element, whose shapes are not known, or that make an output of the model.
    """

    name: ClassVar[str] = "drop-views"

    def apply(self, model: ir.Model) -> Record:
        """Look back from every view to the farthest value it equals."""
        count = 0
        for node in tuple(model.graph):
            if node.graph is not model.graph or not _is_view(node):
                continue
            source = _equal_source(node)
            if source is not None and not node.outputs[0].is_graph_output():
                edit.redirect(model.graph, node.outputs[0], source)
                count += 1
        return Record(self.name, count)


def _is_view(node: ir.Node) -> bool:
    if node.domain or node.op_type not in _VIEWS or node.inputs[0] is None:
        return False
    if any(value is not None and value.dtype != ir.DataType.INT64 for value in node.inputs[1:]):
        return False  # no shape and no axes: not what the operator takes
    return node.op_type != "Cast" or node.inputs[0].dtype == node.outputs[0].dtype


def _equal_source(end: ir.Node) -> ir.Value | None:
    """The farthest value before ``end`` that its output equals."""
    chain = [end]
    while (source := chain[0].inputs[0]) is not None:
        before = source.producer()
        if before is None or not _is_view(before):
            break
        chain.insert(0, before)
    for start in range(len(chain)):
        if _is_identity(chain[start:]):
            return chain[start].inputs[0]
    return None


def _is_identity(chain: list[ir.Node]) -> bool:
    shape = edit.dims(chain[0].inputs[0])
    if shape is None or shape != edit.dims(chain[-1].outputs[0]):
        return all(node.op_type in ("Identity", "Cast") for node in chain)
    axes: _Axes = [[(i, 1, size)] if size != 1 else [] for i, size in enumerate(shape)]
    for node in chain:
        followed = _follow(node, axes)
        if followed is None:
            return False
        axes = followed
    return all(
        _covers(axis, i, size) for i, (axis, size) in enumerate(zip(axes, shape, strict=True))
    )


def _follow(node: ir.Node, axes: _Axes) -> _Axes | None:
    """The axes after ``node``; None if its shape does not tell."""
    if node.op_type in ("Identity", "Cast"):
        return axes
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
        return [axes[i] for i in perm] if sorted(perm) == list(range(len(axes))) else None
    target = edit.dims(node.outputs[0])
    return _regroup([atom for axis in axes for atom in axis], target) if target else None


def _regroup(atoms: list[_Atom], target: tuple[int | str, ...]) -> _Axes | None:
    """Deal ``atoms`` to axes of the sizes ``target``, splitting an atom that spans several."""
    axes: _Axes = []
    for size in target:
        axis: list[_Atom] = []
        left = size
        while left != 1:
            if not atoms:
                return None
            source, before, part = atoms.pop(0)
            if isinstance(left, str) or isinstance(part, str) or 0 in (left, part):
                if left != part:
                    return None
                left = 1
            elif left % part == 0:
                left //= part
            elif part % left == 0 and isinstance(before, int):
                atoms.insert(0, (source, before * left, part // left))
                part, left = left, 1
            else:
                return None
            axis.append((source, before, part))
        axes.append(axis)
    return axes if not atoms else None


def _covers(axis: list[_Atom], index: int, size: int | str) -> bool:
    """Whether ``axis`` is source axis ``index``, whole and in order."""
    if size == 1:
        return not axis
    if isinstance(size, str):
        return axis == [(index, 1, size)]
    before = 1
    for source, outer, part in axis:
        if source != index or outer != before or not isinstance(part, int):
            return False
        before *= part
    return before == size
