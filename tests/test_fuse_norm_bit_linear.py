"""fuse-norm-bit-linear: one node for norm and projection, and every refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.fuse_norm_bit_linear import FuseNormBitLinear
from bitcompile.passing import listing, run
from tests.graphs import Build, node_of, ops, run_model

FEEDS = {"x": np.random.default_rng(6).standard_normal((2, 3, 50)).astype(np.float32)}


def normed(
    change: Callable[[Build, ir.Value], None] | None = None, *, bias: bool = True
) -> ir.Model:
    b = Build()
    h = b.norm(b.input("x", ["b", "s", 50]), "norm", eps=1e-6)
    y = b.linear(h, 33, "o_proj", bias=bias)
    if change is not None:
        change(b, h)
    return b.model(b.op("Neg", y, name="y"))


def test_golden() -> None:
    model = normed(bias=False)
    (record,) = run(model, [FuseNormBitLinear()])
    assert (record.count, record.refusals) == (1, ())
    assert [line for line in listing(model).splitlines() if "=" in line] == [
        "o_proj_y: float[b,s,33] = bitcompile::NormBitLinear"
        f"<K=50, N=33, eps={float(np.float32(1e-6))}>"
        "(x, norm.weight, o_proj.weight, o_proj.weight_scale, none, none)",
        "y: float[b,s,33] = Neg(o_proj_y)",
    ]


def test_parity() -> None:
    (expected,) = run_model(normed(), FEEDS)
    model = normed()
    run(model, [FuseNormBitLinear()])
    assert ops(model) == ["NormBitLinear", "Neg"]
    # The norm sums in another order; a value on the edge of two integers may take the other.
    (got,) = run_model(model, FEEDS)
    assert np.abs(got - expected).max() <= np.abs(expected).max() / 127
    assert np.median(np.abs(got - expected)) <= 1e-5


def _second_user(b: Build, h: ir.Value) -> None:
    b.op("Neg", h, name="second")


def _second_projection(b: Build, h: ir.Value) -> None:
    b.linear(h, 5, "second", layout="i2_n16k16")


def _output(b: Build, h: ir.Value) -> None:
    b.graph.outputs.append(h)


def _axis(b: Build, h: ir.Value) -> None:
    node = h.producer()
    assert node is not None
    node.attributes["axis"] = ir.AttrInt64("axis", 1)


def _gamma(b: Build, h: ir.Value) -> None:
    node = h.producer()
    assert node is not None
    node.replace_input_with(1, b.const("single", np.ones(1, np.float32)))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (_second_user, ["the normalised 'norm_y' has 2 uses"]),
        (_second_projection, ["the normalised 'norm_y' has 2 uses"] * 2),
        (_output, ["the normalised 'norm_y' is an output of the model"]),
        (_axis, ["RMSNormalization starts at axis 1, not at the last"]),
        (_gamma, ["the norm's weight has shape (1,), not (50,)"]),
    ],
)
def test_refusals(change: Callable[[Build, ir.Value], None], reasons: list[str]) -> None:
    model = normed(change)
    before = ops(model)
    (record,) = run(model, [FuseNormBitLinear()])
    assert [refusal.reason for refusal in record.refusals] == reasons
    assert not record.modified
    assert ops(model) == before


def test_a_last_axis_counted_from_the_front_is_the_last() -> None:
    model = normed()
    node_of(model, "RMSNormalization").attributes["axis"] = ir.AttrInt64("axis", 2)
    (record,) = run(model, [FuseNormBitLinear()])
    assert record.count == 1


def test_a_projection_without_norm_is_not_the_pattern() -> None:
    b = Build()
    model = b.model(b.linear(b.input("x", ["b", 50]), 5, "one"))
    (record,) = run(model, [FuseNormBitLinear()])
    assert (record.count, record.refusals) == (0, ())
