"""pack-attention: the same bits from one packed input, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.drop_views import DropViews
from bitcompile.passes.merge_projections import MergeProjections
from bitcompile.passes.pack_attention import PackAttention
from bitcompile.passing import run
from tests.graphs import (
    BITNET,
    Decoder,
    decoder,
    decoder_feeds,
    input_names,
    node_of,
    ops,
    run_model,
)

ONE = replace(BITNET, layers=1)


def merged(config: Decoder = ONE) -> ir.Model:
    model = decoder(config)
    run(model, [DropViews(), MergeProjections()])
    return model


def test_golden() -> None:
    model = merged()
    (record,) = run(model, [PackAttention()])
    assert (record.count, record.refusals) == (1, ())
    node = node_of(model, "GroupQueryAttention")
    assert input_names(node) == [
        "model.layers.0.self_attn.qkv_proj_y", None, None,
        "past_key_values.0.key", "past_key_values.0.value",
        "seqlens_k", "total_length", "cos_cache", "sin_cache",
    ]  # fmt: skip
    assert node.attributes.get_int("num_heads") == 2
    assert node.attributes.get_int("do_rotary") == 1
    assert ops(model).count("Split") == 1  # gate and up


@pytest.mark.parametrize(("tokens", "past"), [(5, 0), (1, 4)])
def test_the_same_bits(tokens: int, past: int) -> None:
    feeds = decoder_feeds(ONE, tokens, past)
    expected = run_model(merged(), feeds)
    model = merged()
    run(model, [PackAttention()])
    for got, want in zip(run_model(model, feeds), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def reason(model: ir.Model) -> str:
    (record,) = run(model, [PackAttention()])
    assert not record.modified
    assert node_of(model, "GroupQueryAttention").inputs[1] is not None
    (refusal,) = record.refusals
    return refusal.reason


def test_refuses_a_head_size_that_cannot_be_packed() -> None:
    model = merged(replace(ONE, head_size=24))
    assert reason(model) == "head size 24 is not a multiple of 16"


def test_refuses_projections_that_are_not_merged() -> None:
    model = decoder(replace(ONE, views=False))
    assert reason(model) == "query comes from BitLinear, not from a merged projection"


def test_refuses_another_order() -> None:
    model = merged()
    node = node_of(model, "GroupQueryAttention")
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)
    assert reason(model) == "query, key and value are not the 3 parts of one Split in order"


def test_refuses_parts_that_are_not_heads() -> None:
    model = merged()
    node = node_of(model, "GroupQueryAttention")
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 2)
    assert (
        reason(model) == "parts of [32, 16, 16] are not 2 query and twice 2 key heads of one size"
    )


def test_refuses_a_part_that_is_read_elsewhere() -> None:
    model = merged()
    key = node_of(model, "GroupQueryAttention").inputs[1]
    assert key is not None
    model.graph.append(ir.Node("", "Neg", [key], num_outputs=1))
    assert reason(model) == "'model.layers.0.self_attn.k_proj_y' has 2 uses"
