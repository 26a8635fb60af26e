"""name-nodes: names say where in the model a node stands, and are unique."""

from __future__ import annotations

import onnx_ir as ir

from bitcompile.passes import pipeline
from bitcompile.passes.name_nodes import NameNodes
from bitcompile.passing import Options, run
from tests.graphs import BITNET, LLAMA, Build, decoder, decoder_feeds, run_model


def names(model: ir.Model) -> list[str | None]:
    run(model, [NameNodes()])
    return [node.name for node in model.graph]


def test_a_fused_decoder() -> None:
    model = decoder(BITNET)
    run(model, pipeline(Options()))
    assert [name for name in names(model) if name and name.startswith("layer.1")] == [
        "layer.1.qkv",
        "layer.1.attention",
        "layer.1.o",
        "layer.1.ffn",
    ]
    assert {"embed", "norm", "head"} <= set(names(model))
    run_model(model, decoder_feeds(BITNET))


def test_an_unfused_decoder() -> None:
    found = names(decoder(LLAMA))
    assert {"layer.0.q", "layer.0.gate", "layer.1.down", "layer.0.attention"} <= set(found)
    assert len(set(found)) == len(found)


def test_a_taken_name_gets_a_number_and_interface_names_stay() -> None:
    b = Build()
    x = b.input("neg", ["b"])
    model = b.model(b.op("Neg", b.op("Neg", x, name="a"), name="out"))
    assert names(model) == ["neg.2", "neg.3"]
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["neg", "out"]
    assert model.graph[0].outputs[0].name == "neg.2"
