"""Foreign ONNX: transformers' own exports end to end, our own files, and damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from transformers import DynamicCache

import bitcompile
from bitcompile import passing, pipeline
from bitcompile.errors import InputError
from bitcompile.frontends import foreign
from bitcompile.frontends.surroundings import quiet
from bitcompile.inspection import format_report, inspect
from bitcompile.passes import pipeline as passes
from tests.checkpoints import DIRECT, INVERSE, ONLINE, TINY, Recipe, cosine, eager, make
from tests.graphs import BITNET, decoder, node_of, ops
from tests.test_recognize_bit_linear import ALPHA, AUTO, SIGNS, K, N, X, model, plain_run

LAYERS = int(TINY["num_hidden_layers"])
LINEARS = 7 * LAYERS
HEADS, SIZE = int(TINY["num_key_value_heads"]), 16


class Whole(torch.nn.Module):
    """A decoder without a cache."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.model = causal

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


class Cached(Whole):
    """A decoder whose cache goes in and out as plain tensors."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        layers = result.past_key_values.layers
        return (result.logits, *(part for layer in layers for part in (layer.keys, layer.values)))


@dataclass(frozen=True)
class Export:
    """How a model was exported."""

    form: dict[str, Any]
    opset: int
    attention: str
    cached: bool


EXPORTS = {
    "packed, multiplied, opset 18": Export(DIRECT, 18, "sdpa", cached=True),
    "packed, divided, opset 20": Export(INVERSE, 20, "eager", cached=False),
    "online, opset 23": Export(ONLINE, 23, "sdpa", cached=True),
}


def past(batch: int, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [torch.randn(batch, HEADS, tokens, SIZE) for _ in range(2 * LAYERS)]


def exported(how: Export, folder: Path) -> torch.nn.Module:
    """transformers' model, exported by torch alone to ``model.onnx``, and ``raw.onnx`` before that.

    ``raw.onnx`` is what torch writes before it optimises the graph.
    """
    causal = make(Recipe("BitNetForCausalLM", how.form), folder / "checkpoint")
    causal.set_attn_implementation(how.attention)
    module = (Cached if how.cached else Whole)(causal)
    batch, seq, before = (torch.export.Dim(name) for name in ("batch", "seq", "past"))
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    inputs: tuple[Any, ...] = (ids, mask)
    dynamic: dict[str, Any] = {"ids": {0: batch, 1: seq}, "mask": {0: batch, 1: seq}}
    names = ["ids", "mask"]
    if how.cached:
        inputs = (ids, torch.ones(2, 7, dtype=torch.int64), past(2, 4))
        dynamic["mask"] = {0: batch, 1: torch.export.Dim.AUTO}
        dynamic["past"] = [{0: batch, 2: before}] * (2 * LAYERS)
        names += [f"past.{i}" for i in range(2 * LAYERS)]
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=how.opset, optimize=False,
            dynamic_shapes=dynamic, input_names=names, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(folder / "raw.onnx", external_data=True)
        program.optimize()
        program.save(folder / "model.onnx", external_data=True)
    return module


@pytest.fixture(scope="module", params=EXPORTS)
def export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Export, torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return EXPORTS[request.param], exported(EXPORTS[request.param], folder), folder


@pytest.mark.parametrize("file", ["model.onnx", "raw.onnx"])
def test_transformers_exports(export: tuple[Export, torch.nn.Module, Path], file: str) -> None:
    """All linears are recognised and fused; the artifact gives transformers' numbers."""
    how, module, folder = export
    if how.form is INVERSE and file == "raw.onnx":
        # torch declares uint8 shifts as int8 there; onnxruntime refuses the file too
        assert "Inferred elem type differs" in refused(folder / file)
        return
    imported = foreign.load(str(folder / file))
    (record,) = imported.records
    assert (record.count, record.refusals) == (LINEARS, ())
    assert imported.language is None
    assert ops(imported.graph).count("BitLinear") == LINEARS
    assert "Round" not in ops(imported.graph)
    passing.run(imported.graph, passes(passing.Options("float", "all")))
    found = ops(imported.graph)
    assert [found.count(op) for op in ("BitGLU", "NormBitLinear", "BitLinear")] == [
        LAYERS, 2 * LAYERS, 0
    ]  # fmt: skip
    names = {node.name for node in imported.graph.graph if node.domain}
    assert {"layer.0.qkv", "layer.0.o", "layer.1.down"} <= names
    made = bitcompile.build(folder / file, out=folder / "out", force=True).manifest
    assert made["passes"][0]["name"] == "recognize-bit-linear"
    assert made["passes"][0]["count"] == LINEARS
    assert made["verification"]["cosine"] >= 0.9999
    session = bitcompile.load(folder / "out")
    for batch, tokens, before in ((2, 5, 4), (1, 1, 7), (1, 6, 0)):
        if how.opset == 23 and file == "model.onnx":
            batch = 1  # torch's RotaryEmbedding of a larger one fails in onnxruntime, as exported
        before = before if how.cached else 0
        _same_as_torch(session, module, batch, tokens, before, how.cached)


