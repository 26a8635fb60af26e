"""Run an artifact: text through onnxruntime-genai, tensors through plain onnxruntime."""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitcompile import runtime
from bitcompile.artifact import Artifact
from bitcompile.companions import PROVIDERS
from bitcompile.errors import InputError, ToolchainError, UsageError, writing

_ELEMENTS: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    tokens: int = 128
    """Most tokens of one answer."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Candidates kept, 0 for all."""
    seed: int | None = None
    """None draws a new one each time."""

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("tokens", self.tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k >= 0, "0 (all) or more"),
            ("seed", self.seed is None or abs(self.seed) < 1 << 31, "a number of 31 bits"),
        ):
            if not good:
                raise UsageError(f"{name} must be {rule}")

    def options(self) -> dict[str, Any]:
        """Search options of onnxruntime-genai."""
        if self.temperature == 0:
            return {"do_sample": False}
        options: dict[str, Any] = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        if self.seed is not None:
            options["random_seed"] = self.seed
        return options


class TextModel:
    """An artifact of a language model, loaded in onnxruntime-genai.

    Raises InputError if the artifact holds no language model, ToolchainError if onnxruntime-genai
    is not installed or the plugin is for another machine.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        if artifact.manifest["language"] is None:
            raise InputError(f"{artifact.path} is not a language model: use --input and --output")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be 1 or more, not {threads}")
        self._genai = _import_genai()
        runtime.require_onnxruntime(str(artifact.manifest["min_onnxruntime"]))
        runtime.require_host(artifact)
        options: dict[str, Any] = {}
        device = artifact.manifest["target"]["device"]
        if device in PROVIDERS:
            _require_gpu(self._genai)
            # One sequence can be replayed; prompts of several would not run.
            options["provider_options"] = [{PROVIDERS[device][0]: {"enable_cuda_graph": "1"}}]
        if threads is not None:
            options["intra_op_num_threads"] = threads
        self.context = int(artifact.manifest["language"]["context_length"])
        self.full = False
        """Whether the last :meth:`stream` ended because the context had no room left."""
        self._path = artifact.path
        runtime.session_options(artifact.path)  # what is wrong with the plugin, in our words
        with _calling_genai(f"load {artifact.path}"):
            config = self._genai.Config(str(artifact.path.absolute()))
            if options:
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = self._genai.Model(config)
            self._tokenizer = self._genai.Tokenizer(self._model)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Tokens int32 ``[n]`` of a prompt, with the special tokens Hugging Face would add."""
        return self._encode(text, special=True)

    def render(self, messages: list[dict[str, str]]) -> str:
        """``messages`` (role, content) in the tokenizer's chat template.

        Raises InputError if it has none.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                json.dumps(messages), add_generation_prompt=True
            )
        except Exception as error:  # see _calling_genai
            raise InputError(
                f"cannot chat with {self._path}: {runtime.one_line(error)} "
                "Its tokenizer needs a chat template; use --prompt"
            ) from error
        return str(text)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The continuation of ``prompt``, piece by piece.

        Raises InputError if the prompt is empty or does not fit the context.
        """
        tokens = self.encode(prompt)
        if len(tokens) == 0:
            raise InputError("the prompt is empty: give at least one character")
        self._require_room(len(tokens))
        # The KV cache is allocated whole, so it is made no longer than this answer can be.
        limit = min(self.context, len(tokens) + sampling.tokens)
        generator = self._generator(limit, sampling)
        with _calling_genai("read the prompt"):
            generator.append_tokens(tokens)
        yield from self._generate(generator, sampling.tokens)
        self.full = bool(generator.token_count() >= self.context)

    def chat(self, sampling: Sampling) -> Chat:
        """A conversation that keeps its KV cache."""
        return Chat(self, sampling)

    def _encode(self, text: str, special: bool) -> npt.NDArray[np.int32]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                "the prompt is not valid UTF-8: check the encoding of the terminal or the file"
            ) from None
        with _calling_genai("encode the text"):
            self._tokenizer.update_options(add_special_tokens="true" if special else "false")
            return np.asarray(self._tokenizer.encode(text), np.int32)

    def _generator(self, length: int, sampling: Sampling) -> Any:
        with _calling_genai(f"make a KV cache of {length} tokens"):
            params = self._genai.GeneratorParams(self._model)
            params.set_search_options(max_length=length, **sampling.options())
            return self._genai.Generator(self._model, params)

    def _generate(self, generator: Any, limit: int) -> Iterator[str]:
        """Up to ``limit`` tokens as text; ends early at an end token or a full context."""
        stream = self._tokenizer.create_stream()
        for _ in range(limit):
            if generator.is_done():
                return
            with _calling_genai("generate"):
                generator.generate_next_token()
                piece = stream.decode(int(generator.get_next_tokens()[0]))
            if piece:
                yield piece

    def _require_room(self, tokens: int) -> None:
        if tokens >= self.context:
            raise InputError(
                f"{tokens} tokens do not fit the context of {self.context}: "
                "shorten the text, or build with a larger --context"
            )


