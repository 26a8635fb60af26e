"""fuse-rms-norm: every written form, every refusal, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.fuse_rms_norm import FuseRmsNorm
from bitcompile.passing import run
from tests.graphs import Build, input_names, node_of, ops, run_model


def written(form: str) -> ir.Model:
    b = Build()
    x = b.input("x", ["b", "s", 50])
    square = (
        b.op("Mul", x, x, name="square")
        if "product" in form
        else b.op("Pow", x, b.const("two", np.float32(2)), name="square")
    )
    mean = b.op(
        "ReduceMean", square, b.const("axes", np.array([2 if "axis2" in form else -1])),
        name="mean", shape=["b", "s", 1], keepdims=1,
    )  # fmt: skip
    eps = b.const("eps", np.float32(1e-6))
    moved = b.op("Add", *((eps, mean) if "swapped" in form else (mean, eps)), name="moved",
                 shape=["b", "s", 1])  # fmt: skip
    root = b.op("Sqrt", moved, name="root")
    if "div" in form:
        unit = b.op("Div", x, root, name="unit")
    else:
        over = b.op("Reciprocal", root, name="over")
        unit = b.op("Mul", *((over, x) if "swapped" in form else (x, over)), name="unit",
                    shape=["b", "s", 50])  # fmt: skip
    gamma = b.gamma("gamma", 50)
    y = b.op("Mul", *((unit, gamma) if "swapped" in form else (gamma, unit)), name="y",
             shape=["b", "s", 50])  # fmt: skip
    return b.model(y)


@pytest.mark.parametrize("form", ["plain", "swapped", "product", "div", "axis2", "swapped div"])
def test_forms_become_one_node_with_the_same_numbers(form: str) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 50)).astype(np.float32)}
    (expected,) = run_model(written(form), feeds)
    model = written(form)
    (record,) = run(model, [FuseRmsNorm()])
    assert (record.count, record.refusals) == (1, ())
    assert ops(model) == ["RMSNormalization"]
    norm = node_of(model, "RMSNormalization")
    assert input_names(norm) == ["x", "gamma"]
    assert norm.attributes.get_float("epsilon") == np.float32(1e-6)
    # Two roundings may differ: x * (1 / r) against x / r, and the order of the sum.
    np.testing.assert_allclose(run_model(model, feeds)[0], expected, rtol=1e-6)


def _moving_eps(b: Build, m: ir.Model) -> None:
    eps = b.input("moving", [])
    node_of(m, "Add").replace_input_with(1, eps)


def _moving_gamma(b: Build, m: ir.Model) -> None:
    tuple(m.graph)[-1].replace_input_with(0, b.input("moving", [50]))


def _other_axis(b: Build, m: ir.Model) -> None:
    node_of(m, "ReduceMean").replace_input_with(1, b.const("axis1", np.array([1])))


def _half(b: Build, m: ir.Model) -> None:
    m.graph.inputs[0].dtype = ir.DataType.FLOAT16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_moving_eps, "eps 'moving' is not a constant"),
        (_moving_gamma, "gamma 'moving' of shape (50,) is not a constant [K]"),
        (_other_axis, "the mean is over axes [1], not over the last with its dimension kept"),
        (_half, "x is FLOAT16, not float32"),
    ],
)
def test_refusals(change: Callable[[Build, ir.Model], None], reason: str) -> None:
    model = written("plain")
    b = Build()
    b.graph = model.graph
    change(b, model)
    before = ops(model)
    (record,) = run(model, [FuseRmsNorm()])
    assert [refusal.reason for refusal in record.refusals] == [reason]
    assert not record.modified
    assert ops(model) == before


def test_another_root_is_not_the_pattern() -> None:
    model = written("plain")
    node_of(model, "Pow").replace_input_with(1, model.graph.initializers["eps"])  # x ** eps
    (record,) = run(model, [FuseRmsNorm()])
    assert (record.count, record.refusals) == (0, ())