def _same_as_torch(
    session: Any, module: torch.nn.Module, batch: int, tokens: int, before: int, cached: bool
) -> None:
    torch.manual_seed(tokens)
    ids = torch.randint(0, TINY["vocab_size"], (batch, tokens))
    mask = torch.ones(batch, before + tokens, dtype=torch.int64)
    arguments: list[Any] = [ids, mask, *([past(batch, before)] if cached else [])]
    with eager():
        expected = module(*arguments)
    feeds = {"ids": ids.numpy(), "mask": mask.numpy()}
    if cached:
        feeds |= {f"past.{i}": tensor.numpy() for i, tensor in enumerate(past(batch, before))}
    got = session.run(None, feeds)
    wanted = list(expected) if cached else [expected]
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == tuple(other.shape)
        assert cosine(one, other.numpy()) >= 0.9999


def test_inspect_tells_what_would_be_recognised(tmp_path: Path) -> None:
    body = AUTO.replace("y = Mul", "y1 = Mul") + "\n p2 = MatMul(q, W5)\n y = Add(y1, p2)"
    five = SIGNS.T.copy()
    five[:5, 0] = [-2, -1, 0, 1, 2]
    five[5:, 0] = 0
    ir.save(model(body, {"W5": five}), tmp_path / "model.onnx")
    report = inspect(tmp_path / "model.onnx")
    unfused = [
        {
            "node": "/layers.0/proj/MatMul_1",
            "reason": "weight has 5 distinct values in row 0: it is not ternary",
        }
    ]
    assert report["recognition"] == {"recognised": 1, "unfused": unfused, "refused": None}
    assert report["ops"]["MatMul"] == 2  # the file's own operators
    text = format_report(report)
    assert "ternary layers: 1 recognised" in text
    assert "weight has 5 distinct values" in text


def test_inspect_tells_why_a_file_cannot_be_compiled(tmp_path: Path) -> None:
    proto = ir.to_proto(model(AUTO))
    proto.opset_import[0].version = 11
    onnx.save(proto, tmp_path / "model.onnx")
    refused = inspect(tmp_path / "model.onnx")["recognition"]["refused"]
    assert "is of ONNX opset 11; supported are 17 to 23" in refused
    assert refused in format_report(inspect(tmp_path / "model.onnx"))


