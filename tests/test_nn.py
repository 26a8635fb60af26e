"""The trainable layer: its numbers, its gradients, and how layers are replaced and read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import bitcompile
from bitcompile import numerics
from bitcompile.errors import InputError, UsageError
from bitcompile.nn import (
    BitLinear,
    TernaryWeights,
    quantize_,
    quantize_activations,
    quantize_weight,
    reader,
    register,
)

SHAPES = [(1,), (3, 7), (2, 3, 33)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_activations_are_quantised_as_the_reference_does() -> None:
    x = torch.randn(50, 37) * torch.logspace(-8, 3, 50)[:, None]
    x[3] = 0
    x[4, 1:4] = torch.tensor([0.5, 1.5, 2.5]) * x[4].abs().max() / 127  # ties, nearly
    q, s = quantize_activations(x)
    expected_q, expected_s = numerics.quantize_activations(x.numpy())
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(s.numpy(), expected_s)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_poisons_itself_only(bad: float) -> None:
    layer = BitLinear(9, 5)
    x = torch.randn(3, 9)
    clean = layer(x)
    x[1, 4] = bad
    y = layer(x)
    assert y[1].isnan().all()
    assert y[0].equal(clean[0])
    assert y[2].equal(clean[2])


def test_weights_are_quantised_as_the_reference_does() -> None:
    weight = torch.randn(31, 45) * 0.02
    w, scale = quantize_weight(weight)
    expected_w, expected_scale = numerics.quantize_weight_absmean(weight.numpy())
    np.testing.assert_array_equal(w.numpy(), expected_w)
    np.testing.assert_allclose(scale.item(), expected_scale, rtol=3e-7)  # order of one sum
    zero, floor = quantize_weight(torch.zeros(2, 3))
    assert not zero.any()
    assert floor.item() == numerics.AMAX_FLOOR


@pytest.mark.parametrize("lead", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_has_the_reference_s_bits(lead: tuple[int, ...], bias: bool) -> None:
    layer = BitLinear(131, 17, bias=bias)
    x = torch.randn(*lead, 131)
    w, scale = quantize_weight(layer.weight.detach())
    rows = np.full((17, 1), scale.item(), np.float32)
    expected = numerics.ternary_matmul(x.numpy(), w.numpy().astype(np.int8), rows)
    if layer.bias is not None:
        expected = expected + layer.bias.detach().numpy()
    np.testing.assert_array_equal(layer(x).detach().numpy(), expected)
    np.testing.assert_array_equal(layer.eval()(x).detach().numpy(), expected)


def test_gradients_pass_straight_through() -> None:
    """Those of ``linear(x + (fq(x) - x).detach(), W + (fq(W) - W).detach(), b)``."""
    layer = BitLinear(40, 12)
    x = torch.randn(5, 40, requires_grad=True)
    probe = torch.randn(5, 12)
    (layer(x) * probe).sum().backward()
    q, s = quantize_activations(x.detach())
    w, scale = quantize_weight(layer.weight.detach())
    fake_x, fake_w = q / s, w * scale
    torch.testing.assert_close(x.grad, probe @ fake_w)
    torch.testing.assert_close(layer.weight.grad, probe.T @ fake_x)
    torch.testing.assert_close(layer.bias.grad, probe.sum(0))


def test_it_trains() -> None:
    teacher = torch.randn(8, 32).sign()
    layer = BitLinear(32, 8, norm="rms")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 32)
    target = x @ teacher.T
    first = last = 0.0
    for step in range(150):
        loss = functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first / 10
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_it_takes_the_place_of_linear() -> None:
    linear, layer = nn.Linear(6, 4), BitLinear(6, 4)
    assert isinstance(layer, nn.Linear)
    layer.load_state_dict(linear.state_dict())
    assert layer.weight.equal(linear.weight)
    assert "norm='rms'" in repr(BitLinear(6, 4, norm="rms"))
    assert bitcompile.nn.BitLinear is BitLinear
    with pytest.raises(UsageError, match="unknown norm 'layer'"):
        BitLinear(6, 4, norm="layer")


def test_autocast_and_half_precision_keep_the_integers() -> None:
    layer = BitLinear(64, 8)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert inside.equal(layer(x))
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_it_has_a_meta_form() -> None:
    assert BitLinear(6, 4, device="meta", norm="rms")(torch.ones(3, 6, device="meta")).shape == (
        3,
        4,
    )


def test_rows_quantise_themselves() -> None:
    layer = BitLinear(40, 12, norm="rms")
    x = torch.randn(5, 40)
    assert layer(x)[2:3].equal(layer(x[2:3]))


class Block(nn.Module):  # type: ignore[misc]  # torch is untyped here
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 2)
        self.again = self.up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.relu(self.again(x))))


def test_quantize_replaces_by_a_filter() -> None:
    block = Block()
    before = dict(block.named_parameters())
    assert quantize_(block, lambda name, module: name != "head") == 2
    assert type(block.head) is nn.Linear
    assert isinstance(block.up, BitLinear)
    assert block.again is block.up
    after = dict(block.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert quantize_(block, norm="rms", eps=0.5) == 1
    assert block.head.norm.eps == 0.5
    assert quantize_(block) == 0
    block(torch.randn(3, 6)).sum().backward()


def test_quantize_cannot_replace_the_model_itself() -> None:
    with pytest.raises(UsageError, match=r"make a bitcompile\.nn\.BitLinear"):
        quantize_(nn.Linear(2, 2))


def test_layers_whose_weight_others_read_are_left_or_called() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    assert quantize_(layer) == 2
    assert not isinstance(layer.self_attn.out_proj, BitLinear)
    calls: list[torch.Tensor] = []
    forward = layer.linear1.forward
    layer.linear1.forward = lambda x: calls.append(x) or forward(x)
    with torch.no_grad():
        layer(x)  # torch's fused path would multiply by the float weights
    assert len(calls) == 1


# --- reading ------------------------------------------------------------------------------------


def read(module: nn.Module) -> TernaryWeights:
    found = reader(module)
    assert found is not None
    return found(module)


def test_our_layer_is_read_with_the_integers_it_computes() -> None:
    layer = BitLinear(10, 6, norm="rms", eps=0.25)
    weights = read(layer)
    w, scale = quantize_weight(layer.weight.detach())
    assert weights.weight.equal(w)
    assert weights.scale == scale
    assert (weights.bias is layer.bias, weights.gamma is layer.norm.weight) == (True, True)
    assert weights.eps == 0.25
    assert read(BitLinear(10, 6, bias=False)).bias is None


def test_other_layers_are_none() -> None:
    assert reader(nn.Linear(2, 3)) is None
    assert reader(nn.Sequential()) is None


class Mine(nn.Module):  # type: ignore[misc]  # torch is untyped here
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Same(Mine):
    def extra(self) -> None: ...


class Other(Mine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_registered_class_and_its_subclasses_are_read() -> None:
    weights = TernaryWeights(np.ones((2, 3)), 1.0)
    register(Mine, lambda module: weights)
    assert read(Mine()) is weights
    assert read(Same()) is weights
    with pytest.raises(InputError, match="Other changes the forward of Mine: register it"):
        reader(Other())
    register(Other, lambda module: weights)
    assert read(Other()) is weights


@pytest.mark.parametrize("thing", [int, "Mine", Mine()])
def test_only_module_classes_can_be_registered(thing: Any) -> None:
    with pytest.raises(UsageError, match="no class of"):
        register(thing, lambda module: TernaryWeights(0, 0))
