"""last-logits: scores of the last position, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitcompile.passes.last_logits import LastLogits
from bitcompile.passing import run
from tests.graphs import (
    BITNET,
    Build,
    Dims,
    decoder,
    decoder_feeds,
    input_names,
    node_of,
    run_model,
)

ONE = replace(BITNET, layers=1)


def test_golden_and_parity() -> None:
    feeds = decoder_feeds(ONE)
    expected = run_model(decoder(ONE), feeds)
    model = decoder(ONE)
    (record,) = run(model, [LastLogits()])
    assert (record.count, record.refusals) == (1, ())
    norm, head = tuple(model.graph)[-4], node_of(model, "MatMul")
    gather = norm.inputs[0].producer() if norm.inputs[0] else None
    assert norm.op_type == "RMSNormalization"
    assert gather is not None
    assert gather.op_type == "Gather"
    assert input_names(gather) == ["model.layers.0.after_mlp", "last"]
    assert [str(d) for d in head.outputs[0].shape or ()] == ["batch", "1", "43"]
    got = run_model(model, feeds)
    assert got[0].shape == (1, 1, 43)
    np.testing.assert_allclose(got[0], expected[0][:, -1:], rtol=1e-5, atol=1e-5)  # BLAS order
    for cache, want in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(cache, want)


def head(shape: Dims, *, after: str = "", norm_read_twice: bool = False) -> ir.Model:
    """``logits = after(norm(x) w)``."""
    b = Build()
    h = b.norm(b.input("x", shape), "norm")
    w = b.const("w", np.ones((50, 7), np.float32))
    out = [*shape[:-1], 7]
    y = b.op("MatMul", h, w, name="scores" if after else "logits", shape=out)
    logits = b.op(after, y, name="logits") if after else y
    return b.model(logits, *([b.op("Neg", h, name="other")] if norm_read_twice else []))


def test_refuses_logits_that_are_not_a_product() -> None:
    (record,) = run(head(["b", "s", 50], after="Tanh"), [LastLogits()])
    assert record.refusals[0].reason == "logits come from Tanh, not from a MatMul"


def test_refuses_hidden_states_without_a_sequence() -> None:
    (record,) = run(head(["b", 50]), [LastLogits()])
    assert record.refusals[0].reason == (
        "hidden states have shape ('b', 50), not [batch, sequence, width]"
    )


def test_a_norm_that_is_read_twice_keeps_all_positions() -> None:
    model = head(["b", "s", 50], norm_read_twice=True)
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)}
    before = run_model(model, x)
    run(model, [LastLogits()])
    logits, other = run_model(model, x)
    np.testing.assert_allclose(logits, before[0][:, -1:], rtol=1e-5)
    np.testing.assert_array_equal(other, before[1])


def test_one_position_stays() -> None:
    (record,) = run(head(["b", 1, 50]), [LastLogits()])
    assert (record.count, record.refusals) == (0, ())


def test_a_model_without_logits_stays() -> None:
    b = Build()
    model = b.model(b.norm(b.input("x", ["b", "s", 50]), "norm"))
    (record,) = run(model, [LastLogits()])
    assert (record.count, record.refusals) == (0, ())


def test_a_norm_over_all_positions_comes_first() -> None:
    def graph() -> ir.Model:
        b = Build()
        x, gamma = b.input("x", ["b", 3, 50]), b.const("gamma", np.ones((3, 50), np.float32))
        h = b.op("RMSNormalization", x, gamma, name="norm", shape=["b", 3, 50], axis=1)
        w = b.const("w", np.eye(50, 7, dtype=np.float32))
        return b.model(b.op("MatMul", h, w, name="logits", shape=["b", 3, 7]))

    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)}
    x["x"][:, 0] *= 9
    model = graph()
    (record,) = run(model, [LastLogits()])
    assert record.count == 1
    expected = run_model(graph(), x)[0][:, -1:]
    np.testing.assert_allclose(run_model(model, x)[0], expected, rtol=1e-5)  # BLAS order
