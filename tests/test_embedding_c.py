"""The C example with the installed onnxruntime, on the embedded model."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import bitcompile
from bitcompile.artifact import Artifact
from bitcompile.decoder import kv_bytes
from bitcompile.verification import empty_caches, step
from tests import embedding
from tests.embedding import COUNT, REFERENCE, STRICT, X86, C, prompt, zig
from tests.tools import onnxruntime_headers

TEXTS = list(REFERENCE)


class Options(ctypes.Structure):
    """``bcm_options``."""

    _fields_ = (
        ("folder", ctypes.c_char_p),
        ("library", ctypes.c_char_p),
        ("capacity", ctypes.c_size_t),
        ("threads", ctypes.c_int),
        ("spinning", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def artifact(embedded: Callable[[str], Artifact]) -> Artifact:
    return embedded("x86")


@pytest.fixture(scope="module")
def onnxruntime_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding.desktop_onnxruntime(tmp_path_factory.mktemp("onnxruntime"))


@pytest.fixture(scope="module")
def program(onnxruntime_folder: Path) -> Path:
    out = onnxruntime_folder / "generate"
    sources = (C / "generate.c", C / "bitcompile_model.c")
    libraries = (f"-L{onnxruntime_folder}", "-lonnxruntime", f"-Wl,-rpath,{onnxruntime_folder}")
    zig(*STRICT, "-target", X86, f"-I{onnxruntime_headers()}", *sources, *libraries, "-o", out)
    return out


@pytest.fixture(scope="module")
def api(onnxruntime_folder: Path) -> ctypes.CDLL:
    """``bitcompile_model.c`` as a shared library."""
    out = onnxruntime_folder / "libmodel.so"
    libraries = (f"-L{onnxruntime_folder}", "-lonnxruntime", f"-Wl,-rpath,{onnxruntime_folder}")
    sources = ("-shared", "-fPIC", C / "bitcompile_model.c")
    zig(*STRICT, "-target", X86, f"-I{onnxruntime_headers()}", *sources, *libraries, "-o", out)
    library = ctypes.CDLL(str(out))
    library.bcm_open.restype = library.bcm_feed.restype = ctypes.c_char_p
    library.bcm_vocabulary.restype = library.bcm_length.restype = ctypes.c_size_t
    library.bcm_cache_bytes.restype = ctypes.c_size_t
    library.bcm_argmax.restype = ctypes.c_int64
    return library


Feed = Callable[..., "npt.NDArray[np.float32] | str"]


@pytest.fixture
def model(api: ctypes.CDLL, artifact: Artifact) -> Iterator[ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    options = Options(os.fsencode(artifact.path), None, 24, 1, 0)
    assert api.bcm_open(ctypes.byref(options), ctypes.byref(handle)) is None
    yield handle
    api.bcm_close(handle)


@pytest.fixture
def feed(api: ctypes.CDLL, model: ctypes.c_void_p) -> Feed:
    """Logits of the last token, or the message."""

    def call(*tokens: int) -> npt.NDArray[np.float32] | str:
        row = ctypes.POINTER(ctypes.c_float)()
        ids = (ctypes.c_int64 * len(tokens))(*tokens)
        failure = api.bcm_feed(model, ids, ctypes.c_size_t(len(tokens)), ctypes.byref(row))
        if failure is not None:
            return str(failure.decode())
        return np.ctypeslib.as_array(row, (api.bcm_vocabulary(model),)).copy()

    return call


def in_python(artifact: Artifact, tokens: list[int]) -> embedding.Answer:
    session = bitcompile.load(artifact.path, threads=1)
    caches, feed = empty_caches(session), tokens
    chosen, rows = [], []
    for _ in range(COUNT):
        rows.append(step(session, np.array([feed], np.int64), caches)[0, -1].astype(np.float64))
        feed = [int(rows[-1].argmax())]
        chosen += feed
    return embedding.Answer(chosen, np.array(rows))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_logits_are_those_of_python(
    program: Path, artifact: Artifact, tmp_path: Path, text: str
) -> None:
    """To rounding edges: Python grows the cache, so ONNX Runtime's attention may add otherwise."""
    answer = embedding.generate([program], artifact.path, prompt(text), tmp_path)
    expected = in_python(artifact, prompt(text))
    assert embedding.agreed(expected, answer) == COUNT
    for i in range(COUNT):
        assert embedding.cosine(expected.logits[i], answer.logits[i]) >= 0.9999
        if expected.tokens[i] != answer.tokens[i]:
            break  # after a near-tie another text continues