def test_our_own_files_pass_through(tmp_path: Path) -> None:
    """What `bitcompile export` writes: nodes and their weights as they are."""
    ir.save(model(AUTO), tmp_path / "foreign.onnx")
    written = pipeline.export(tmp_path / "foreign.onnx", tmp_path / "own.onnx")
    first, again = foreign.load(str(tmp_path / "foreign.onnx")), foreign.load(str(written))
    assert again.records[0].count == 0
    assert not again.graph.functions
    one, other = (node_of(m.graph, "BitLinear") for m in (first, again))
    for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True):
        assert a is not None
        assert b is not None
        assert a.const_value is not None
        assert b.const_value is not None
        np.testing.assert_array_equal(a.const_value.numpy(), b.const_value.numpy())
    np.testing.assert_allclose(
        plain_run(ir.load(written)), plain_run(model(AUTO)), rtol=1e-4, atol=1e-6
    )


def test_a_portable_decoder_keeps_its_nodes(tmp_path: Path) -> None:
    """GroupQueryAttention and our operators have no ONNX schema, and need none."""
    ir.save(decoder(BITNET), tmp_path / "model.onnx")
    loaded = foreign.load(str(tmp_path / "model.onnx"))
    assert ops(loaded.graph).count("BitLinear") == ops(decoder(BITNET)).count("BitLinear")
    assert ops(loaded.graph).count("GroupQueryAttention") == BITNET.layers


def test_model_local_functions_are_inlined(tmp_path: Path) -> None:
    proto = ir.to_proto(model(AUTO))
    nodes = list(proto.graph.node)
    constants = [tensor.name for tensor in proto.graph.initializer]
    body = helper.make_function(
        "made", "Linear", ["x", *constants], ["y"], nodes, [helper.make_opsetid("", 23)]
    )
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("Linear", ["x", *constants], ["y"], domain="made"))
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("made", 1))
    onnx.save(proto, tmp_path / "model.onnx")
    loaded = foreign.load(str(tmp_path / "model.onnx"))
    assert ops(loaded.graph) == ["BitLinear"]


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    proto = ir.to_proto(model(AUTO))
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, tmp_path / "model.onnx")
    assert ops(foreign.load(str(tmp_path / "model.onnx")).graph) == ["BitLinear"]


# --- files that cannot be used ------------------------------------------------------------------


