"""What is fuzzed: one function a kind of input that makes valid ones and says how they are read."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import plugin
from tests.fuzz.edits import spoil, spoil_json
from tests.fuzz.engine import Prepared, Stopped, Target

DEPTH = 8
"""One of so many inputs is read on after its description: making a model or session costs most."""


def numbered(number: int, data: bytes) -> bytes:
    """A case: which valid input it was, then its bytes."""
    return bytes([number]) + data


def files(bases: Sequence[bytes], **options: int) -> Callable[[Random], bytes]:
    """Draws spoiled files."""

    def draw(random: Random) -> bytes:
        number = random.randrange(len(bases))
        return numbered(number, spoil(random, bases[number], **options))

    return draw


def texts(
    documents: Sequence[Any], encode: Callable[[int, bytes], bytes] = numbered
) -> Callable[[Random], bytes]:
    """Draws spoiled texts of JSON; ``encode`` makes a case of its number and the text."""

    def draw(random: Random) -> bytes:
        number = random.randrange(len(documents))
        return encode(number, spoil_json(random, documents[number]))

    return draw


def deep(case: bytes, one_of: int = DEPTH) -> bool:
    """Whether this case is read to its end."""
    return zlib.crc32(case) % one_of == 0


def stop_after(phase: str) -> Callable[[str], None]:
    """Progress callback that ends a conversion: from its export on, no file is read."""

    def report(begun: str) -> None:
        if begun in (phase, "exporting graph"):
            raise Stopped("read")

    return report


def stop(case: bytes, one_of: int) -> Callable[[str], None]:
    """Ends a conversion where weights are read, if this case is not a deep one."""
    return stop_after("exporting graph" if deep(case, one_of) else "reading weights")


# --- artifacts ----------------------------------------------------------------------------------


def manifest(work: Path) -> Prepared:
    """``bitcompile.json`` of a whole artifact."""
    from bitcompile import runtime
    from bitcompile.artifact import MANIFEST, Artifact
    from bitcompile.inspection import inspect
    from tests import artifacts

    made = artifacts.write(work / "out")
    documents = [json.loads((made.path / MANIFEST).read_text())]

    def check(case: bytes) -> None:
        (made.path / MANIFEST).write_bytes(case[1:])
        artifact = Artifact.open(made.path)
        artifact.check_hashes()
        inspect(made.path)
        runtime.session_options(made.path)
        if deep(case):
            runtime.load(made.path)

    return Prepared(texts(documents), check)


# --- checkpoints --------------------------------------------------------------------------------


def _checkpoints(work: Path) -> list[Path]:
    from tests.checkpoints import DIRECT, INVERSE, ONLINE, Recipe, make
    from tests.test_architectures import remote_bitnet

    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 36, "vocab_size": 33}  # fmt: skip
    recipes = [
        Recipe("BitNetForCausalLM", DIRECT, small),
        Recipe("LlamaForCausalLM", INVERSE, {**small, "attention_bias": True}),
        Recipe("Qwen3Model", {**ONLINE, "use_rms_norm": True}, {**small, "head_dim": 16}),
    ]
    folders = [work / f"checkpoint-{i}" for i in range(len(recipes))]
    for recipe, folder in zip(recipes, folders, strict=True):
        make(recipe, folder)
    remote_bitnet(work / "remote")
    return [*folders, work / "remote"]


def config(work: Path) -> Prepared:
    """``config.json`` beside weights that fitted it."""
    folders = _checkpoints(work)
    documents = [json.loads((folder / "config.json").read_text()) for folder in folders]
    return Prepared(texts(documents), _loading(folders, "config.json", DEPTH))


def safetensors(work: Path) -> Prepared:
    """``model.safetensors``: spoiled bytes, or a header that is JSON and says something else."""
    folders = _checkpoints(work)
    whole = [(folder / "model.safetensors").read_bytes() for folder in folders]
    sizes = [struct.unpack("<Q", data[:8])[0] for data in whole]
    headers = [json.loads(data[8 : 8 + size]) for data, size in zip(whole, sizes, strict=True)]

    def file(number: int, text: bytes) -> bytes:
        data = whole[number][8 + sizes[number] :]
        return numbered(number, struct.pack("<Q", len(text)) + text + data)

    ways = (files(whole), texts(headers, file))
    check = _loading(folders, "model.safetensors", 1)
    return Prepared(lambda random: random.choice(ways)(random), check)


def _loading(folders: Sequence[Path], name: str, depth: int) -> Callable[[bytes], None]:
    """Converts the checkpoint whose file ``name`` is the case; one of ``depth`` to the export."""
    from bitcompile.frontends import huggingface
    from bitcompile.inspection import inspect

    valid = [(folder / name).read_bytes() for folder in folders]

    def check(case: bytes) -> None:
        number = case[0] % len(folders)
        file = folders[number] / name
        file.write_bytes(case[1:])
        try:
            inspect(folders[number])
            huggingface.load(str(folders[number]), progress=stop(case, depth))
        finally:
            file.write_bytes(valid[number])

    return check


# --- files --------------------------------------------------------------------------------------


def gguf(work: Path) -> Prepared:
    """GGUF files of several ternary types, with and without a tokenizer."""
    import torch

    from bitcompile.frontends import gguf as front_end
    from tests import gguf_files
    from tests.checkpoints import DIRECT, Recipe, make

    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
             "intermediate_size": 64, "vocab_size": 21}  # fmt: skip
    vocabulary = {chr(97 + i): i for i in range(20)}
    (work / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary, "merges": []}, "added_tokens": []})
    )
    bases = []
    for name, architecture, kind, wide in (
        ("BitNetForCausalLM", "bitnet-b1.58", "k64", 64),
        ("LlamaForCausalLM", "llama", 64, 64),
        ("Qwen3ForCausalLM", "qwen3", gguf_files.Type.TQ2_0, 256),
    ):
        sizes = {**small, "hidden_size": wide, "intermediate_size": wide, "head_dim": wide // 4}
        model = make(Recipe(name, DIRECT, sizes, torch.float16), work / architecture)
        path = work / f"{architecture}.gguf"
        add = gguf_files.byte_level(work / "tokenizer.json", "gpt-2")
        ternary = gguf_files.ternary_of(model)
        gguf_files.write(path, model, architecture, ternary, kind, metadata=add)
        bases.append(path.read_bytes())

    def check(case: bytes) -> None:
        (work / "case.gguf").write_bytes(case[1:])
        front_end.load(str(work / "case.gguf"), progress=stop(case, 3))

    return Prepared(files(bases), check)


def onnx(work: Path) -> Prepared:
    """Foreign ONNX: fake-quantised layers, and a portable decoder with our own operators."""
    import onnx_ir as ir

    from bitcompile import passing
    from bitcompile.frontends import foreign
    from bitcompile.frontends.surroundings import quiet
    from bitcompile.passes import pipeline
    from tests import graphs
    from tests.fuzz.protos import spoil_proto
    from tests.test_recognize_bit_linear import AUTO, model

    tiny = graphs.Decoder(layers=1, hidden=20, ffn=8, vocab=9, context=4)
    protos = [ir.to_proto(model(AUTO)), ir.to_proto(graphs.decoder(tiny))]
    raw = files([proto.SerializeToString() for proto in protos], focus=1 << 20)

    def draw(random: Random) -> bytes:
        if random.random() < 0.25:
            return raw(random)
        number = random.randrange(len(protos))
        return numbered(number, spoil_proto(random, protos[number]))

    def check(case: bytes) -> None:
        (work / "case.onnx").write_bytes(case[1:])
        with quiet():  # as a build does
            imported = foreign.load(str(work / "case.onnx"))
            passing.run(imported.graph, pipeline(passing.Options("float", "all")))

    return Prepared(draw, check)


TARGETS = {
    target.name: target
    for target in (
        Target("manifest", manifest),
        Target("config", config),
        Target("safetensors", safetensors),
        Target("gguf", gguf),
        Target("onnx", onnx),
        Target("plugin", plugin.prepare),
    )
}
