"""Text through onnxruntime-genai, tensors through plain onnxruntime."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitcompile import generate, runtime, verification
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
    list(model.stream("x", Sampling(tokens=1)))
    assert not model.full
    pieces = list(model.stream("x" * (model.context - 3), Sampling(tokens=100)))
    assert len(pieces) <= 2
    assert model.full
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


@pytest.mark.parametrize("name", ["genai_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}'])
def test_broken_configurations_are_input_errors(
    artifact: Artifact, tmp_path: Path, name: str, text: str
) -> None:
    folder = Path(shutil.copytree(artifact.path, tmp_path / "out"))
    (folder / name).write_text(text)
    with pytest.raises(InputError, match="onnxruntime-genai cannot load"):
        TextModel(Artifact.open(folder), threads=1)


class Failing:
    """An object of onnxruntime-genai, one method of which fails."""

    def __init__(self, real: Any, method: str) -> None:
        self._real, self._method = real, method

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("bad\nallocation")

        return fail if name == self._method else getattr(self._real, name)


@pytest.mark.parametrize("method", ["append_tokens", "generate_next_token", "rewind_to"])
def test_errors_of_genai_are_typed(
    model: TextModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TextModel._generator

    def failing(self: TextModel, *arguments: Any) -> Any:
        return Failing(real(self, *arguments), method)

    monkeypatch.setattr(TextModel, "_generator", failing)
    conversation = model.chat(Sampling(tokens=2))
    conversation._generator._real.append_tokens(model.encode("held"))
    with pytest.raises(InputError, match=r"onnxruntime-genai cannot .*: bad allocation"):
        list(conversation.say("hello"))
    if method != "rewind_to":
        with pytest.raises(InputError, match=r"onnxruntime-genai cannot .*: bad allocation"):
            list(model.stream("hello", Sampling(tokens=2)))


def test_a_cache_that_cannot_be_made_is_an_input_error(model: TextModel) -> None:
    with pytest.raises(InputError, match="cannot make a KV cache of -1 tokens"):
        model._generator(-1, Sampling())


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


def header_of(shape: str) -> bytes:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    """A ``.npz`` file with the one member ``input_ids``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        made.writestr("input_ids.npy", data)
    return bytearray(file.getvalue())


GOOD = header_of("(1, 400)") + np.random.default_rng(0).bytes(3200)


def with_byte(data: bytearray, at: int, value: int) -> bytearray:
    data[at] = value
    return data


DAMAGED: dict[str, Callable[[], bytes | bytearray]] = {
    "truncated": lambda: archive(GOOD)[:2000],
    "empty": lambda: b"",
    "crc": lambda: with_byte(archive(GOOD, zipfile.ZIP_STORED), 2000, 0),
    "stream": lambda: with_byte(archive(GOOD), 50, 0xFF),
    "method": lambda: archive(GOOD).replace(b"\x14\0\0\0\x08", b"\x14\0\0\0\x63"),
    "encrypted": lambda: archive(GOOD).replace(b"\x14\0\0\0", b"\x14\0\1\0"),
    "huge": lambda: archive(header_of(f"(1, {10**15})")),
    "no array": lambda: archive(b"hello"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tensor_files_are_input_errors(
    artifact: Artifact, tmp_path: Path, damage: str
) -> None:
    (tmp_path / "in.npz").write_bytes(DAMAGED[damage]())
    with pytest.raises(InputError, match=r"in\.npz") as caught:
        run_tensors(artifact, tmp_path / "in.npz", tmp_path / "out.npz")
    assert "\n" not in str(caught.value)


def test_an_unwritable_output_is_a_usage_error(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the model is run."""
    np.savez(tmp_path / "in.npz", **feeds())
    monkeypatch.setattr(runtime, "load", None)
    loop = tmp_path / "loop"
    loop.symlink_to(loop / "x")
    wrong = [tmp_path / "no" / "out.npz", tmp_path / "in.npz" / "out.npz", tmp_path, loop / "out"]
    for destination in (*wrong, Path("/dev/null"), tmp_path / ("x" * 256)):
        with pytest.raises(UsageError, match="cannot write"):
            run_tensors(artifact, tmp_path / "in.npz", destination)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ToolchainError),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), ToolchainError),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), ToolchainError),
        (OSError(errno.EIO, os.strerror(errno.EIO)), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_output_leaves_the_old_file(
    tmp_path: Path,
    failure: BaseException,
    expected: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    (tmp_path / "out.npz").write_text("precious")
    monkeypatch.setattr(np.lib.format, "write_array", fail)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(expected):
        generate._write_npz(tmp_path / "out.npz", {"y": np.zeros(3)})
    assert (tmp_path / "out.npz").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "out.npz"]


def test_a_linked_output_stays_a_link(artifact: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds())
    (tmp_path / "link.npz").symlink_to("real.npz")
    run_tensors(artifact, tmp_path / "in.npz", tmp_path / "link.npz", threads=1)
    assert (tmp_path / "link.npz").is_symlink()
    assert np.load(tmp_path / "real.npz").files


def test_outputs_of_any_name_are_saved(tmp_path: Path) -> None:
    arrays = {name: np.arange(3) for name in ("file", "allow_pickle", "arr_0", "a/b", "y z")}
    generate._write_npz(tmp_path / "out.npz", arrays)
    with np.load(tmp_path / "out.npz") as saved:
        assert set(saved.files) == set(arrays)
        np.testing.assert_array_equal(saved["file"], np.arange(3))


def test_text_that_is_no_utf8(model: TextModel) -> None:
    with pytest.raises(InputError, match="not valid UTF-8"):
        list(model.stream("\udcff bad", Sampling(tokens=1)))


def test_seeds_have_31_bits() -> None:
    with pytest.raises(UsageError, match="seed must be a number of 31 bits"):
        Sampling(seed=1 << 31)


def test_outputs_do_not_replace_the_input(artifact: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    np.savez(file, x=np.zeros(1))
    with pytest.raises(UsageError, match="is the input"):
        run_tensors(artifact, file, file)


def test_a_file_of_no_arrays_is_not_to_be_unpickled(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "in.npz").write_text("# text")
    with pytest.raises(InputError, match="holds no plain arrays: save them"):
        run_tensors(artifact, tmp_path / "in.npz", tmp_path / "out.npz")
