"""Any torch module to ONNX: what is computed, with which shapes and names, and what is refused."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.bitnet import AutoBitLinear as HfAutoBitLinear
from transformers.integrations.bitnet import BitLinear as HfBitLinear
from transformers.integrations.bitnet import pack_weights

import bitcompile
from bitcompile import cli, passing
from bitcompile.errors import InputError, UsageError
from bitcompile.frontends import module as front_end
from bitcompile.generate import run_tensors
from bitcompile.model import Imported
from bitcompile.nn import BitLinear, TernaryWeights, quantize_, register
from bitcompile.passes import finishing


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def session(imported: Imported) -> onnxruntime.InferenceSession:
    """The portable model in plain onnxruntime, by its functions."""
    passing.run(imported.graph, finishing())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        ir.to_proto(imported.graph).SerializeToString(), options, ["CPUExecutionProvider"]
    )


def same(module: nn.Module, made: onnxruntime.InferenceSession, *inputs: torch.Tensor) -> None:
    """The exported model gives what ``module`` does in evaluation mode."""
    with torch.no_grad():
        expected = module.eval()(*inputs)
    feeds = {i.name: x.numpy() for i, x in zip(made.get_inputs(), inputs, strict=True)}
    # Sums of floats (norms, softmax) have another order: a rounding edge may move one step.
    np.testing.assert_allclose(made.run(None, feeds)[0], expected.numpy(), rtol=2e-3, atol=2e-3)


def ops(imported: Imported) -> Counter[str]:
    return Counter(node.op_type for node in imported.graph.graph)


# --- one layer, every form ----------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_rank_has_the_module_s_bits(lead: tuple[int, ...]) -> None:
    layer = BitLinear(37, 11)
    imported = front_end.load(layer, torch.randn(*lead, 37))
    made = session(imported)
    shape = made.get_inputs()[0].shape
    assert shape == (["batch", *lead[1:], 37] if lead else [37])
    x = torch.randn(*(5, *lead[1:]), 37) if lead else torch.randn(37)
    expected = layer(x).detach().numpy()
    np.testing.assert_array_equal(made.run(None, {"x": x.numpy()})[0], expected)


def with_values(layer: Any) -> Any:
    """A transformers layer with random weights, bias and norm."""
    N, K = layer.out_features, layer.in_features
    if isinstance(layer, HfBitLinear):
        layer.dtype = torch.float32
        layer.weight = nn.Buffer(pack_weights(torch.randint(-1, 2, (N, K)).float()))
    elif not layer.online_quant:
        layer.weight = nn.Parameter(torch.randint(-1, 2, (N, K)).float(), requires_grad=False)
    if hasattr(layer, "weight_scale"):
        layer.weight_scale = nn.Buffer(torch.tensor([1.75]))
    layer.bias = type(layer.bias)(torch.randn(N))
    if layer.rms_norm is not None:
        layer.rms_norm.weight = nn.Parameter(torch.rand(K) + 0.5)
    return layer


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["packed", "ternary", "online"])
def test_layers_of_transformers(form: str, norm: bool) -> None:
    shape = {"in_features": 20, "out_features": 12, "bias": True, "use_rms_norm": norm}
    if form == "packed":
        layer = with_values(HfBitLinear(**shape))
    else:
        layer = with_values(HfAutoBitLinear(**shape, online_quant=form == "online"))
    x = torch.randn(4, 20)
    imported = front_end.load(layer, x)
    assert ops(imported) == {"BitLinear": 1} | ({"RMSNormalization": 1} if norm else {})
    made = session(imported)
    if form == "packed":  # its forward is compiled, which takes a C compiler: the same by hand
        normed = layer.rms_norm(x) if norm else x
        s = 127 / normed.abs().amax(-1, keepdim=True)
        codes = [(layer.weight >> (2 * i)) & 3 for i in range(4)]
        acc = (normed * s).round() @ (torch.cat(codes).float() - 1).T
        expected = (acc / (s * layer.weight_scale) + layer.bias).detach().numpy()
        np.testing.assert_allclose(made.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4)
    else:
        by_hand = nn.Module()
        by_hand.forward = lambda x: _auto_by_hand(layer, x)
        same(by_hand, made, x)


def _auto_by_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    x = layer.rms_norm(x) if layer.rms_norm is not None else x
    s = 127 / x.abs().amax(-1, keepdim=True)
    weight = layer.weight
    if layer.online_quant:
        inverse = 1 / weight.abs().mean()
        weight = (weight * inverse).round().clamp(-1, 1) / inverse
    y = functional.linear((x * s).round() / s, weight, layer.bias)
    return y if layer.online_quant else y * layer.weight_scale


class Signs(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A layer of somebody else: signs of the weight, a scale a row or a group of columns."""

    def __init__(self, K: int, N: int, group: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K))
        self.scale = torch.rand(N, -(-K // group) if group else 1) + 0.1
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = 127 / x.abs().amax(-1, keepdim=True)
        columns = self.scale
        if self.group:
            columns = columns.repeat_interleave(self.group, 1)[:, : self.weight.shape[1]]
        return functional.linear((x * s).round() / s, self.weight.sign() * columns)


@pytest.mark.parametrize("group", [0, 16])
def test_a_class_of_the_user_s(group: int) -> None:
    register(Signs, lambda m: TernaryWeights(m.weight.sign(), m.scale, group_size=m.group))
    model = nn.Sequential(Signs(40, 9, group), nn.ReLU(), BitLinear(9, 3))
    imported = front_end.load(model, torch.randn(2, 40))
    assert ops(imported)["BitLinear"] == 2
    if not group:  # one file holds one group size
        same(model, session(imported), torch.randn(6, 40))


# --- whole modules ------------------------------------------------------------------------------


class Net(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Two inputs, a shared layer, dropout, a float layer, and a result with names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.mix = BitLinear(24, 24, norm="rms")
        self.alias = self.mix
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.embed(ids)
        h = h + self.drop(self.alias(self.mix(h))) * weights[..., None]
        return {"logits": self.head(h), "best": h.argmax(-1)}


NET_INPUTS = (torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4))


def test_the_module_stays_as_it_was() -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modules = dict(net.named_modules())
    front_end.load(net, NET_INPUTS)
    assert dict(net.named_modules()) == modules
    assert net.training
    assert net.mix.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_inputs_outputs_and_dimensions_have_names() -> None:
    imported = front_end.load(Net(), NET_INPUTS)
    graph = imported.graph.graph
    assert imported.source == "Net"
    assert imported.language is None
    assert [value.name for value in graph.inputs] == ["ids", "weights"]
    assert [value.name for value in graph.outputs] == ["logits", "best"]
    assert [str(dim) for dim in graph.inputs[0].shape] == ["batch", "4"]
    assert [str(dim) for dim in graph.outputs[0].shape] == ["batch", "4", "5"]
    assert ops(imported)["BitLinear"] == 2  # one layer, called twice: one weight
    assert len({n.inputs[1] for n in graph if n.op_type == "BitLinear"}) == 1


@pytest.mark.parametrize("as_dict", [False, True])
def test_dynamic_shapes_of_the_user(as_dict: bool) -> None:
    batch, length = torch.export.Dim("b"), torch.export.Dim("length")
    inputs: Any = (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4))
    shapes: Any = ({0: batch, 1: length}, {0: batch, 1: length})
    if as_dict:
        inputs = dict(zip(("ids", "weights"), inputs, strict=True))
        shapes = dict(zip(("ids", "weights"), shapes, strict=True))
    net = Net()
    made = session(front_end.load(net, inputs, shapes))
    assert made.get_inputs()[0].shape == ["b", "length"]
    ids, weights = torch.randint(20, (3, 7)), torch.rand(3, 7)
    with torch.no_grad():
        expected = net.eval()(ids, weights)["logits"]
    got = made.run(["logits"], {"ids": ids.numpy(), "weights": weights.numpy()})[0]
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-3)


