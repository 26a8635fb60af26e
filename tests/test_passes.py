"""All passes together: a decoder layer becomes four nodes and computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes import finishing, pipeline
from bitcompile.passing import Options, run
from tests.graphs import BITNET, LLAMA, Array, Decoder, decoder, decoder_feeds, run_model

EXACT = Options(head="float", logits="all")


def built(config: Decoder, options: Options) -> ir.Model:
    model = decoder(config)
    passes = pipeline(options)
    records = run(model, passes) + run(model, finishing(), first=len(passes) + 1)
    assert [record for record in records if record.refusals] == []
    return model


def layer(model: ir.Model, index: int) -> list[str]:
    return [
        f"{node.op_type}{'+' if node.domain == 'bitcompile' and _adds(node) else ''}"
        for node in model.graph
        if node.name and node.name.startswith(f"layer.{index}.")
    ]


def _adds(node: ir.Node) -> bool:
    residual = node.inputs[-1]
    return residual is not None and not residual.is_initializer()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BITNET, ["NormBitLinear", "GroupQueryAttention", "NormBitLinear+", "BitGLU+"]),
        (LLAMA, ["NormBitLinear", "GroupQueryAttention", "BitLinear+", "BitGLU+"]),
        (
            replace(BITNET, group_size=16),
            ["NormBitLinear", "GroupQueryAttention", "NormBitLinear+", "BitGLU+"],
        ),
        (
            replace(BITNET, written_out=True, activation="gelu_tanh_written", bias=True),
            ["NormBitLinear", "GroupQueryAttention", "NormBitLinear+", "BitGLU+"],
        ),
    ],
)
def test_a_decoder_layer_is_four_nodes(config: Decoder, expected: list[str]) -> None:
    model = built(config, Options())
    assert [layer(model, i) for i in range(config.layers)] == [expected] * config.layers
    around = [n.op_type for n in model.graph if not (n.name or "").startswith("layer.")]
    assert around == [
        "ReduceSum", "Sub", "Cast", "Shape", "Cast",  # lengths, shared by all layers
        "GatherBlockQuantized", "Reshape", "Slice",
        "Gather", "RMSNormalization", "HeadLinear",
    ]  # fmt: skip


def close(got: Array, want: Array, share: float) -> None:
    """Within ``share`` of the largest value."""
    assert np.abs(got - want).max() <= share * max(1.0, float(np.abs(want).max()))


@pytest.mark.parametrize("config", [BITNET, LLAMA, replace(BITNET, group_size=16)])
@pytest.mark.parametrize(("tokens", "past"), [(5, 0), (1, 4)])
def test_parity_without_quantised_head(config: Decoder, tokens: int, past: int) -> None:
    """The norms' order of summation differs: a few integers may move by one (1/127 of a row)."""
    feeds = decoder_feeds(config, tokens, past)
    expected = run_model(decoder(config), feeds)
    got = run_model(built(config, EXACT), feeds)
    assert len(got) == len(expected) == 1 + 2 * config.layers
    for one, other in zip(got, expected, strict=True):
        close(one, other, 0.02)
        assert np.median(np.abs(one - other)) <= 1e-4


@pytest.mark.parametrize(("head", "share"), [("q8", 0.02), ("q4", 0.2)])
def test_parity_of_last_logits_with_a_quantised_head(head: str, share: float) -> None:
    feeds = decoder_feeds(BITNET)
    expected = run_model(decoder(BITNET), feeds)[0][:, -1:]
    got = run_model(built(BITNET, Options(head=head)), feeds)[0]
    assert got.shape == (1, 1, BITNET.vocab)
    close(got, expected, share)


def test_a_saved_model_loads_from_its_files(tmp_path: Path) -> None:
    """Weights that are joined on reading reach the file, and external data stays readable."""
    import onnxruntime

    model = built(BITNET, Options())
    feeds = decoder_feeds(BITNET)
    expected = run_model(model, feeds)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for got, want in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_refusal_names_the_layer() -> None:
    records = run(decoder(replace(BITNET, head_size=24)), pipeline(Options()))
    refusals = [refusal for record in records for refusal in record.refusals]
    assert [(refusal.where, refusal.reason) for refusal in refusals] == [
        (f"layer.{i}.attention", "head size 24 is not a multiple of 16") for i in range(2)
    ]
