"""attach-functions: a finished graph runs in plain onnxruntime; what cannot be attached says so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError
from bitcompile.opset import DOMAIN
from bitcompile.packing import CPU_TILE, PORTABLE, PackedTernary
from bitcompile.passes import graph as edit
from bitcompile.passes import pipeline
from bitcompile.passes.attach_functions import AttachFunctions
from bitcompile.passing import Options, run
from tests.graphs import BITNET, LLAMA, Build, Decoder, decoder, run_model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BITNET, {"NormBitLinear", "BitGLU", "BitLinear", "HeadLinear"}),
        (LLAMA, {"NormBitLinear", "BitGLU", "BitLinear", "HeadLinear"}),
    ],
)
def test_functions_of_a_decoder(config: Decoder, expected: set[str]) -> None:
    model = decoder(config)
    run(model, [*pipeline(Options()), AttachFunctions()])
    assert {name for domain, name, _ in model.functions if domain == DOMAIN} == expected


def test_defaults_are_written_out() -> None:
    b = Build()
    model = b.model(b.linear(b.input("x", ["b", 50]), 5, "lin"))
    run(model, [AttachFunctions()])
    attributes = {name: attr.value for name, attr in model.graph[0].attributes.items()}
    assert attributes == {"K": 50, "N": 5, "layout": "i2", "group_size": 0, "act_bits": 8}


def test_the_function_computes_the_reference() -> None:
    b = Build()
    x = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    model = b.model(b.linear(b.input("x", ["b", 50]), 33, "lin", bias=True))
    stored = [edit.constant(value) for value in model.graph[0].inputs]
    values = [tensor.numpy() if tensor is not None else x for tensor in stored]
    op = OPS["BitLinear"]
    expected = op.reference(op.named(values), op.complete({"K": 50, "N": 33}))
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], expected)


def test_another_layout() -> None:
    b = Build()
    x = {"x": np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)}
    model = b.model(b.linear(b.input("x", ["b", 50]), 33, "lin"))
    (expected,) = run_model(model, x)
    weight = model.graph.initializers["lin.weight"]
    assert weight.const_value is not None
    portable = PackedTernary(
        weight.const_value.numpy(), np.ones((33, 1), np.float32), PORTABLE, (33, 50)
    )
    weight.const_value = ir.tensor(portable.to(CPU_TILE).data)
    weight.shape = ir.Shape(weight.const_value.shape.numpy())
    model.graph[0].attributes["layout"] = ir.AttrString("layout", CPU_TILE.id)
    np.testing.assert_array_equal(run_model(model, x)[0], expected)


def test_two_forms_of_one_operator_are_refused() -> None:
    b = Build()
    x = b.input("x", ["b", 50])
    model = b.model(b.linear(x, 5, "one"), b.linear(x, 5, "two", layout="i2_n16k16"))
    with pytest.raises(InputError, match="nodes of BitLinear differ in layout: i2 and i2_n16k16"):
        run(model, [AttachFunctions()])


def test_a_form_that_another_operator_calls_is_refused_too() -> None:
    model = decoder(LLAMA)
    run(model, pipeline(Options()))
    glu = next(node for node in model.graph if node.op_type == "BitGLU")
    glu.attributes["layout"] = ir.AttrString("layout", "i2_n16k16")
    with pytest.raises(InputError, match="differ in layout"):
        run(model, [AttachFunctions()])


def test_an_unknown_operator_is_refused() -> None:
    b = Build()
    model = b.model(b.op("BitConv", b.input("x", ["b"]), name="y", domain=DOMAIN))
    with pytest.raises(InputError, match="unknown operator bitcompile::BitConv; known: BitLinear"):
        run(model, [AttachFunctions()])


def test_nothing_to_attach() -> None:
    b = Build()
    model = b.model(b.op("Neg", b.input("x", ["b"]), name="y"))
    (record,) = run(model, [AttachFunctions()])
    assert not record.modified