def test_unrelated_first_dimensions_stay_apart() -> None:
    class Pair(nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.linear = BitLinear(8, 6)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.linear(a) @ b.T

    pair = Pair()
    made = session(front_end.load(pair, (torch.randn(3, 8), torch.randn(3, 6))))
    assert [i.shape[0] for i in made.get_inputs()] == ["batch", "batch_2"]
    same(pair, made, torch.randn(2, 8), torch.randn(5, 6))


def test_half_precision_becomes_float32() -> None:
    model = nn.Sequential(BitLinear(16, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    made = session(front_end.load(model, torch.randn(2, 16, dtype=torch.bfloat16)))
    assert made.get_inputs()[0].type == "tensor(float)"
    assert model[0].weight.dtype == torch.bfloat16
    same(model.float(), made, torch.randn(3, 16))


def test_a_transformer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert quantize_(encoder) == 4
    imported = front_end.load(encoder, torch.randn(1, 5, 32))
    assert ops(imported)["BitLinear"] == 4
    same(encoder, session(imported), torch.randn(3, 5, 32))


# --- what is refused ----------------------------------------------------------------------------


class Idle(nn.Module):  # type: ignore[misc]  # torch is untyped here
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = BitLinear(8, 8), BitLinear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Branch(nn.Module):  # type: ignore[misc]  # torch is untyped here
    def __init__(self) -> None:
        super().__init__()
        self.linear = BitLinear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Dead(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear(x)
        return x + 1


class Nothing(Branch):
    def forward(self, x: torch.Tensor) -> int:
        return self.linear(x).ndim


def hooked() -> nn.Module:
    layer = BitLinear(8, 8)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


def damaged() -> nn.Module:
    layer = BitLinear(8, 8)
    layer.weight.data[0, 0] = float("nan")
    return nn.Sequential(layer)


def not_ternary() -> nn.Module:
    register(Signs, lambda m: TernaryWeights(m.weight, 1.0))
    return nn.Sequential(Signs(8, 4))


def unreadable() -> nn.Module:
    register(Signs, lambda m: m.nothing)
    return nn.Sequential(Signs(8, 4))


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), InputError, r"bitcompile\.nn\.quantize_"),
        (Idle, InputError, "layer idle is not called"),
        (Branch, InputError, "torch cannot export Branch: .*data-dependent"),
        (Dead, InputError, "no output of Dead depends"),
        (Nothing, InputError, "returns no tensor"),
        (hooked, InputError, "layer 0 has hooks"),
        (damaged, InputError, "layer 0 cannot be read: weight"),
        (not_ternary, InputError, "layer 0 cannot be read: weight is not ternary"),
        (unreadable, InputError, "layer 0 cannot be read: AttributeError"),
        (lambda: BitLinear(9, 8), UsageError, "BitLinear does not take the example inputs"),
    ],
)
def test_refusals(
    module: Any, kind: type[Exception], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = module()
    with pytest.raises(kind, match=message) as caught:
        front_end.load(made, torch.randn(2, 8))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("inputs", [3, "x", (), {}, None])
def test_example_inputs_must_be_arguments(inputs: Any) -> None:
    with pytest.raises(UsageError, match="give a tensor, a tuple"):
        front_end.load(BitLinear(2, 2), inputs)


# --- build, export, command line ----------------------------------------------------------------


def test_build_runs_and_verifies(tmp_path: Path) -> None:
    net = Net()
    made = bitcompile.build(net, example_inputs=NET_INPUTS, out=tmp_path / "out")
    assert made.manifest["verification"]["cosine"] >= 0.9999
    assert made.manifest["source"] == "Net"
    assert made.manifest["language"] is None
    assert made.manifest["options"]["head"] == "float"
    assert made.manifest["options"]["logits"] == "all"
    assert "genai_config.json" not in made.manifest["files"]
    assert made.manifest["inspection"]["ops"]["bitcompile::NormBitLinear"] == 2
    ids = np.arange(12).reshape(3, 4)
    np.savez(tmp_path / "in.npz", ids=ids, weights=np.ones((3, 4), np.float32))
    shapes = run_tensors(made, tmp_path / "in.npz", tmp_path / "out.npz", threads=1)
    assert shapes == {"logits": (3, 4, 5), "best": (3, 4)}
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(ids), torch.ones(3, 4))["logits"].numpy()
    got = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize("head", ["q8", "q4"])