def test_it_stops_at_the_end_token_and_reports_speed(program: Path, artifact: Artifact) -> None:
    expected = REFERENCE[TEXTS[0]]
    command = [program, artifact.path, "-t", 2, "-s", "-e", expected[4], *prompt(TEXTS[0])]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == expected[:5]
    assert "tokens/s" in done.stderr
    assert "KV cache" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "1"], "nowhere/libbitcompile_ops.so"),
        (["{artifact}", "-p", "{artifact}/model.onnx", "1"], "model.onnx"),
        (["{artifact}", "x"], "not a number in range: x"),
        (["{artifact}", "-n", "0", "1"], "not a number in range: 0"),
        (["{artifact}"], "no tokens to read"),
        (["{artifact}", "4096"], "a token is not in the vocabulary"),
        (["{artifact}", "-n", "1100", "1"], "less than total_sequence_length"),
    ],
)
def test_bad_input_gives_a_message(
    program: Path, artifact: Artifact, arguments: list[str], message: str
) -> None:
    command = [str(program), *(a.replace("{artifact}", str(artifact.path)) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    assert message in done.stderr


def test_a_folder_without_a_model_names_it(
    program: Path, artifact: Artifact, tmp_path: Path
) -> None:
    shutil.copyfile(artifact.library, tmp_path / artifact.library.name)
    command = [str(program), str(tmp_path), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/model.onnx" in done.stderr


def test_rewinding_forgets(api: ctypes.CDLL, model: ctypes.c_void_p, feed: Feed) -> None:
    first = feed(0, 7, 9)
    feed(11, 12)
    assert api.bcm_length(model) == 5
    api.bcm_rewind(model, ctypes.c_size_t(2))
    assert api.bcm_length(model) == 2
    again = feed(9)
    assert not isinstance(first, str)
    assert not isinstance(again, str)
    assert embedding.cosine(first, again) >= 0.9999
    api.bcm_rewind(model, ctypes.c_size_t(0))
    np.testing.assert_array_equal(feed(0, 7, 9), first)


def test_the_cache_has_the_size_of_the_formula(
    api: ctypes.CDLL, model: ctypes.c_void_p, artifact: Artifact
) -> None:
    language = artifact.manifest["language"]
    assert api.bcm_cache_bytes(model) == kv_bytes(language, 24)


def test_a_full_cache_is_refused_and_stays_usable(feed: Feed) -> None:
    feed(*range(20))
    message = feed(1, 2, 3, 4, 5)
    assert isinstance(message, str)
    assert "the KV cache is full" in message
    assert not isinstance(feed(1, 2, 3, 4), str)
    assert "no tokens" in str(feed())


def test_a_capacity_of_none_is_refused(api: ctypes.CDLL, artifact: Artifact) -> None:
    handle = ctypes.c_void_p()
    options = Options(os.fsencode(artifact.path), None, 0, 1, 0)
    assert b"capacity is 0" in api.bcm_open(ctypes.byref(options), ctypes.byref(handle))
    assert handle.value is None


def test_the_header_is_one_of_cpp_too(tmp_path: Path) -> None:
    source = tmp_path / "use.cc"
    source.write_text('#include "bitcompile_model.h"\nint main() { return bcm_length(nullptr); }\n')
    zig("-x", "c++", "-Wall", "-Werror", f"-I{C}", "-c", source, "-o", tmp_path / "use.o")


def test_the_number_of_tokens_is_the_references() -> None:
    assert all(len(tokens) == COUNT for tokens in REFERENCE.values())
