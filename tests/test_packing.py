from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitcompile.errors import InputError
from bitcompile.packing import (
    CPU_TILE,
    GROUP_SIZES,
    LAYOUTS,
    PORTABLE,
    PackedTernary,
    groups,
    layout,
)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_every_layout_round_trips_every_shape(N: int, K: int, seed: int) -> None:
    weight = np.random.default_rng(seed).integers(-1, 2, (N, K)).astype(np.int8)
    packed = PackedTernary.pack(weight, 0.5)
    for chosen in LAYOUTS.values():
        moved = packed.to(chosen)
        assert moved.data.shape == chosen.shape(N, K)
        np.testing.assert_array_equal(moved.ternary(), weight)


def test_portable_bytes_hold_four_columns_low_bits_first() -> None:
    packed = PackedTernary.pack(np.array([[-1, 0, 1, 1, 0]], np.int8), 1.0, PORTABLE)
    # Codes 0 1 2 2 | 1, then code 1 (weight 0) as padding.
    assert packed.data.tolist() == [[0b10_10_01_00, 0b01_01_01_01]]


def test_cpu_tile_bytes_hold_columns_four_apart() -> None:
    weight = np.zeros((16, 16), np.int8)
    weight[3, 4 * 2 + 1] = 1  # row 3, column 4p + j with p = 2, j = 1
    data = PackedTernary.pack(weight, 1.0, CPU_TILE).data
    assert data.shape == (1, 1, 64)
    assert data[0, 0, 3 * 4 + 1] == 0b01_10_01_01
    assert (np.delete(data[0, 0], 13) == 0b01_01_01_01).all()


def test_scales_are_one_per_row() -> None:
    assert PackedTernary.pack(np.zeros((3, 2), np.int8), 0.25).scale.tolist() == [[0.25]] * 3
    rows = PackedTernary.pack(np.zeros((2, 2), np.int8), np.array([1.0, 2.0]))
    assert rows.scale.tolist() == [[1.0], [2.0]]


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(GROUP_SIZES))
def test_group_scales_round_trip(N: int, K: int, size: int) -> None:
    scale = np.arange(N * groups(K, size), dtype=np.float32).reshape(N, -1)
    packed = PackedTernary.pack(np.zeros((N, K), np.int8), scale, group_size=size)
    for chosen in LAYOUTS.values():
        stored = chosen.encode_scale(packed.scale, size)
        assert stored.shape == chosen.scale_shape(N, K, size)
        np.testing.assert_array_equal(chosen.decode_scale(stored, N, K, size), scale)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(InputError, match="one scale per 48 columns; supported are"):
        groups(96, 48)
    with pytest.raises(InputError, match=r"scales are \[2, 3\], not \[2, 2\]"):
        PackedTernary.pack(np.zeros((2, 32), np.int8), np.ones((2, 3)), group_size=16)
    with pytest.raises(InputError, match="pack them again"):
        CPU_TILE.decode_scale(np.ones((2, 2), np.float32), 2, 32, 16)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (np.array([[2]], np.int8), 1.0, "not ternary"),
        (np.zeros((2, 0), np.int8), 1.0, "non-empty"),
        (np.zeros(4, np.int8), 1.0, "non-empty"),
        (np.zeros((1, 1), np.int8), np.nan, "not finite"),
    ],
)
def test_bad_weights_are_refused(weight: np.ndarray, scale: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedTernary.pack(weight, scale)


def test_code_three_is_refused() -> None:
    packed = PackedTernary.pack(np.zeros((1, 4), np.int8), 1.0)
    broken = PackedTernary(np.array([[0xFF]], np.uint8), packed.scale, PORTABLE, (1, 4))
    with pytest.raises(InputError, match="code is 3"):
        broken.ternary()
    with pytest.raises(InputError, match="code is 3"):
        broken.to(CPU_TILE)


def test_unknown_layout_and_wrong_shape_are_refused() -> None:
    with pytest.raises(InputError, match="unknown weight layout 'x9'"):
        layout("x9")
    with pytest.raises(InputError, match="pack it again"):
        PORTABLE.decode(np.zeros((1, 2), np.uint8), 1, 4)
