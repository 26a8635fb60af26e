"""fold-constants: small constants become initializers, everything else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.constants import constant_value
from bitcompile.passes.fold_constants import LIMIT, FoldConstants
from bitcompile.passing import run
from tests.graphs import Array, Build, ops, run_model

RNG = np.random.default_rng(5)
X = {"x": RNG.standard_normal((2, 6)).astype(np.float32)}
A = RNG.standard_normal((2, 6)).astype(np.float32)
NO_AXES = np.zeros(0, np.int64)
I8 = RNG.integers(-5, 5, (2, 6)).astype(np.int8)


def test_a_chain_becomes_one_constant() -> None:
    b = Build()
    x = b.input("x", ["b", 6])
    number = b.op("Cast", b.const("n", np.int64(127)), name="float", dtype=ir.DataType.FLOAT, to=1)
    flat = b.op("Reshape", number, b.const("one", np.array([1])), name="flat", shape=[1])
    model = b.model(b.op("Mul", x, b.op("Neg", flat, name="minus", shape=[1]), name="y"))
    (expected,) = run_model(model, X)
    (record,) = run(model, [FoldConstants()])
    assert (record.count, ops(model)) == (3, ["Mul"])
    np.testing.assert_array_equal(run_model(model, X)[0], expected)
    np.testing.assert_array_equal(expected, X["x"] * -127)


def left(model: ir.Model) -> list[str]:
    before = ops(model)
    (record,) = run(model, [FoldConstants()])
    assert record.count == 0
    assert ops(model) == before
    return before


def test_leaves_large_constants() -> None:
    b = Build()
    wide = b.op("Neg", b.const("w", np.zeros(LIMIT + 1, np.float32)), name="wide")
    assert left(b.model(b.op("Add", b.input("x", [LIMIT + 1]), wide, name="y"))) == ["Neg", "Add"]


def test_leaves_outputs_inputs_and_operators_it_does_not_compute() -> None:
    b = Build()
    one = b.const("one", np.ones(1, np.float32))
    default = b.const("default", np.ones(1, np.float32))
    b.graph.inputs.append(default)
    y = [b.op(op, one, name=op) for op in ("Neg", "Sin")]
    z = b.op("Abs", b.op("Neg", default, name="n"), name="z")
    assert left(b.model(*y, z)) == ["Neg", "Sin", "Neg", "Abs"]


def test_never_computes_more_than_it_reads() -> None:
    """An outer sum of two vectors is larger than both."""
    b = Build()
    column = b.const("column", np.ones((8, 1), np.float32))
    row = b.const("row", np.ones((1, 8), np.float32))
    outer = b.op("Add", column, row, name="outer", shape=[8, 8])
    assert left(b.model(b.op("Mul", b.input("x", [8, 8]), outer, name="y"))) == ["Add", "Mul"]
    assert constant_value(outer) is None


CASES: dict[str, tuple[list[Array], dict[str, Any]]] = {
    "Transpose": ([A], {}),
    "Reshape": ([A, np.array([0, -1])], {}),
    "Squeeze": ([A[None], np.array([0])], {}),
    "Unsqueeze": ([A, np.array([-1])], {}),
    "Concat": ([A, A], {"axis": -1}),
    "Clip": ([A, np.float32(-0.5), np.float32(0.25)], {}),
    "Abs": ([A], {}),
    "Sign": ([A], {}),
    "Sqrt": ([np.abs(A)], {}),
    "Round": ([np.array([0.5, 1.5, -2.5], np.float32)], {}),
    "Reciprocal": ([A], {}),
    "Sub": ([A, A[:1]], {}),
    "Div": ([A, A[:1]], {}),
    "Pow": ([A, np.float32(2)], {}),
    "Max": ([A, A[:1], np.float32(0)], {}),
    "Min": ([A, np.float32(0)], {}),
    "ReduceMax": ([A, np.array([1])], {"keepdims": 0}),
    "ReduceMean": ([A], {}),
    "ReduceSum": ([A, np.array([0])], {}),
    "ReduceMax along no axes, which means all": ([A, NO_AXES], {}),
    "ReduceSum along no axes": ([A, NO_AXES], {"keepdims": 0}),
    "ReduceMean left as it is": ([A, NO_AXES], {"noop_with_empty_axes": 1}),
    "DequantizeLinear": ([I8, np.array([0.5, 0.25], np.float32), np.array([1, 2], np.int8)],
                         {"axis": 0}),
    "DequantizeLinear in blocks": ([I8, np.abs(A[:, ::3]).copy()], {"axis": 1, "block_size": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_computes_what_onnxruntime_does(case: str) -> None:
    arrays, attributes = CASES[case]
    b = Build()
    inputs = [b.const(f"c{i}", data) for i, data in enumerate(arrays)]
    y = b.op(case.split()[0], *inputs, name="y", shape=None, dtype=ir.DataType.FLOAT, **attributes)
    got = constant_value(y)
    y.shape = None
    (expected,) = run_model(b.model(y), {})
    assert got is not None
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-6)
