"""Compute logits for the last position only."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bitcompile.passes import graph as edit
from bitcompile.passes.norms import norm_of, over_rows
from bitcompile.passing import Pass, Record, Refusal

LOGITS = "logits"
"""Name of the output that a decoder language model gives its scores by."""


class LastLogits(Pass):
    """``head(norm(h))`` -> ``head(norm(Gather(h, [-1], axis=1)))``.

    Logits ``[B, S, V]`` become ``[B, 1, V]``: prefill would else spend its time on scores that
    nobody reads. A model without an output ``logits`` is not a language model and stays. Refuses
    when the logits are not a matrix product of ``[B, S, K]`` hidden states.
    """

    name: ClassVar[str] = "last-logits"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == LOGITS), None)
        if logits is None:
            return Record(self.name, 0)
        head = edit.made_by(logits, "MatMul")
        if head is None:
            return self._refuse(f"logits come from {edit.describe(logits)}, not from a MatMul")
        norm = norm_of(head.inputs[0])
        first = norm if norm is not None and _by_position(norm) else head
        hidden = first.inputs[0]
        shape = edit.dims(hidden)
        if hidden is None or shape is None or len(shape) != 3:
            return self._refuse(f"hidden states have shape {shape}, not [batch, sequence, width]")
        if shape[1] == 1:
            return Record(self.name, 0)
        last = edit.new_node(
            graph, "Gather", [hidden, edit.array(graph, "last", [-1])], {"axis": 1}
        )
        graph.insert_before(first, last)
        last.outputs[0].type = hidden.type
        first.replace_input_with(0, last.outputs[0])
        for value in (last.outputs[0], first.outputs[0], logits):
            like = value.shape or hidden.shape
            if like is not None:
                value.shape = ir.Shape([like[0], 1, like[2]])
        return Record(self.name, 1)

    def _refuse(self, reason: str) -> Record:
        return Record(self.name, 0, (Refusal(LOGITS, reason),))


def _by_position(norm: ir.Node) -> bool:
    """Whether a norm that the head alone reads does the same to every position."""
    gamma = edit.dims(norm.inputs[1])
    alike = gamma is not None and len(gamma) == 1
    return alike and over_rows(norm) and edit.shared(norm.outputs[0]) is None
