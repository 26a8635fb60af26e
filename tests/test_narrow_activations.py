from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile import passing
from bitcompile.errors import InputError
from bitcompile.passes import finishing, pipeline
from bitcompile.passes.narrow_activations import NarrowActivations
from tests.graphs import Build, Decoder, decoder

CONFIG = Decoder(hidden=64, ffn=96, vocab=64, context=32, heads=4, kv_heads=2)


def narrowed(head: str, activations: str = "float16") -> ir.Model:
    model = decoder(CONFIG)
    passing.run(model, pipeline(passing.Options(head)))
    passing.run(model, finishing(activations))
    return model


def floats(model: ir.Model) -> set[str]:
    """What kinds of node give float32."""
    return {n.op_type for n in model.graph if n.outputs[0].dtype == ir.DataType.FLOAT}


def test_everything_between_operators_is_narrow() -> None:
    model = narrowed("float")
    assert floats(model) == set()
    assert {v.dtype for v in model.graph.outputs} == {ir.DataType.FLOAT16}


def test_bfloat16_widens_the_logits_alone() -> None:
    model = narrowed("float", "bfloat16")
    assert [n.op_type for n in model.graph if n.outputs[0].dtype == ir.DataType.FLOAT] == ["Cast"]
    outputs = {v.name: v.dtype for v in model.graph.outputs}
    assert outputs.pop("logits") == ir.DataType.FLOAT
    assert set(outputs.values()) == {ir.DataType.BFLOAT16}
    caches = [v for v in model.graph.inputs if str(v.name).startswith("past_key_values")]
    assert {v.dtype for v in caches} == {ir.DataType.BFLOAT16}
    (last,) = [n for n in model.graph if n.outputs[0].name == "logits"]
    assert last.inputs[0].dtype == ir.DataType.BFLOAT16
    assert last.inputs[0].name != "logits"


def test_bfloat16_leaves_wide_logits_alone() -> None:
    model = narrowed("q8", "bfloat16")
    assert floats(model) == {"HeadLinear", "GatherBlockQuantized"}


def test_bfloat16_constants_are_rounded_to_even() -> None:
    build = Build()
    x = build.input("x", ["n", 2])
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # both between two bfloat16 values
    build.graph.outputs.append(build.op("Mul", x, build.const("c", values), name="y"))
    model = ir.Model(build.graph, ir_version=11)
    NarrowActivations("bfloat16").apply(model)
    (constant,) = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    assert constant.const_value is not None
    rounded = constant.const_value.numpy().astype(np.float32)
    np.testing.assert_array_equal(rounded, np.float32([1, 1 + 2**-6]))


def test_logits_of_a_quantised_head_stay_wide() -> None:
    model = narrowed("q8")
    assert floats(model) == {"HeadLinear", "GatherBlockQuantized"}
    assert next(v for v in model.graph.outputs if v.name == "logits").dtype == ir.DataType.FLOAT


def test_scales_and_norms_of_our_operators_stay_wide() -> None:
    for node in narrowed("float").graph:
        if node.domain != "bitcompile":
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.shape.rank():
                assert value.dtype in (ir.DataType.FLOAT, ir.DataType.UINT8)


def test_a_subgraph_is_refused() -> None:
    build = Build()
    x = build.input("x", ["n", 8])
    inner = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    node = ir.Node("", "If", [x], [ir.AttrGraph("then_branch", inner)], name="branch")
    build.graph.append(node)
    with pytest.raises(InputError, match="branch: If holds a graph"):
        NarrowActivations().apply(ir.Model(build.graph, ir_version=11))


def test_constants_follow_their_activation() -> None:
    build = Build()
    x = build.input("x", ["n", 8])
    y = build.op("Mul", x, build.const("two", np.float32(2)), name="y")
    build.graph.outputs.append(y)
    model = ir.Model(build.graph, ir_version=11)
    record = NarrowActivations().apply(model)
    assert record.count == 2
    mul = next(iter(model.graph))
    assert [v.dtype for v in mul.inputs] == [ir.DataType.FLOAT16] * 2
