from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError, UsageError
from bitcompile.lower import choose_layout, lower
from bitcompile.opset import DOMAIN
from bitcompile.packing import CPU_TILE
from bitcompile.targets import resolve
from tests.graphs import Build, Decoder, decoder, decoder_feeds, run_model

X86 = resolve("x86")


@pytest.mark.parametrize("group_size", [0, 16])
def test_a_lowered_model_computes_the_same(group_size: int) -> None:
    """Through the function bodies, which read each layout by its own definition."""
    config = Decoder(layers=1, group_size=group_size)
    model = decoder(config)
    before = run_model(model, decoder_feeds(config))
    lowered = lower(model, X86)
    assert lowered.layout == CPU_TILE.id
    for node in lowered.graph.graph:
        if node.domain == DOMAIN and OPS[node.op_type].weights:
            assert node.attributes["layout"].as_string() == CPU_TILE.id
    for a, b in zip(before, run_model(lowered.graph, decoder_feeds(config)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_weight_that_two_nodes_share_is_packed_once() -> None:
    b = Build()
    x = b.input("x", ["rows", 20])
    first = b.linear(x, 20, "w")
    node = first.producer()
    assert node is not None
    attributes = {name: a.value for name, a in node.attributes.items()}
    second = b.op(
        "BitLinear", first, *node.inputs[1:], name="y2", shape=["rows", 20], domain=DOMAIN,
        **attributes,
    )  # fmt: skip
    model = b.model(second)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)}
    (before,) = run_model(model, feeds)
    (after,) = run_model(lower(model, X86).graph, feeds)
    np.testing.assert_array_equal(before, after)


def test_layouts_by_family_and_id() -> None:
    for wanted in ("auto", "i2", CPU_TILE.id):
        assert choose_layout(X86, wanted) is CPU_TILE
    with pytest.raises(UsageError, match=r"target x86 has no layout 't9'; it reads i2_n16k16"):
        choose_layout(X86, "t9")


def test_a_computed_weight_is_refused() -> None:
    b = Build()
    y = b.linear(b.input("x", ["rows", 8]), 4, "w")
    node = y.producer()
    assert node is not None
    node.replace_input_with(1, b.input("w", [4, 2], ir.DataType.UINT8))
    with pytest.raises(InputError, match="computed by the graph"):
        lower(b.model(y), X86)
