"""Verify a finished graph."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from bitcompile.custom_ops import OPS
from bitcompile.errors import BitcompileError, InputError
from bitcompile.opset import DOMAIN, OpDef
from bitcompile.packing import layout
from bitcompile.passes import graph as edit
from bitcompile.passing import Pass, Record


class VerifyGraph(Pass):
    """Changes nothing; raises InputError when a node is not what its operator says.

    Every node of our domain: known, all its inputs and attributes present, ``[N, K]`` of each
    packed weight and its scale as its layout stores them, and a function of its name attached.
    Then the ONNX checker on the whole. That no ternary weight was lost, and no value dangles, the
    runner verifies after every pass.
    """

    name: ClassVar[str] = "verify-graph"

    def apply(self, model: ir.Model) -> Record:
        """See the class."""
        for node in model.graph:
            if node.domain != DOMAIN:
                continue
            op = OPS.get(node.op_type)
            if op is None or (DOMAIN, node.op_type, "") not in model.functions:
                raise InputError(
                    f"{node.name}: operator {node.op_type} has no function: attach it first"
                )
            _verify_weights(node, op)
        try:
            common.CheckerPass()(model)
        except Exception as error:
            first = str(error.__cause__ or error).strip().splitlines()[0]
            raise BitcompileError(f"the ONNX checker refuses the graph: {first}") from error
        return Record(self.name, 0)


def _verify_weights(node: ir.Node, op: OpDef) -> None:
    attributes = op.complete(edit.attributes(node))
    inputs = op.named(node.inputs)
    for weight in op.weights:
        N, K = weight.shape(attributes)
        chosen = layout(str(attributes["layout"]))
        scales = chosen.scale_shape(N, K, int(attributes["group_size"]))
        for name, wanted in ((weight.data, chosen.shape(N, K)), (weight.scale, scales)):
            if edit.dims(inputs[name]) != wanted:
                raise InputError(
                    f"{node.name}: {name} has shape {edit.dims(inputs[name])}; with layout "
                    f"{attributes['layout']} of [{N}, {K}] it is {wanted}"
                )
