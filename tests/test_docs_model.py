"""The embedded trained model through the whole build: quality against transformers' own figures.

``examples/docs-bitnet-25m/reference.json`` was computed by transformers in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
from tokenizers import Tokenizer

import bitcompile
from bitcompile.artifact import Artifact
from bitcompile.verification import empty_caches, step, variants, verify

MODEL = Path(__file__).parents[1] / "examples" / "docs-bitnet-25m"
REFERENCE = json.loads((MODEL / "reference.json").read_text())
WINDOW, WINDOWS = 512, 16
TIE = 1e-2
"""Logits closer than this may swap ranks: a divergence there says nothing."""
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def built(folder: Path, **options: Any) -> Artifact:
    return bitcompile.build(MODEL, "native", out=folder / "artifact", **options)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model with a float head and all logits."""
    folder = tmp_path_factory.mktemp("exact")
    return built(folder, head="float", logits="all", verify=False)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model as `bitcompile build` makes it by default, verification included."""
    return built(tmp_path_factory.mktemp("default"))


def perplexity(artifact: Artifact) -> float:
    """By the protocol in reference.json."""
    tokens = np.fromfile(MODEL / "heldout_tokens.u16", "<u2").astype(np.int64)
    session = bitcompile.load(artifact.path, threads=2)
    losses = []
    for w in range(WINDOWS):
        ids = tokens[WINDOW * w : WINDOW * (w + 1)]
        targets = tokens[WINDOW * w + 1 : WINDOW * (w + 1) + 1]
        logits = step(session, ids[None], empty_caches(session))[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(-1))
        losses.append(log_sum - logits[np.arange(WINDOW), targets])
    return float(np.exp(np.mean(losses)))


def greedy(artifact: Artifact, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and the gap between the two best logits at each, in plain onnxruntime."""
    session = bitcompile.load(artifact.path, threads=1)
    caches = empty_caches(session)
    tokens, gaps, feed = [], [], prompt
    for _ in range(count):
        logits = step(session, np.array([feed], np.int64), caches)[0, -1]
        best = np.argsort(logits)[-2:]
        tokens.append(int(best[1]))
        gaps.append(float(logits[best[1]] - logits[best[0]]))
        feed = tokens[-1:]
    return tokens, gaps


def prompt_tokens(text: str) -> list[int]:
    return [0, *TOKENIZER.encode(text, add_special_tokens=False).ids]


def test_perplexity_equals_transformers(exact: Artifact) -> None:
    assert perplexity(exact) == pytest.approx(REFERENCE["heldout_perplexity_512"], rel=1e-3)


def test_perplexity_with_the_8_bit_head(tmp_path: Path) -> None:
    eight = built(tmp_path, head="q8", logits="all", verify=False)
    assert perplexity(eight) == pytest.approx(REFERENCE["heldout_perplexity_512"], rel=5e-3)


def test_greedy_tokens_equal_transformers(exact: Artifact) -> None:
    agreed = 0
    for text, expected in REFERENCE["greedy"].items():
        tokens, gaps = greedy(exact, prompt_tokens(text), len(expected))
        differs = [a != b for a, b in zip(tokens, expected, strict=True)]
        first = differs.index(True) if any(differs) else len(expected)
        if first < len(expected) and gaps[first] < TIE:
            first = len(expected)
        agreed += first
    assert agreed >= 87  # of 96


def test_genai_gives_the_tokens_of_plain_onnxruntime(default: Artifact) -> None:
    model = onnxruntime_genai.Model(str(default.path))
    for text in REFERENCE["greedy"]:
        prompt = prompt_tokens(text)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 32, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        got = generator.get_sequence(0)[len(prompt) :].tolist()
        expected, _ = greedy(default, prompt, 32)
        assert got == expected[: len(got)]
        assert len(got) == 32 or got[-1] == 1  # the end token


def test_every_variant_is_exact_and_equals_the_fallback(default: Artifact) -> None:
    report = default.manifest["verification"]
    assert all(node["exact"] for node in report["nodes"])
    assert report["cosine"] >= 0.9999
    for isa in variants(default):
        assert all(node.exact for node in verify(default, isa=isa).nodes)


def test_variants_and_thread_counts_give_the_same_bits(
    default: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(3, 40, dtype=np.int64)[None]
    results = []
    for isa in variants(default):
        for threads in (1, 2, 3):
            monkeypatch.setenv("BITCOMPILE_ISA", isa)
            session = bitcompile.load(default.path, threads=threads)
            results.append(step(session, ids, empty_caches(session)))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_decoder_layer_is_four_nodes(default: Artifact) -> None:
    inspection = default.manifest["inspection"]
    assert inspection["nodes_per_layer"] == 4
    assert inspection["ops"]["bitcompile::NormBitLinear"] == 2 * 8
    assert inspection["ops"]["bitcompile::BitGLU"] == 8
    assert inspection["ops"]["com.microsoft::GroupQueryAttention"] == 8