class Chat:
    """A conversation; each answer extends the KV cache of the ones before."""

    def __init__(self, model: TextModel, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._messages: list[dict[str, str]] = []
        self._generator = model._generator(model.context, sampling)

    @property
    def full(self) -> bool:
        """Whether the context has no room left."""
        return bool(self._generator.token_count() >= self._model.context)

    def say(self, message: str) -> Iterator[str]:
        """The answer to ``message``, piece by piece.

        Raises InputError if the conversation no longer fits the context.
        """
        self._messages.append({"role": "user", "content": message})
        tokens = self._model._encode(self._model.render(self._messages), special=False)
        self._model._require_room(len(tokens))
        self._append(tokens)
        answer = ""
        for piece in self._model._generate(self._generator, self._sampling.tokens):
            answer += piece
            yield piece
        self._messages.append({"role": "assistant", "content": answer})

    def _append(self, tokens: npt.NDArray[np.int32]) -> None:
        """Make ``tokens``, the whole conversation, what the KV cache holds.

        What the cache holds already is kept as far as it agrees: a template may end an answer in
        another way than the model did, or rewrite earlier turns.
        """
        held = np.asarray(self._generator.get_sequence(0))
        # The last token of an answer is sampled, but never reached the cache: it is fed again.
        length = max(min(len(held), len(tokens)) - 1, 0)
        same = held[:length] == tokens[:length]
        common = length if same.all() else int(np.argmin(same))
        with _calling_genai("read the message"):
            if len(held):
                self._generator.rewind_to(common)
            self._generator.append_tokens(tokens[common:])


@contextmanager
def _calling_genai(action: str) -> Iterator[None]:
    """Makes an error of onnxruntime-genai, which raises bare RuntimeErrors, an InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"onnxruntime-genai cannot {action}: {runtime.one_line(error)}") from error


def _import_genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError:
        raise ToolchainError(
            'text needs onnxruntime-genai: pip install "bitcompile[llm]"'
        ) from None
    return onnxruntime_genai


def _require_gpu(genai: Any) -> None:
    if genai.is_cuda_available():
        runtime.preload()
        return
    raise ToolchainError(
        "text on an NVIDIA GPU needs onnxruntime-genai-cuda and onnxruntime-gpu in the place of "
        "onnxruntime-genai and onnxruntime: pip uninstall -y onnxruntime onnxruntime-genai; "
        'pip install "onnxruntime-gpu[cuda,cudnn]" onnxruntime-genai-cuda'
    )


def run_tensors(
    artifact: Artifact, source: Path, destination: Path, threads: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Run the arrays of the ``.npz`` file ``source`` and save the outputs in ``destination``.

    Returns output name to shape. Raises InputError for an unreadable file, or an array whose
    name, dtype or shape the model does not take; UsageError or ToolchainError if ``destination``
    cannot be written.
    """
    destination = _output_file(destination)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the input: choose another file for the outputs")
    arrays = _read_npz(source)
    session = runtime.load(artifact.path, threads=threads)
    _check_inputs(arrays, session.get_inputs())
    _check_tokens(arrays, artifact.manifest.get("language"))
    names = [output.name for output in session.get_outputs()]
    try:
        results = session.run(names, arrays)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise InputError(f"onnxruntime refused {source}: {runtime.one_line(error)}") from error
    outputs = dict(zip(names, results, strict=True))
    for name, y in outputs.items():
        if not isinstance(y, np.ndarray) or y.dtype == object:
            raise InputError(f"output {name!r} is no array of numbers: run it from Python")
    _write_npz(destination, outputs)
    return {name: y.shape for name, y in outputs.items()}


def _read_npz(source: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(source, allow_pickle=False)
        single = not isinstance(loaded, np.lib.npyio.NpzFile)
        arrays = {} if single else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # a damaged file may fail in numpy, zipfile, zlib, struct, ...
        if "pickle" in str(error):
            raise InputError(
                f"{source} holds no plain arrays: save them with numpy.savez"
            ) from None
        raise InputError(f"cannot read {source}: {runtime.one_line(error)}") from error
    if single:
        raise InputError(f"{source} is a single array: save named ones with numpy.savez")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{name!r} in {source} is no array: save it with numpy.savez")
    return arrays


def _check_inputs(arrays: dict[str, npt.NDArray[Any]], declared: list[Any]) -> None:
    """Raises InputError at the first array that does not fit, naming what is expected."""
    expected = ", ".join(f"{i.name} {i.type}{i.shape}" for i in declared)
    for name in arrays.keys() - {i.name for i in declared}:
        raise InputError(f"the model has no input {name!r}; it takes {expected}")
    for i in declared:
        if i.name not in arrays:
            raise InputError(f"input {i.name!r} is missing; the model takes {expected}")
        if i.type == "tensor(bfloat16)":
            raise InputError(
                f"input {i.name!r} is bfloat16, which NumPy's files do not hold: use --prompt, or "
                "build with --activations float16"
            )
        array = arrays[i.name]
        wanted = _ELEMENTS.get(i.type)
        if wanted is not None and array.dtype != wanted:
            raise InputError(f"input {i.name!r} is {array.dtype}, not {np.dtype(wanted).name}")
        fits = len(array.shape) == len(i.shape) and all(
            not isinstance(want, int) or want == have
            for want, have in zip(i.shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(f"input {i.name!r} has shape {list(array.shape)}, not {i.shape}")


def _check_tokens(
    arrays: Mapping[str, npt.NDArray[Any]], language: Mapping[str, Any] | None
) -> None:
    """Raises InputError for a token that the vocabulary does not have.

    ONNX Runtime's lookup in a quantised table gives zeros for it.
    """
    if language is None or "input_ids" not in arrays:
        return
    tokens, size = arrays["input_ids"], language["vocab_size"]
    for token in tokens[(tokens < 0) | (tokens >= size)][:1]:
        raise InputError(f"input 'input_ids' has token {token}: they go from 0 to {size - 1}")


def _output_file(destination: Path) -> Path:
    """The file that ``destination`` stands for; raises UsageError unless it can be written."""
    with writing(destination):
        target = Path(os.path.realpath(destination))
        if not target.parent.is_dir():
            raise UsageError(f"cannot write {destination}: {target.parent} is not a folder")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write {destination}: {target.parent} is not writable")
        if target.exists() and not target.is_file():
            raise UsageError(f"cannot write {destination}: it is no regular file")
    return target


def _write_npz(destination: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """What ``numpy.savez`` writes, for arrays of any name; all of it, or the file stays as it was.

    Raises UsageError or ToolchainError if it cannot be written.
    """
    new = destination.with_name(f".bitcompile.{secrets.token_hex(4)}.tmp")
    try:
        with writing(destination):
            with zipfile.ZipFile(new, "x") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            new.replace(destination)
    finally:
        new.unlink(missing_ok=True)
