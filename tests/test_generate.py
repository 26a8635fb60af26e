"""Text through onnxruntime-genai, tensors through plain onnxruntime."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitcompile import runtime, verification
from bitcompile.artifact import Artifact
from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.generate import Sampling, TextModel, run_tensors
from tests import artifacts


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("generate") / "out")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> TextModel:
    return TextModel(artifact, threads=1)


def greedy(artifact: Artifact, tokens: list[int], count: int) -> list[int]:
    """``count`` tokens by plain onnxruntime with a KV cache."""
    session = runtime.load(artifact.path, threads=1)
    caches = verification.empty_caches(session)
    out: list[int] = []
    fed = tokens
    while len(out) < count:
        logits = verification.step(session, np.array([fed]), caches)
        out.append(int(logits[0, -1].argmax()))
        fed = out[-1:]
    return out


def continuation(model: TextModel, tokens: list[int], count: int) -> list[int]:
    """``count`` tokens by onnxruntime-genai, from an empty cache."""
    generator = model._generator(model.context, Sampling())
    generator.append_tokens(np.array(tokens, np.int32))
    for _ in range(count):
        if generator.is_done():
            break
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(tokens) :]


END_TOKENS = list(range(0, 256, 7))
"""End tokens of the chat test: a random model gives one in a few."""
TEXTS = ["", "hello", "Line one\nLine two\t x", "naïve — 日本語 🙂", "  two  spaces ", "a\r\nb"]


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_tokenizers_does(artifact: Artifact, model: TextModel, text: str) -> None:
    """The start token included, which onnxruntime-genai leaves out unless it is asked."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    tokens = model.encode(text).tolist()
    assert tokens == tokenizer.encode(text).ids
    assert tokens[0] == artifacts.BOS
    assert str(model._tokenizer.decode(np.array(tokens[1:], np.int32))) == text or not text


def test_genai_and_onnxruntime_give_the_same_tokens(artifact: Artifact, model: TextModel) -> None:
    tokens = model.encode("hello").tolist()
    assert continuation(model, tokens, 12) == greedy(artifact, tokens, 12)


def test_streams_what_it_generates(model: TextModel) -> None:
    tokens = continuation(model, model.encode("hello").tolist(), 8)
    text = "".join(model.stream("hello", Sampling(tokens=8)))
    assert text.rstrip("�") == str(model._tokenizer.decode(tokens)).rstrip("�")


def test_a_full_context_ends_the_answer(model: TextModel) -> None:
    pieces = list(model.stream("x" * (model.context - 3), Sampling(tokens=100)))
    assert len(pieces) <= 2
    with pytest.raises(InputError, match="do not fit the context of 160"):
        list(model.stream("x" * model.context, Sampling()))


def test_sampling_is_repeatable(model: TextModel) -> None:
    choices = Sampling(tokens=10, temperature=1.5, top_k=50, top_p=0.9, seed=3)
    assert list(model.stream("a", choices)) == list(model.stream("a", choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tokens": 0}, "tokens must be 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top-p must be"),
        ({"top_p": 1.1}, "top-p must be"),
        ({"top_k": -1}, "top-k must be"),
    ],
)
def test_bad_sampling_is_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**choices)


@pytest.mark.parametrize("counts", [(3, 4, 5), (1, 1, 1)])
def test_chat_equals_a_fresh_cache(model: TextModel, counts: tuple[int, ...]) -> None:
    """Each turn generates what the whole conversation gives from an empty cache."""
    conversation = model.chat(Sampling())
    for count, message in zip(counts, ("one", "two", "six"), strict=True):
        conversation._sampling = Sampling(tokens=count)
        messages = [*conversation._messages, {"role": "user", "content": message}]
        tokens = model._encode(model.render(messages), special=False).tolist()
        list(conversation.say(message))
        sequence = [int(token) for token in conversation._generator.get_sequence(0)]
        assert sequence[: len(tokens)] == tokens
        assert sequence[len(tokens) :] == continuation(model, tokens, count)


@pytest.mark.parametrize("kept", [None, -1, 5, 0])
def test_the_cache_follows_the_conversation(model: TextModel, kept: int | None) -> None:
    """Tokens that extend what the cache holds, or agree with its first ``kept`` tokens only."""
    conversation = model.chat(Sampling())
    conversation._append(model.encode("a first message"))
    for _ in range(4):
        conversation._generator.generate_next_token()
    held = [int(token) for token in conversation._generator.get_sequence(0)]
    tokens = [*held[:kept], *model.encode("Zsecond")[1:].tolist()]
    conversation._append(np.array(tokens, np.int32))
    for _ in range(5):
        conversation._generator.generate_next_token()
    sequence = [int(token) for token in conversation._generator.get_sequence(0)]
    assert sequence[: len(tokens)] == tokens
    assert sequence[len(tokens) :] == continuation(model, tokens, 5)


