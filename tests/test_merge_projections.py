"""merge-projections: order of rows, equal bits, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.opset import DOMAIN
from bitcompile.passes.merge_projections import MergeProjections, joined_name
from bitcompile.passing import listing, run
from tests.graphs import Build, activation, input_names, node_of, ops, run_model

FEEDS = {"x": np.random.default_rng(3).standard_normal((2, 3, 50)).astype(np.float32)}


def siblings(
    attributes: dict[str, dict[str, Any]] | None = None, *, biased: tuple[str, ...] = ()
) -> ir.Model:
    """Three projections of one x; ``attributes`` by projection."""
    b = Build()
    x = b.input("x", ["b", "s", 50])
    parts = [
        b.linear(x, n, f"attn.{p}_proj", bias=p in biased, **(attributes or {}).get(p, {}))
        for p, n in (("q", 33), ("k", 7), ("v", 5))
    ]
    return b.model(*(b.op("Neg", part, name=f"out{i}") for i, part in enumerate(parts)))


def test_golden() -> None:
    model = siblings()
    (record,) = run(model, [MergeProjections()])
    assert (record.count, record.refusals) == (1, ())
    assert listing(model) == (
        "input x: float[b,s,50]\n"
        "const absent: float[]\n"
        "const attn.qkv_proj.weight: uint8[45,13]\n"
        "const attn.qkv_proj.weight_scale: float[45,1]\n"
        "const split_33_7_5: int64[3]\n"
        "attn.qkv_proj_y: float[b,s,45] = bitcompile::BitLinear<K=50, N=45>"
        "(x, attn.qkv_proj.weight, attn.qkv_proj.weight_scale, absent, absent)\n"
        "attn.q_proj_y: float[b,s,33], attn.k_proj_y: float[b,s,7], attn.v_proj_y: float[b,s,5]"
        " = Split<axis=-1>(attn.qkv_proj_y, split_33_7_5)\n"
        "out0: float[b,s,33] = Neg(attn.q_proj_y)\n"
        "out1: float[b,s,7] = Neg(attn.k_proj_y)\n"
        "out2: float[b,s,5] = Neg(attn.v_proj_y)\n"
        "output out0: float[b,s,33]\n"
        "output out1: float[b,s,7]\n"
        "output out2: float[b,s,5]\n"
    )


@pytest.mark.parametrize("biased", [(), ("q", "k", "v"), ("k",)])
def test_the_same_bits(biased: tuple[str, ...]) -> None:
    expected = run_model(siblings(biased=biased), FEEDS)
    model = siblings(biased=biased)
    run(model, [MergeProjections()])
    assert ops(model)[:2] == ["BitLinear", "Split"]
    for got, want in zip(run_model(model, FEEDS), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def feed_forward(up_first: bool) -> ir.Model:
    b = Build()
    x = b.input("x", ["b", "s", 50])
    gate, up = (b.linear(x, 37, f"mlp.{name}_proj") for name in ("gate", "up"))
    if up_first:  # traced the other way round
        gate, up = up, gate
    return b.model(b.op("Mul", up, activation(b, "silu", gate), name="y"))


@pytest.mark.parametrize("up_first", [False, True])
def test_gate_rows_come_before_up_rows(up_first: bool) -> None:
    expected = run_model(feed_forward(up_first), FEEDS)[0]
    model = feed_forward(up_first)
    run(model, [MergeProjections()])
    split, sigmoid = node_of(model, "Split"), node_of(model, "Sigmoid")
    assert sigmoid.inputs[0] is split.outputs[0]
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], expected)


def test_projections_of_different_users_form_groups() -> None:
    """Attention and a parallel feed-forward network read one norm."""
    b = Build()
    x = b.input("x", ["b", "s", 50])
    gate = b.linear(x, 37, "mlp.gate_proj")
    first, second = (b.linear(x, n, f"attn.{p}_proj") for p, n in (("q", 5), ("k", 7)))
    up = b.linear(x, 37, "mlp.up_proj")
    y = b.op("Mul", activation(b, "relu2", gate), up, name="y")
    model = b.model(y, first, second)
    expected = run_model(model, FEEDS)
    (record,) = run(model, [MergeProjections()])
    assert record.count == 2
    merged = [
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "BitLinear" and node.inputs[1]
    ]
    assert sorted(map(str, merged)) == ["attn.qk_proj.weight", "mlp.gate_up_proj.weight"]
    for got, want in zip(run_model(model, FEEDS), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"k": {"act_bits": 4}}, "siblings differ in act_bits: 8, 4"),
        ({"v": {"layout": "i2_n16k16"}}, "siblings differ in layout: i2, i2_n16k16"),
        ({"q": {"group_size": 32}}, "siblings differ in group_size: 32, 0"),
        (
            {p: {"layout": "i2_n16k16"} for p in "qkv"},
            "rows of layout i2_n16k16 cannot be joined, only i2",
        ),
    ],
)
def test_refusals(attributes: dict[str, dict[str, Any]], reason: str) -> None:
    model = siblings(attributes)
    (record,) = run(model, [MergeProjections()])
    assert [refusal.reason for refusal in record.refusals] == [reason]
    assert ops(model).count("BitLinear") == 3


def test_refuses_a_residual() -> None:
    model = siblings()
    node = next(n for n in model.graph if n.domain == DOMAIN)
    node.replace_input_with(4, model.graph.inputs[0])
    (record,) = run(model, [MergeProjections()])
    assert record.refusals[0].reason == "n_attn.q_proj_y already adds residual 'x'"


def test_refuses_a_weight_that_is_computed() -> None:
    model = siblings()
    b = Build()
    b.graph = model.graph
    node = next(n for n in model.graph if n.domain == DOMAIN)
    node.replace_input_with(1, b.input("w", [33, 13], ir.DataType.UINT8))
    (record,) = run(model, [MergeProjections()])
    assert record.refusals[0].reason == "the weight of n_attn.q_proj_y is not constant"


def test_a_lone_projection_is_not_the_pattern() -> None:
    b = Build()
    model = b.model(b.linear(b.input("x", ["b", 50]), 5, "one"))
    (record,) = run(model, [MergeProjections()])
    assert (record.count, record.refusals) == (0, ())


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.q_proj.w", "a.k_proj.w", "a.v_proj.w"], "a.qkv_proj.w"),
        (["m.gate_proj.w", "m.up_proj.w"], "m.gate_up_proj.w"),
        (["w1", "w3"], "w1_w3"),
        (["a.b", "c"], "a.b+c"),
        (["a.x_in", "a.x_out"], "a.x_in+x_out"),
    ],
)
def test_joined_names(names: list[str], joined: str) -> None:
    assert joined_name(names) == joined


def test_scales_are_one_a_row() -> None:
    model = siblings()
    scales = {
        str(n.inputs[2].name): n.inputs[2]
        for n in model.graph
        if n.domain == DOMAIN and n.inputs[2]
    }
    expected = np.concatenate([v.const_value.numpy() for v in scales.values() if v.const_value])
    run(model, [MergeProjections()])
    merged = node_of(model, "BitLinear")
    assert input_names(merged)[2] == "attn.qkv_proj.weight_scale"
    value = merged.inputs[2]
    assert value is not None
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), expected)
