"""verify-graph: a finished graph passes, each kind of damage is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.errors import BitcompileError, InputError
from bitcompile.passes import finishing, pipeline
from bitcompile.passes.verify_graph import VerifyGraph
from bitcompile.passing import Options, listing, run
from tests.graphs import BITNET, LLAMA, Decoder, decoder, node_of


def finished(config: Decoder = BITNET) -> ir.Model:
    model = decoder(config)
    run(model, [*pipeline(Options()), *finishing()])
    return model


@pytest.mark.parametrize("config", [BITNET, LLAMA])
def test_a_finished_graph_passes_unchanged(config: Decoder) -> None:
    model = finished(config)
    before = listing(model)
    (record,) = run(model, [VerifyGraph()])
    assert (record.modified, record.refusals) == (False, ())
    assert listing(model) == before


def _set(m: ir.Model, op: str, index: int, data: np.ndarray) -> None:
    node = next(n for n in m.graph if n.op_type == op)
    value = node.inputs[index]
    assert value is not None
    value.const_value = ir.tensor(data)
    value.shape = ir.Shape(data.shape)


def _weight(m: ir.Model) -> None:
    _set(m, "NormBitLinear", 2, np.zeros((3, 13), np.uint8))


def _scale(m: ir.Model) -> None:
    _set(m, "BitGLU", 6, np.zeros((50, 2), np.float32))


def _inputs(m: ir.Model) -> None:
    node = next(n for n in m.graph if n.op_type == "NormBitLinear")
    node.resize_inputs(5)


def _attribute(m: ir.Model) -> None:
    node = next(n for n in m.graph if n.op_type == "BitGLU")
    del node.attributes["activation"]


def _function(m: ir.Model) -> None:
    del m.functions[("bitcompile", "HeadLinear", "")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _weight,
            r"layer.0.qkv: w has shape \(3, 13\); with layout i2 of \[64, 50\] it is \(64, 13\)",
        ),
        (_scale, r"layer.0.ffn: s_down has shape \(50, 2\); with layout .* it is \(50, 1\)"),
        (_inputs, "NormBitLinear takes 6 inputs, not 5"),
        (_attribute, "BitGLU: attribute 'activation' is required"),
        (_function, "head: operator HeadLinear has no function: attach it first"),
    ],
)
def test_damage(damage: Callable[[ir.Model], None], message: str) -> None:
    model = finished()
    damage(model)
    with pytest.raises(InputError, match=message):
        run(model, [VerifyGraph()])


def test_what_the_onnx_checker_refuses() -> None:
    model = finished()
    node_of(model, "RMSNormalization").attributes["axle"] = ir.AttrInt64("axle", 1)
    with pytest.raises(BitcompileError, match=r"the ONNX checker refuses the graph: .*axle"):
        run(model, [VerifyGraph()])