def test_a_head_that_is_asked_for_needs_one(tmp_path: Path, head: str) -> None:
    model = nn.Sequential(BitLinear(24, 16), nn.Linear(16, 4))
    with pytest.raises(UsageError, match=f"no embedding or head for --head {head}"):
        bitcompile.build(
            model, example_inputs=torch.randn(1, 24), out=tmp_path / "out", head=head, verify=False
        )
    assert not (tmp_path / "out").exists()


def test_verify_needs_no_float_output(tmp_path: Path) -> None:
    class Label(Branch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.float()).argmax(-1)

    pixels = torch.ones(1, 8, dtype=torch.uint8)
    made = bitcompile.build(Label(), example_inputs=pixels, out=tmp_path / "out")
    assert "no float32 output" in made.manifest["verification"]["summary"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(BitLinear(8, 8)), {}, "needs example_inputs"),
        (BitLinear(8, 8), {"example_inputs": torch.ones(1, 8), "context": 9}, "leave context out"),
        ("toy", {"example_inputs": torch.ones(1, 8)}, "belong to torch modules"),
        (3, {}, "the model is int"),
    ],
)
def test_options_that_do_not_apply(
    tmp_path: Path, model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bitcompile.build(model, out=tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_export_runs_in_plain_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(BitLinear(33, 8), nn.Tanh())
    path = bitcompile.export(layer, tmp_path / "m.onnx", example_inputs=torch.randn(2, 33))
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    same(layer, onnxruntime.InferenceSession(path), torch.randn(5, 33))
    for out, message in [("m.onnx", "exists"), ("m.bin", r"\.onnx"), ("no/m.onnx", "folder")]:
        with pytest.raises(UsageError, match=message):
            bitcompile.export(layer, tmp_path / out, example_inputs=torch.randn(2, 33))
    monkeypatch.setattr("bitcompile.pipeline.INLINE_LIMIT", 1)
    bitcompile.export(layer, path, example_inputs=torch.randn(2, 33), force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    same(layer, onnxruntime.InferenceSession(path), torch.randn(5, 33))


FACTORIES = """
import torch
from bitcompile.nn import BitLinear

def good():
    return torch.nn.Sequential(BitLinear(16, 8)), torch.randn(1, 16)

def shaped():
    return good()[0], (torch.randn(2, 16),), ({0: torch.export.Dim("rows")},)

def alone():
    return good()[0]

def number():
    return 3, torch.ones(1)

def broken():
    raise RuntimeError("two\\nlines")

def leaves():
    raise SystemExit(0)

module = good()[0]
"""


@pytest.fixture
def terminate() -> Iterator[None]:
    """The command line sets a signal handler; the tests after it get theirs back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(FACTORIES)
    (tmp_path / "half.py").write_text("import torch_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("made_here", "half"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("reference", "batch"),
    [("made_here:good", "batch"), ("made_here.py:good", "batch"), ("made_here:shaped", "rows")],
)
def test_export_of_a_factory(reference: str, batch: str) -> None:
    bitcompile.export(reference, "m.onnx")
    assert onnxruntime.InferenceSession("m.onnx").get_inputs()[0].shape == [batch, 16]


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere_at_all:f", "cannot import nowhere_at_all: ModuleNotFoundError"),
        ("nowhere.py:f", r"no file nowhere\.py"),
        ("half:f", "cannot import half: .*torch_that_is_not_there"),
        ("made_here:nothing", "has no 'nothing'"),
        ("made_here:module", "is Sequential, not a function"),
        ("made_here:alone", r"returned \(Sequential\): it must return \(module, example_inputs"),
        ("made_here:number", r"returned \(int, Tensor\)"),
        ("made_here:broken", "failed: RuntimeError: two lines"),
        ("made_here:leaves", "failed: SystemExit"),
    ],
)
def test_factories_that_make_no_module(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bitcompile.export(reference, "m.onnx")
    assert not Path("m.onnx").exists()


def test_files_are_sent_to_their_front_end(tmp_path: Path) -> None:
    for name in ("no.onnx", "no.gguf"):
        with pytest.raises(InputError, match=f"no file .*{name}"):
            bitcompile.build(tmp_path / name, out=tmp_path / "out")


@pytest.mark.usefixtures("factories", "terminate")
def test_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        return exit.value.code, *capfd.readouterr()

    code, out, err = run("export", "made_here:good", "-o", "m.onnx")
    assert (code, err) == (0, "")
    assert "bitcompile build m.onnx" in out
    code, out, err = run("build", "made_here:good", "-o", "out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["inspection"]["outputs"] == {"output": ["batch", 8]}
    code, out, err = run("build", "made_here:good", "-o", "other", "--context", "9")
    assert (code, err.count("\n"), out) == (2, 1, "")
    assert "leave context out" in err
