"""Function bodies (what runs without the plugin) against the NumPy references."""

from __future__ import annotations

import numpy as np
import pytest

from bitcompile import numerics
from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError
from bitcompile.packing import LAYOUTS, PackedTernary, groups
from tests.single_node import NONE, accumulator_input, model, session
from tests.test_plugin import glu

SHAPES = [(1, 1, 1), (5, 7, 2), (33, 50, 9), (40, 52, 3), (64, 640, 4)]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(("N", "K", "M"), SHAPES)
def test_bodies_compute_the_same_integers(layout: str, N: int, K: int, M: int) -> None:
    rng = np.random.default_rng(N)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x, s = accumulator_input(rng, M, K)
    packed = PackedTernary.pack(weight, s, LAYOUTS[layout])
    constants = {"w": packed.data, "w_scale": packed.scale, "bias": NONE, "residual": NONE}
    made = model("BitLinear", {"K": K, "N": N, "layout": layout}, constants, function=True)
    y = session(made, with_plugin=False).run(None, {"x": x})[0]
    q, _ = numerics.quantize_activations(x)
    np.testing.assert_array_equal(y, numerics.integer_matmul(q, weight))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("group_size", [16, 64, 256])
@pytest.mark.parametrize(("N", "K", "M"), SHAPES)
def test_bodies_of_group_scaled_weights(
    layout: str, group_size: int, N: int, K: int, M: int
) -> None:
    rng = np.random.default_rng(N)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    scale = rng.random((N, groups(K, group_size))).astype(np.float32)
    packed = PackedTernary.pack(weight, scale, LAYOUTS[layout], group_size)
    stored = LAYOUTS[layout].encode_scale(packed.scale, group_size)
    constants = {"w": packed.data, "w_scale": stored, "bias": NONE, "residual": NONE}
    attributes = {"K": K, "N": N, "layout": layout, "group_size": group_size}
    x = rng.standard_normal((2, M, K)).astype(np.float32)
    made = model("BitLinear", attributes, constants, function=True)
    y = session(made, with_plugin=False).run(None, {"x": x})[0]
    reference = OPS["BitLinear"].reference({**constants, "x": x}, attributes)
    np.testing.assert_array_equal(y, reference)
    wide = weight * np.repeat(scale, group_size, axis=1)[:, :K]
    expected = x.astype(np.float64) @ wide.T.astype(np.float64)
    # The error of 8-bit activations: half a step of 1/127 of the row's largest, K times.
    assert np.abs(y - expected).max() <= np.abs(x).max() / 254 * np.abs(wide).sum(1).max() + 1e-6


@pytest.mark.parametrize(("N", "K", "M"), SHAPES)
def test_norm_bodies_are_bit_identical(N: int, K: int, M: int) -> None:
    """Also under ONNX Runtime's graph optimiser, which likes to reorder divisions."""
    rng = np.random.default_rng(K)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    packed = PackedTernary.pack(weight, rng.random(N).astype(np.float32))
    x = rng.standard_normal((M, K)).astype(np.float32)
    constants = {"gamma": rng.random(K).astype(np.float32), "w": packed.data}
    constants |= {"w_scale": packed.scale, "bias": rng.random(N).astype(np.float32)}
    constants["residual"] = rng.random((M, N)).astype(np.float32)
    attributes = {"K": K, "N": N, "layout": "i2", "eps": 1e-6}
    made = model("NormBitLinear", attributes, constants, function=True)
    y = session(made, with_plugin=False).run(None, {"x": x})[0]
    reference = OPS["NormBitLinear"].reference({**constants, "x": x}, attributes)
    np.testing.assert_array_equal(y, reference)


@pytest.mark.parametrize("sub_norm", [0, 1])
@pytest.mark.parametrize("activation", sorted(numerics.ACTIVATIONS))
def test_glu_bodies(activation: str, sub_norm: int) -> None:
    rng = np.random.default_rng(1)
    attributes, constants = glu(rng, 50, 70, activation, sub_norm)
    x = rng.standard_normal((3, 50)).astype(np.float32)
    inputs = {"x": x, "residual": x}
    made = model("BitGLU", attributes, constants, function=True)
    y = session(made, with_plugin=False).run(None, inputs)[0]
    reference = OPS["BitGLU"].reference({**constants, **inputs}, attributes)
    if activation == "relu2":
        np.testing.assert_array_equal(y, reference)
    else:  # another exp: a quantised value may differ by one step of the row's 1/127
        np.testing.assert_allclose(y, reference, atol=0.02 * np.abs(reference).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K", [128, 300])
def test_head_bodies(bits: int, K: int) -> None:
    rng = np.random.default_rng(2)
    codes, scale = numerics.quantize_table(rng.standard_normal((20, K)).astype("f4"), bits, 128)
    constants = {"table": codes, "scale": scale}
    made = model("HeadLinear", {"K": K, "N": 20, "bits": bits}, constants, function=True)
    x = rng.standard_normal((3, K)).astype(np.float32)
    y = session(made, with_plugin=False).run(None, {"x": x})[0]
    expected = numerics.head_matmul(x, codes, scale, bits)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_rows_with_nan_poison_only_themselves_without_the_plugin() -> None:
    packed = PackedTernary.pack(np.ones((4, 6), np.int8), 1.0)
    constants = {"w": packed.data, "w_scale": packed.scale, "bias": NONE, "residual": NONE}
    made = model("BitLinear", {"K": 6, "N": 4}, constants, function=True)
    x = np.ones((3, 6), np.float32)
    x[1, 2] = np.nan
    y = session(made, with_plugin=False).run(None, {"x": x})[0]
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(y[[0, 2]]).all()


def test_nodes_are_checked_against_the_schema() -> None:
    op = OPS["NormBitLinear"]
    assert op.complete({"K": 1, "N": 2, "eps": 1e-5})["layout"] == "i2"
    with pytest.raises(InputError, match="unknown attribute 'M'"):
        op.complete({"K": 1, "N": 2, "eps": 1e-5, "M": 3})
    with pytest.raises(InputError, match="attribute 'eps' is required"):
        op.complete({"K": 1, "N": 2})
    with pytest.raises(InputError, match="takes 6 inputs, not 2"):
        op.named([1, 2])
