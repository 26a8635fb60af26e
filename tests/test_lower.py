from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError, UsageError
from bitcompile.lower import choose_layout, lower
from bitcompile.opset import DOMAIN
from bitcompile.packing import CPU_TILE, T5_TILE, Layout
from bitcompile.targets import resolve, x86
from tests.graphs import Build, Decoder, decoder, decoder_feeds, run_model

X86 = resolve("x86")


@pytest.mark.parametrize(("group_size", "tile"), [(0, CPU_TILE), (16, CPU_TILE), (0, T5_TILE)])
def test_a_lowered_model_computes_the_same(group_size: int, tile: Layout) -> None:
    """Through the function bodies, which read each layout by its own definition."""
    config = Decoder(layers=1, group_size=group_size)
    model = decoder(config)
    before = run_model(model, decoder_feeds(config))
    lowered = lower(model, X86, tile.id)
    assert lowered.layout == tile.id
    for node in lowered.graph.graph:
        if node.domain == DOMAIN and OPS[node.op_type].weights:
            assert node.attributes["layout"].as_string() == tile.id
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
    for wanted, tile in (("i2", CPU_TILE), (CPU_TILE.id, CPU_TILE), ("t5", T5_TILE)):
        assert choose_layout(X86, wanted) == (tile, "asked for")
    with pytest.raises(UsageError, match=r"target x86 has no layout 't9'; it reads i2_n16k16"):
        choose_layout(X86, "t9")
    with pytest.raises(UsageError, match="t5_n16k20 cannot hold a scale per 64 columns: build"):
        choose_layout(X86, "t5", 0, {0, 64})


@pytest.mark.parametrize(
    ("flags", "cache", "tile", "reason"),
    [
        (x86.T5_NEEDS, 32 << 20, T5_TILE, "64 MiB of weights exceed the 32 MiB"),
        (x86.T5_NEEDS, 64 << 20, CPU_TILE, "64 MiB of weights fit the 64 MiB"),
        ({"avx2"}, 32 << 20, CPU_TILE, "AVX-512 VBMI and VNNI, which this CPU has not"),
    ],
)
def test_auto_takes_t5_where_weights_come_from_memory(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], cache: int, tile: Layout, reason: str
) -> None:
    monkeypatch.setattr(x86, "cpu_flags", lambda: flags)
    monkeypatch.setattr(x86, "last_level_cache", lambda: cache)
    chosen, why = choose_layout(X86, "auto", 64 << 20)
    assert chosen is tile
    assert reason in why


def test_auto_keeps_i2_for_group_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "cpu_flags", lambda: x86.T5_NEEDS)
    monkeypatch.setattr(x86, "last_level_cache", lambda: 0)
    chosen, why = choose_layout(X86, "auto", 64 << 20, {32})
    assert chosen is CPU_TILE
    assert why == "t5_n16k20 cannot hold a scale per 32 columns"


def test_a_computed_weight_is_refused() -> None:
    b = Build()
    y = b.linear(b.input("x", ["rows", 8]), 4, "w")
    node = y.producer()
    assert node is not None
    node.replace_input_with(1, b.input("w", [4, 2], ir.DataType.UINT8))
    with pytest.raises(InputError, match="computed by the graph"):
        lower(b.model(y), X86)