def saved(tmp_path: Path, change: Callable[[onnx.ModelProto], object] = lambda _: None) -> Path:
    """The AUTO layer with its data in a file beside it, after ``change``."""
    folder = tmp_path / "model"
    folder.mkdir()
    ir.save(
        model(AUTO), folder / "model.onnx", external_data="model.data", size_threshold_bytes=1024
    )
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def initializer(proto: onnx.ModelProto, name: str) -> TensorProto:
    (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    return found


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        foreign.load(str(path))
    text = str(caught.value)
    assert "\n" not in text
    return text


def location(proto: onnx.ModelProto, key: str, value: str) -> None:
    for entry in initializer(proto, "Wt").external_data:
        if entry.key == key:
            entry.value = value


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = proto.graph.node[-2].output[0]


def wrong_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Absolute"


def no_such_input(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "nowhere"


def own_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "bitcompile"
    proto.opset_import.append(helper.make_opsetid("bitcompile", 1))


def own_version(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("bitcompile", 2))


def recursive_function(proto: onnx.ModelProto) -> None:
    call = helper.make_node("F", ["a"], ["b"], domain="made")
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("made", 1)]
    proto.functions.append(helper.make_function("made", "F", ["a"], ["b"], [call], opsets))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "F", "made"
    proto.opset_import.append(helper.make_opsetid("made", 1))


CHANGES: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "opset 16": (lambda p: setattr(p.opset_import[0], "version", 16), "opset 16; supported are 17"),
    "opset 24": (lambda p: setattr(p.opset_import[0], "version", 24), "opset 24; supported are 17"),
    "no opset": (lambda p: p.ClearField("opset_import"), "opset None; supported are 17 to 23"),
    "no graph": (lambda p: p.ClearField("graph"), "no graph with outputs"),
    "cycle": (cycle, "cycle"),
    "wrong type": (wrong_type, "inconsistent type tensor(float)"),
    "unknown operator": (unknown_operator, "No Op registered for Absolute"),
    "no such input": (no_such_input, "nowhere"),
    "huge dims": (lambda p: initializer(p, "alpha").dims.extend([1 << 40, 1 << 20]), "bytes, not"),
    "negative dims": (lambda p: initializer(p, "Wt").dims.__setitem__(0, -1), "of shape [-1"),
    "unknown type": (lambda p: setattr(initializer(p, "alpha"), "data_type", 99), "99"),
    "data elsewhere": (lambda p: location(p, "location", "../x"), "outside the model's folder"),
    "data anywhere": (lambda p: location(p, "location", "/x/y"), "outside the model's folder"),
    "data missing": (lambda p: location(p, "location", "other.data"), "'other.data' is missing"),
    "data short": (lambda p: location(p, "offset", "1000000"), "ends before 'Wt'"),
    "data length": (lambda p: location(p, "length", "8"), "holds 8 bytes, not"),
    "own operator": (own_operator, "has no operator 'Abs'"),
    "own version": (own_version, "bitcompile version 2; this is version 1"),
    "recursive function": (recursive_function, "cannot be used"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refuses(tmp_path: Path, case: str) -> None:
    change, text = CHANGES[case]
    assert text in refused(saved(tmp_path, change))


def test_refuses_a_file_without_ternary_layers(tmp_path: Path) -> None:
    ir.save(model("y = MatMul(x, Wt)"), tmp_path / "model.onnx")
    text = refused(tmp_path / "model.onnx")
    assert "no ternary layer that could be recognised (/layers.0/proj/MatMul: activations" in text


def test_refuses_what_is_no_onnx_file(tmp_path: Path) -> None:
    for content in (b"", b"hello, this is text\n", bytes(range(256)), b"\x08" * 1000):
        (tmp_path / "model.onnx").write_bytes(content)
        assert "model.onnx" in refused(tmp_path / "model.onnx")
    assert "no file" in refused(tmp_path / "missing.onnx")


def test_own_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    ir.save(model(AUTO), tmp_path / "foreign.onnx")
    pipeline.export(tmp_path / "foreign.onnx", tmp_path / "own.onnx")
    proto = onnx.load(tmp_path / "own.onnx")
    (node,) = proto.graph.node
    next(a for a in node.attribute if a.name == "K").i = K + 100
    onnx.save(proto, tmp_path / "own.onnx")
    assert f"of [{N}, {K + 100}] is" in refused(tmp_path / "own.onnx")


def test_a_damaged_file_is_one_error_or_a_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cut or changed anywhere, by a fixed generator; nothing else reaches the terminal."""
    whole = saved(tmp_path).read_bytes()
    target = tmp_path / "model" / "damaged.onnx"
    rng = np.random.default_rng(11)
    failed = 0
    for _ in range(120):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(data), rng.integers(0, 4)):
            data[at] = rng.integers(0, 256)
        target.write_bytes(data)
        message = error_of(lambda: foreign.load(str(target)))
        assert "\n" not in message
        failed += bool(message)
        assert "\n" not in error_of(lambda: inspect(target))
        assert capfd.readouterr() == ("", "")
    assert failed > 80


def error_of(call: Callable[[], object]) -> str:
    """The text of the InputError that a call raises, empty if there is none."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def test_a_built_layer_has_the_exporters_integers(tmp_path: Path) -> None:
    """The kernel in the artifact: scaled back, its results are the accumulators."""
    from bitcompile import numerics

    ir.save(model(AUTO), tmp_path / "model.onnx")
    bitcompile.build(tmp_path / "model.onnx", out=tmp_path / "out")
    (y,) = bitcompile.load(tmp_path / "out").run(None, {"x": X})
    q, s = numerics.quantize_activations(X)
    acc = numerics.integer_matmul(q, SIGNS.astype(np.int8))
    np.testing.assert_array_equal(np.rint(y.astype(np.float64) * s / ALPHA), acc)
