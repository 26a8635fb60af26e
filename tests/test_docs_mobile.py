"""The tables of docs/mobile.md follow from the formulas the package uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitcompile.custom_ops.head_linear import BLOCK
from bitcompile.decoder import kv_bytes

PAGE = (Path(__file__).parents[1] / "docs" / "mobile.md").read_text("utf-8")
LAYERS, HIDDEN, VOCABULARY, FFN = 30, 2560, 128256, 6912
LANGUAGE = {"num_layers": LAYERS, "num_kv_heads": 5, "head_size": 128}
SMALL = {"num_layers": 8, "num_kv_heads": 2, "head_size": 64}
ROWS = {"qkv": (20 + 5 + 5) * 128, "o": HIDDEN, "gate_up": 2 * FFN}
TERNARY = LAYERS * sum(
    n * k // 4 + 4 * n for n, k in [*((n, HIDDEN) for n in ROWS.values()), (HIDDEN, FFN)]
)
HEAD = {
    "q8": VOCABULARY * HIDDEN // BLOCK * (BLOCK + 4),
    "q4": VOCABULARY * HIDDEN // BLOCK * (BLOCK // 2 + 4),
}
SHARE = 0.6


def cells(row: str) -> list[str]:
    """The cells of the table row that begins with ``row``."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("row", "head", "held"),
    [
        ("`q8`, 16", "q8", 16),
        ("`q8`, 2048", "q8", 2048),
        ("`q4`, 16", "q4", 16),
        ("`q4`, 2048", "q4", 2048),
    ],
)
def test_ceilings(row: str, head: str, held: int) -> None:
    bytes_a_token = TERNARY + HEAD[head] + kv_bytes(LANGUAGE, held)
    _, megabytes, *rates = cells(row)
    assert megabytes == f"{bytes_a_token / 1e6:.1f}"
    header = " ".join(cells("2B-4T, tokens/s at most"))
    bandwidths = [float(value) for value in re.findall(r"([\d.]+) GB/s", header)]
    assert rates == [f"{SHARE * value * 1e9 / bytes_a_token:.1f}" for value in bandwidths]


def test_cache_sizes() -> None:
    for row, language, lengths in (
        ("KV cache, `docs-bitnet-25m`", SMALL, (512,)),
        ("KV cache, 2B-4T", LANGUAGE, (512, 4096)),
    ):
        _, one, *sizes = cells(row)
        assert one == f"{kv_bytes(language, 1):,}"
        expected = [f"{kv_bytes(language, length) / 1e6:.1f} MB" for length in lengths]
        assert [size for size in sizes if size] == expected


def test_sizes_of_the_weights() -> None:
    for head in HEAD:
        assert f"{(TERNARY + HEAD[head]) / 1e6:.0f} MB with" in PAGE
