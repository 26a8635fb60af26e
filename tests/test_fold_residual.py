"""fold-residual: the same bits with the sum inside, and every refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.fold_residual import FoldResidual
from bitcompile.passes.fuse_glu import FuseGlu
from bitcompile.passes.fuse_norm_bit_linear import FuseNormBitLinear
from bitcompile.passes.merge_projections import MergeProjections
from bitcompile.passing import Pass, run
from tests.graphs import Build, Dims, activation, input_names, ops, run_model

RNG = np.random.default_rng(8)
FEEDS = {
    "x": RNG.standard_normal((2, 3, 50)).astype(np.float32),
    "r": RNG.standard_normal((2, 3, 33)).astype(np.float32),
}


def summed(
    *,
    swapped: bool = False,
    r_shape: Dims = ("b", "s", 33),
    normed: bool = False,
    bias: bool = True,
) -> ir.Model:
    b = Build()
    x, r = b.input("x", ["b", "s", 50]), b.input("r", r_shape)
    y = b.linear(b.norm(x, "norm") if normed else x, 33, "o", bias=bias)
    late = b.op("Neg", r, name="late")  # computed after y
    total = b.op("Add", *((y, late) if swapped else (late, y)), name="total", shape=["b", "s", 33])
    return b.model(b.op("Neg", total, name="out"))


def glu() -> ir.Model:
    b = Build()
    x, r = b.input("x", ["b", "s", 50]), b.input("r", ["b", "s", 33])
    h = b.norm(x, "norm")
    gate, up = (b.linear(h, 37, name) for name in ("gate_proj", "up_proj"))
    y = b.linear(b.op("Mul", activation(b, "relu2", gate), up, name="hidden"), 33, "down")
    return b.model(b.op("Add", r, y, name="out"))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bit_linear(swapped: bool, bias: bool) -> None:
    (expected,) = run_model(summed(swapped=swapped, bias=bias), FEEDS)
    model = summed(swapped=swapped, bias=bias)
    (record,) = run(model, [FoldResidual()])
    assert (record.count, record.refusals) == (1, ())
    assert ops(model) == ["Neg", "BitLinear", "Neg"]
    folded = model.graph[1]
    assert input_names(folded)[4] == "late"
    assert folded.outputs[0].name == "total"
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], expected)


@pytest.mark.parametrize(
    ("make", "before", "op"),
    [
        (lambda: summed(normed=True), [FuseNormBitLinear()], "NormBitLinear"),
        (glu, [MergeProjections(), FuseGlu()], "BitGLU"),
    ],
)
def test_other_operators(make: Callable[[], ir.Model], before: list[Pass], op: str) -> None:
    reference, model = make(), make()
    run(reference, before)
    run(model, [*before, FoldResidual()])
    assert "Add" not in ops(model)
    assert op in ops(model)
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], run_model(reference, FEEDS)[0])


def test_a_parallel_block_folds_both_sums() -> None:
    """x + attention + feed-forward network, of which either could take the other."""

    def graph() -> ir.Model:
        b = Build()
        x, r = b.input("x", ["b", "s", 50]), b.input("r", ["b", "s", 33])
        one, two = b.linear(x, 33, "one"), b.linear(x, 33, "two")
        return b.model(b.op("Add", r, b.op("Add", one, two, name="both"), name="out"))

    model = graph()
    (record,) = run(model, [FoldResidual()])
    assert (record.count, ops(model)) == (1, ["BitLinear", "BitLinear", "Add"])
    assert len(record.refusals) == 1  # the sum has its residual
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], run_model(graph(), FEEDS)[0])


def reason(model: ir.Model) -> str:
    before = ops(model)
    (record,) = run(model, [FoldResidual()])
    assert ops(model) == before
    (refusal,) = record.refusals
    return refusal.reason


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((33,), "shapes (33,) and ('b', 's', 33) are not known to be equal"),
        (("b", 1, 33), "shapes ('b', 1, 33) and ('b', 's', 33) are not known to be equal"),
        (("b", None, 33), "shapes None and ('b', 's', 33) are not known to be equal"),
    ],
)
def test_refuses_a_broadcast(shape: Dims, text: str) -> None:
    assert reason(summed(r_shape=shape)) == text


def test_refuses_a_second_reader() -> None:
    model = summed()
    y = model.graph[0].outputs[0]
    model.graph.outputs.append(y)
    assert reason(model) == "'o_y' is an output of the model"


def test_refuses_a_value_added_to_itself() -> None:
    b = Build()
    y = b.linear(b.input("x", ["b", 50]), 33, "o")
    assert reason(b.model(b.op("Add", y, y, name="out"))) == "'o_y' has 2 uses"


def test_refuses_a_second_residual() -> None:
    b = Build()
    x, r = b.input("x", ["b", 50]), b.input("r", ["b", 33])
    y = b.linear(x, 33, "o", residual=r)
    assert reason(b.model(b.op("Add", r, y, name="out"))) == "'o_y' already has residual 'r'"
