"""fuse-glu: every activation form, with and without sub-norm, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.opset import DOMAIN
from bitcompile.passes.fuse_glu import FuseGlu
from bitcompile.passes.merge_projections import MergeProjections
from bitcompile.passing import listing, run
from tests.graphs import Build, activation, node_of, ops, run_model

FEEDS = {"x": np.random.default_rng(5).standard_normal((2, 3, 50)).astype(np.float32)}
FORMS = {
    "relu2": "relu2",
    "relu2_product": "relu2",
    "relu2_twice": "relu2",
    "silu": "silu",
    "gelu_erf": "gelu_erf",
    "gelu_erf_written": "gelu_erf",
    "gelu_erf_scaled": "gelu_erf",
    "gelu_tanh": "gelu_tanh",
    "gelu_tanh_written": "gelu_tanh",
    "gelu_tanh_product": "gelu_tanh",
}


def network(
    form: str = "relu2",
    *,
    sub_norm: bool = True,
    merge: bool = True,
    biased: str = "",
    sub_eps: float = 1e-5,
    normed: bool = True,
    down: dict[str, Any] | None = None,
) -> ir.Model:
    b = Build()
    x = b.input("x", ["b", "s", 50])
    h = b.norm(x, "norm") if normed else b.op("Neg", x, name="h")
    gate, up = (b.linear(h, 37, f"{name}_proj", bias=biased == name) for name in ("gate", "up"))
    y = b.op("Mul", activation(b, form, gate), up, name="hidden")
    if sub_norm:
        y = b.norm(y, "sub_norm", eps=sub_eps)
    y = b.linear(y, 51, "down_proj", bias=biased == "down", **(down or {}))
    model = b.model(b.op("Neg", y, name="y"))
    if merge:
        run(model, [MergeProjections()])
    return model


def test_golden() -> None:
    model = network()
    (record,) = run(model, [FuseGlu()])
    assert (record.count, record.refusals) == (1, ())
    assert [line for line in listing(model).splitlines() if "=" in line] == [
        "down_proj_y: float[b,s,51] = bitcompile::BitGLU<F=37, F2=74, K=50, N=51, act_bits=8, "
        f"activation=relu2, eps={float(np.float32(1e-5))}, group_size=0, layout=i2, sub_norm=1>"
        "(x, norm.weight, gate_up_proj.weight, gate_up_proj.weight_scale, sub_norm.weight, "
        "down_proj.weight, down_proj.weight_scale, none)",
        "y: float[b,s,51] = Neg(down_proj_y)",
    ]


@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, sub_norm: bool) -> None:
    (expected,) = run_model(network(form, sub_norm=sub_norm), FEEDS)
    model = network(form, sub_norm=sub_norm)
    (record,) = run(model, [FuseGlu()])
    assert (record.count, record.refusals) == (1, ())
    assert ops(model) == ["BitGLU", "Neg"]
    node = node_of(model, "BitGLU")
    assert node.attributes.get_string("activation") == FORMS[form]
    assert node.attributes.get_int("sub_norm") == int(sub_norm)
    # The norms sum in another order and the activations round differently: an activation on the
    # edge of two integers may take the other one, a step of 1/127 of one input of a row.
    (got,) = run_model(model, FEEDS)
    assert np.abs(got - expected).max() <= np.abs(expected).max() / 127
    assert np.median(np.abs(got - expected)) <= 1e-5


def change_after(change: Callable[[Build, ir.Model], None], **options: Any) -> ir.Model:
    model = network(**options)
    b = Build()
    b.graph = model.graph
    change(b, model)
    return model


def _read(name: str) -> Callable[[Build, ir.Model], None]:
    """Let something outside read the value ``name``."""

    def change(b: Build, m: ir.Model) -> None:
        value = next(v for n in m.graph for v in n.outputs if v.name == name)
        b.op("Neg", value, name="outside")

    return change


def _swap(b: Build, m: ir.Model) -> None:
    gate, up = node_of(m, "Split").outputs
    hidden = node_of(m, "Mul")
    node_of(m, "Relu").replace_input_with(0, up)
    hidden.replace_input_with(1, gate)


def _axis(b: Build, m: ir.Model) -> None:
    next(iter(m.graph)).attributes["axis"] = ir.AttrInt64("axis", 1)


def _residual(b: Build, m: ir.Model) -> None:
    merged = next(n for n in m.graph if n.domain == DOMAIN)
    merged.replace_input_with(4, b.input("r", ["b", "s", 74]))


def _nothing(b: Build, m: ir.Model) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (_nothing, {"merge": False}, "gate comes from BitLinear, not from a merged projection"),
        (_swap, {}, "gate and up are not the two parts, in this order, of one Split"),
        (_nothing, {"biased": "up"}, "gate and up has bias 'gate_up_proj.weight.bias'"),
        (_nothing, {"biased": "down"}, "down has bias 'down_proj.bias'"),
        (_residual, {}, "gate and up adds residual 'r'"),
        (_nothing, {"down": {"act_bits": 4}}, "act_bits is 8 in gate and up, 4 in down"),
        (_nothing, {"normed": False}, "gate and up read Neg, not an RMSNormalization"),
        (_nothing, {"sub_eps": 1e-6}, "eps is 1e-05 before the network, 1e-06 inside"),
        (_axis, {}, "RMSNormalization starts at axis 1, not at the last"),
        (_read("gate_proj_y"), {}, "'gate_proj_y' inside the network is used outside"),
        (_read("norm_y"), {}, "the normalised 'norm_y' has 2 uses"),
        (_read("sub_norm_y"), {}, "the normalised 'sub_norm_y' has 2 uses"),
        (_read("hidden"), {}, "'hidden' has 2 uses"),
        (_read("gate_up_proj_y"), {}, "'gate_up_proj_y' has 2 uses"),
    ],
)
def test_refusals(
    change: Callable[[Build, ir.Model], None], options: dict[str, Any], reason: str
) -> None:
    model = change_after(change, **options)
    before = listing(model)
    (record,) = run(model, [FuseGlu()])
    assert [refusal.reason for refusal in record.refusals] == [reason]
    assert not record.modified
    assert listing(model) == before


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("relu2", "number2"),
        ("gelu_tanh_written", "number0.5"),
        ("gelu_tanh_written", "number0.044715"),
        ("gelu_tanh_written", "number3"),
        ("gelu_tanh_written", f"number{(2 / np.pi) ** 0.5}"),
        ("gelu_tanh_written", "number1"),
        ("gelu_erf_written", "number1.4142135623730951"),
    ],
)
def test_other_constants_are_not_the_pattern(form: str, name: str) -> None:
    model = network(form)
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.float32(0.75), name=name)
    (record,) = run(model, [FuseGlu()])
    assert (record.count, record.refusals) == (0, ())
