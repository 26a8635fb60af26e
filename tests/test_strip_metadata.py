"""strip-metadata: nothing of the exporter is left, and the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitcompile.passes.strip_metadata import StripMetadata
from bitcompile.passing import listing, run
from tests.graphs import Build, run_model


def noisy() -> ir.Model:
    b = Build()
    x = b.input("x", ["b", 50])
    y = b.linear(x, 5, "lin")
    b.op("Neg", y, name="dead")
    b.const("unused", np.ones(3, np.float32))
    zero = b.const("another_zero", np.float32(0))
    node = y.producer()
    assert node is not None
    node.replace_input_with(3, zero)
    model = b.model(b.op("Neg", y, name="y"))
    model.graph.opset_imports["pkg.unused"] = 1
    for thing in (model, model.graph, node, y, x, zero.const_value):
        assert thing is not None
        thing.metadata_props["pkg.torch.stack_trace"] = "/home/somebody/model.py"
        thing.doc_string = "a note"
    model.producer_name, model.producer_version = "pytorch", "2"
    return model


def test_nothing_of_the_exporter_is_left() -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)}
    (expected,) = run_model(noisy(), x)
    model = noisy()
    (record,) = run(model, [StripMetadata()])
    assert record.modified
    text = str(ir.to_proto(model))
    for trace in ("somebody", "a note", "pytorch", "pkg.unused", "another_zero", "unused", "dead"):
        assert trace not in text
    assert model.producer_name == "bitcompile"
    np.testing.assert_array_equal(run_model(model, x)[0], expected)


def test_a_clean_graph_stays() -> None:
    model = noisy()
    run(model, [StripMetadata()])
    before = listing(model)
    (record,) = run(model, [StripMetadata()])
    assert not record.modified
    assert listing(model) == before