def test_chat_goes_on_after_an_end_token(artifact: Artifact, tmp_path: Path) -> None:
    """A generator that is done must still take the next message into its cache."""
    folder = Path(shutil.copytree(artifact.path, tmp_path / "out"))
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = END_TOKENS
    (folder / "genai_config.json").write_text(json.dumps(config))
    model = TextModel(Artifact.open(folder), threads=1)
    conversation = model.chat(Sampling(tokens=6))
    ended, answered = 0, 0
    for message in ("one", "two", "three", "four", "five", "six"):
        messages = [*conversation._messages, {"role": "user", "content": message}]
        tokens = model._encode(model.render(messages), special=False).tolist()
        after_end = len(conversation._messages) > 0 and conversation._generator.is_done()
        list(conversation.say(message))
        answer = [int(token) for token in conversation._generator.get_sequence(0)][len(tokens) :]
        assert answer == continuation(model, tokens, 6)
        ended += after_end
        answered += after_end and len(answer) > 0
    assert ended, "choose END_TOKENS that end an answer"
    assert answered, "choose END_TOKENS that do not end every answer"


def test_chat_says_when_the_context_is_full(model: TextModel) -> None:
    conversation = model.chat(Sampling(tokens=1000))
    list(conversation.say("hello"))
    assert conversation.full
    with pytest.raises(InputError, match="do not fit the context"):
        list(conversation.say("more" * 50))


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    model = TextModel(artifacts.write(tmp_path / "out", chat=False), threads=1)
    with pytest.raises(InputError, match="chat template; use --prompt"):
        list(model.chat(Sampling()).say("hello"))


def test_missing_genai_names_the_extra(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ToolchainError, match=r'pip install "bitcompile\[llm\]"'):
        TextModel(artifact)


def test_a_model_of_tensors_has_no_text(artifact: Artifact) -> None:
    plain = Artifact(artifact.path, {**artifact.manifest, "language": None})
    with pytest.raises(InputError, match="--input and --output"):
        TextModel(plain)


# --- tensors ------------------------------------------------------------------------------------


def feeds(tokens: int = 3) -> dict[str, Any]:
    c = artifacts.CONFIG
    cache = np.zeros((1, c.kv_heads, 0, c.head_size), np.float32)
    return {
        "input_ids": np.arange(tokens)[None],
        "attention_mask": np.ones((1, tokens), np.int64),
        **{f"past_key_values.{i}.{n}": cache for i in range(c.layers) for n in ("key", "value")},
    }


def test_tensors_go_in_and_come_out(artifact: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds())
    shapes = run_tensors(artifact, tmp_path / "in.npz", tmp_path / "out.npz", threads=1)
    assert shapes["logits"] == (1, 1, artifacts.CONFIG.vocab)
    with np.load(tmp_path / "out.npz") as saved:
        session = runtime.load(artifact.path, threads=1)
        expected = session.run(["logits"], feeds())[0]
        np.testing.assert_array_equal(saved["logits"], expected)
        assert set(saved.files) == set(shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, r"'input_ids' is missing; the model takes input_ids tensor\(int64\)"),
        ({"stray": np.zeros(1)}, "no input 'stray'; it takes input_ids"),
        ({"input_ids": np.zeros((1, 3), np.int32)}, "is int32, not int64"),
        ({"input_ids": np.zeros(3, np.int64)}, r"shape \[3\], not \['batch', 'seq'\]"),
        (
            {"past_key_values.0.key": np.zeros((1, 5, 0, 16), np.float32)},
            r"shape \[1, 5, 0, 16\]",
        ),
        ({"input_ids": np.zeros((2, 3), np.int64)}, "onnxruntime refused"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    artifact: Artifact, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arrays = {k: v for k, v in {**feeds(), **change}.items() if v is not None}
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(InputError, match=message):
        run_tensors(artifact, tmp_path / "in.npz", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_unreadable_tensors_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", input_ids=np.array([object()], dtype=object))
    for name in ("missing.npz", "text.npz", "single.npy", "pickled.npz"):
        with pytest.raises(InputError):
            run_tensors(artifact, tmp_path / name, tmp_path / "out.npz")


def test_an_unwritable_output_is_a_usage_error(artifact: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds())
    with pytest.raises(UsageError, match="cannot write"):
        run_tensors(artifact, tmp_path / "in.npz", tmp_path / "no" / "out.npz")
