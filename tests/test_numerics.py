from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bitcompile import numerics
from bitcompile.custom_ops import bodies
from bitcompile.targets.tir import subtrees
from bitcompile.targets.tir.linking import CSRC


def test_quantisation_is_what_torch_computes() -> None:
    x = np.random.default_rng(0).standard_normal((50, 333)).astype(np.float32)
    t = torch.tensor(x)
    scale = 127 / t.abs().amax(-1, keepdim=True).clamp_(min=1e-5)
    expected = (t * scale).round().clamp(-128, 127).to(torch.int8).numpy()
    q, s = numerics.quantize_activations(x)
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(s, scale.numpy())


def test_quantised_values_never_reach_minus_128() -> None:
    """The AVX2 kernel's int16 sums rely on it."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((20000, 4)) * 10.0 ** rng.integers(-6, 30, (20000, 1))).astype("f4")
    q, _ = numerics.quantize_activations(x)
    assert q.min() == -127
    assert q.max() == 127


def test_rows_that_are_not_finite_are_marked() -> None:
    x = np.array([[1, 2], [np.nan, 1], [np.inf, 0], [0, 0]], np.float32)
    q, s = numerics.quantize_activations(x)
    assert np.isnan(s[:, 0]).tolist() == [False, True, True, False]
    assert (q[1:] == 0).all()


def test_rms_norm_agrees_with_float64() -> None:
    x = np.random.default_rng(2).standard_normal((7, 1000)).astype(np.float32)
    gamma = np.linspace(0.5, 2, 1000, dtype=np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gamma
    np.testing.assert_allclose(numerics.rms_norm(x, gamma, 1e-5), expected, rtol=1e-6)


def test_rms_norm_sums_in_the_written_order() -> None:
    """The two small squares are neighbours and meet first: one by one, 1 would swallow them."""
    x = np.zeros((1, 129), np.float32)
    x[0, [0, 2, 3]] = np.sqrt(np.float32([1, 2**-24, 2**-24]))
    y = numerics.rms_norm(x, np.ones(129, np.float32), 0.0)
    assert y[0, 0] == np.float32(1) / np.sqrt(np.float32(1 + 2**-23) / np.float32(129))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 13, 64, 100])
def test_pairwise_sums_are_those_of_a_recursion(count: int) -> None:
    def total(values: np.ndarray) -> np.float32:
        if len(values) == 1:
            return np.float32(values[0])
        half = 1 << (len(values) - 1).bit_length() - 1
        return np.float32(total(values[:half]) + total(values[half:]))

    values = np.random.default_rng(count).standard_normal((4, count)).astype(np.float32)
    expected = np.array([[total(row)] for row in values])
    np.testing.assert_array_equal(numerics.pairwise_sum(values), expected)


def test_rows_have_as_many_subtrees_as_an_operator_takes() -> None:
    header = (CSRC / "ops.h").read_text("utf-8")
    found = re.search(r"MAX_K = 1 << (\d+),", header)
    assert found
    assert 1 << int(found[1]) == subtrees.MOST_COLUMNS == 1 << sum(bodies.SUBTREES)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("relu2", lambda t: torch.relu(t) ** 2),
        ("silu", torch.nn.functional.silu),
        ("gelu_tanh", lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
        ("gelu_erf", torch.nn.functional.gelu),
    ],
)
def test_activations_agree_with_torch(name: str, twin: object) -> None:
    x = np.linspace(-30, 30, 60001, dtype=np.float32)
    expected = twin(torch.tensor(x, dtype=torch.float64)).numpy()
    got = numerics.ACTIVATIONS[name](x)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_exp_is_within_one_part_in_ten_million() -> None:
    x = np.linspace(-86, 87, 100001, dtype=np.float32)
    np.testing.assert_allclose(numerics.exp(x), np.exp(x.astype(np.float64)), rtol=1.5e-7)


def test_absmean_weights() -> None:
    w, scale = numerics.quantize_weight_absmean(np.array([[0.1, -2.0, 1.0, 0.9]], np.float32))
    assert scale == pytest.approx(1.0)
    assert w.tolist() == [[0, -1, 1, 1]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K", [128, 300])
def test_head_reads_its_table(bits: int, K: int) -> None:
    rng = np.random.default_rng(3)
    table = rng.standard_normal((9, K)).astype(np.float32)
    codes, scale = numerics.quantize_table(table, bits, 128)
    values = (numerics.table_codes(codes, bits) * scale).reshape(9, -1)[:, :K]
    error = np.sqrt(np.mean((values - table) ** 2))
    assert error < (0.009 if bits == 8 else 0.12)  # of a standard deviation
    x = rng.standard_normal((3, K)).astype(np.float32)
    expected = x.astype(np.float64) @ values.T.astype(np.float64)
    # 15-bit activations: an error of 2**-15 of the largest, averaged over K products.
    tolerance = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(
        numerics.head_matmul(x, codes, scale, bits), expected, atol=tolerance
    )
