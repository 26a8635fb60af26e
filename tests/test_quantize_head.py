"""quantize-head: one table for embedding and head, its values, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.errors import InputError
from bitcompile.numerics import quantize_table, table_codes
from bitcompile.passes import quantize_head
from bitcompile.passes.quantize_head import QuantizeHead
from bitcompile.passing import run
from tests.graphs import Array, Build, input_names, node_of, ops, run_model

IDS = {"input_ids": np.array([[3, 0, 10], [10, 10, 4]])}
V = 11


def table(K: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((V, K)).astype(np.float32)


def language_model(K: int, *, tied: bool = True, bfloat16: bool = False) -> ir.Model:
    """``logits = -embedding(ids) @ head.T``; the embedding is an output too."""
    b = Build()
    ids = b.input("input_ids", ["b", "s"], ir.DataType.INT64)
    tables = [
        b.const(name, data.astype(ml_dtypes.bfloat16) if bfloat16 else data)
        for name, data in (("embed.weight", table(K)), ("head.weight", table(K, 1)))
    ]
    embed, head = tables[0], tables[0 if tied else 1]
    x = b.op("Gather", embed, ids, name="rows", shape=["b", "s", K], axis=0)
    if bfloat16:
        x = b.op("Cast", x, name="rows_float", dtype=ir.DataType.FLOAT, to=1)
        head = b.op("Cast", head, name="head_float", dtype=ir.DataType.FLOAT, to=1)
    w = b.op("Transpose", head, name="head_t", shape=[K, V], perm=[1, 0])
    x = b.op("Neg", x, name="embedded")
    return b.model(b.op("MatMul", x, w, name="logits", shape=["b", "s", V]), x)


def test_golden_tied() -> None:
    model = language_model(300)
    (record,) = run(model, [QuantizeHead("q8")])
    assert (record.count, record.refusals) == (2, ())
    assert ops(model) == ["GatherBlockQuantized", "Reshape", "Slice", "Neg", "HeadLinear"]
    gather, head = node_of(model, "GatherBlockQuantized"), node_of(model, "HeadLinear")
    assert input_names(gather) == ["embed.weight.q8", "input_ids", "embed.weight.scale"]
    assert input_names(head) == ["embedded", "embed.weight.q8", "embed.weight.scale"]
    constants = {name: list(v.shape or ()) for name, v in model.graph.initializers.items()}
    assert constants["embed.weight.q8"] == [V, 3, 128]
    assert constants["embed.weight.scale"] == [V, 3, 1]
    assert "embed.weight" not in constants


@pytest.mark.parametrize("K", [128, 50, 300])
@pytest.mark.parametrize("head", ["q8", "q4"])
@pytest.mark.parametrize("tied", [True, False])
def test_values(K: int, head: str, tied: bool) -> None:
    """The embedding is (code - zero) * scale exactly; logits are its product with the table."""
    bits = int(head[1:])
    model = language_model(K, tied=tied, bfloat16=True)
    run(model, [QuantizeHead(head)])
    assert ops(model).count("Slice") == int(K % 128 != 0)
    logits, x = run_model(model, IDS)
    values = []
    for seed in (0, 0 if tied else 1):
        stored = table(K, seed).astype(ml_dtypes.bfloat16).astype(np.float32)
        codes, scale = quantize_table(stored, bits, 128)
        values.append((table_codes(codes, bits) * scale).reshape(V, -1)[:, :K])
    np.testing.assert_array_equal(x, -values[0].astype(np.float32)[IDS["input_ids"]])
    # The head quantises x to 15 bits: half a step of 1/16256 in each of K products.
    bound = 0.5 / 16256 * np.abs(x).max() * np.abs(values[1]).sum(axis=1).max() + 1e-4
    assert np.abs(logits - x @ values[1].T).max() <= bound


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_float(tied: bool, bfloat16: bool) -> None:
    before = run_model(language_model(50, tied=tied, bfloat16=bfloat16), IDS)
    model = language_model(50, tied=tied, bfloat16=bfloat16)
    (record,) = run(model, [QuantizeHead("float")])
    assert record.count == 2
    assert ops(model) == ["Gather", "Neg", "FusedMatMul"]
    tables = {node_of(model, "Gather").inputs[0], node_of(model, "FusedMatMul").inputs[1]}
    assert len(tables) == (1 if tied else 2)
    for got, want in zip(run_model(model, IDS), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_stored_transposed() -> None:
    def graph() -> ir.Model:
        b = Build()
        x = b.input("x", ["b", 50])
        w = b.const("head.weight", np.ascontiguousarray(table(50).T))
        return b.model(b.op("MatMul", x, w, name="logits", shape=["b", V]))

    x = {"x": np.random.default_rng(2).standard_normal((3, 50)).astype(np.float32)}
    (expected,) = run_model(graph(), x)
    for head, tolerance in (("float", 1e-4), ("q8", 0.2)):
        model = graph()
        run(model, [QuantizeHead(head)])
        assert np.abs(run_model(model, x)[0] - expected).max() <= tolerance


@pytest.mark.parametrize("perm", [None, [0, 1], [1, 0]])
@pytest.mark.parametrize("head", ["float", "q8"])
def test_a_square_table_is_read_each_way(perm: list[int] | None, head: str) -> None:
    """By the embedding as rows, by the head as it lies or behind a Transpose."""

    def graph() -> ir.Model:
        b = Build()
        ids = b.input("input_ids", ["b", "s"], ir.DataType.INT64)
        w = b.const("table", np.random.default_rng(3).standard_normal((128, 128)).astype("f4"))
        h = b.op("Gather", w, ids, name="embed", shape=["b", "s", 128])
        if perm is not None:
            w = b.op("Transpose", w, name="turned", shape=[128, 128], perm=perm)
        return b.model(b.op("MatMul", h, w, name="logits", shape=["b", "s", 128]))

    ids = {"input_ids": np.arange(6).reshape(2, 3)}
    (expected,) = run_model(graph(), ids)
    model = graph()
    (record,) = run(model, [QuantizeHead(head)])
    assert record.count == 2
    limit = 1e-3 if head == "float" else 1  # eight bits a weight, of logits up to 35
    assert np.abs(run_model(model, ids)[0] - expected).max() < limit


def test_a_table_that_is_cut_to_integers_stays() -> None:
    b = Build()
    w = b.const("table", np.full((V, 50), 1.5, np.float32))
    whole = b.op("Cast", w, name="whole", shape=[V, 50], dtype=ir.DataType.INT32, to=6)
    back = b.op("Cast", whole, name="back", shape=[V, 50], to=1)
    ids = b.input("input_ids", ["b", "s"], ir.DataType.INT64)
    model = b.model(b.op("Gather", back, ids, name="embed", shape=["b", "s", 50]))
    (record,) = run(model, [QuantizeHead("q8")])
    assert (record.count, len(record.refusals)) == (0, 1)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    held = ir.tensor(table(300))
    value = ir.Value(name="t", const_value=held)
    whole = quantize_head.quantize_rows(quantize_head.Table(value, held), 4)
    monkeypatch.setattr(quantize_head, "_CHUNK", 700)  # two rows at a time, and one left over
    parts = quantize_head.quantize_rows(quantize_head.Table(value, held), 4)
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_array_equal(parts[1], whole[1])


def test_refuses_a_head_that_is_not_a_product() -> None:
    b = Build()
    model = b.model(b.op("Neg", b.input("x", ["b", V]), name="logits"))
    (record,) = run(model, [QuantizeHead("q8")])
    assert record.refusals[0].reason == "logits come from Neg, not from a MatMul"


def test_refuses_a_weight_that_is_computed() -> None:
    b = Build()
    x, w = b.input("x", ["b", 50]), b.input("w", [50, V])
    model = b.model(b.op("MatMul", x, w, name="logits", shape=["b", V]))
    (record,) = run(model, [QuantizeHead("q8")])
    assert record.refusals[0].reason == "head weight 'w' is not a constant matrix"


def test_refuses_an_embedding_that_is_used_in_its_own_type() -> None:
    b = Build()
    ids = b.input("input_ids", ["b", "s"], ir.DataType.INT64)
    rows = b.op("Gather", b.const("t", table(50).astype(ml_dtypes.bfloat16)), ids, name="rows",
                shape=["b", "s", 50], axis=0)  # fmt: skip
    model = b.model(b.op("Neg", rows, name="y"))
    (record,) = run(model, [QuantizeHead("q8")])
    assert record.refusals[0].reason == "the embedding is used as BFLOAT16 by Neg"


def test_other_gathers_stay() -> None:
    b = Build()
    other = b.input("positions", ["b", "s"], ir.DataType.INT64)
    rows = b.op("Gather", b.const("t", table(50)), other, name="y", shape=["b", "s", 50], axis=0)
    (record,) = run(b.model(rows), [QuantizeHead("q8")])
    assert (record.count, record.refusals) == (0, ())


def test_a_damaged_table_is_an_input_error() -> None:
    model = language_model(50)
    value = model.graph.initializers["embed.weight"]
    damaged = table(50)
    damaged[7, 3] = np.nan
    value.const_value = ir.tensor(damaged)
    with pytest.raises(InputError, match=r"table 'embed.weight' holds NaN or Inf"):
        run(model, [QuantizeHead("q8")])


def test_options_name_the_heads() -> None:
    from bitcompile.errors import UsageError
    from bitcompile.passing import Options

    with pytest.raises(UsageError, match="unknown head 'q3': choose one of q8, q4, float"):
        replace(Options(), head="q3")
    with pytest.raises(UsageError, match="unknown logits 'first': choose one of last, all"):
        replace(Options(), logits="first")
