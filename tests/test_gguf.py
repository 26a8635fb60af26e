"""GGUF files: every ternary type, order and family against transformers, and what is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import bitcompile
from bitcompile import numerics
from bitcompile.errors import BitcompileError, InputError, UsageError
from bitcompile.frontends import gguf_order, gguf_ternary, gguf_tokenizer
from bitcompile.frontends.checkpoint import Checkpoint, WeightForm
from bitcompile.frontends.gguf import GgufWeights, Metadata, load, unpermuted
from bitcompile.frontends.gguf_file import GgufFile
from bitcompile.generate import Sampling, TextModel
from tests import gguf_files
from tests.checkpoints import (
    DIRECT,
    Recipe,
    cosine,
    make,
    reference_logits,
    session,
    step,
)

ROOT = Path(__file__).parent.parent
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Widths that blocks of 256 columns divide."""
KINDS = ("k128", "k64", "n4", Type.TQ2_0, Type.TQ1_0, 64, 128, Type.F16, Type.F32)
"""Orders of I2_S, types of the package, and columns of a block of Q2_0."""
GROUPS = {Type.TQ2_0: 256, Type.TQ1_0: 256, 64: 64, 128: 128, Type.F16: 128, Type.F32: 32}
"""Columns that share a scale in the group-scaled weights of a type."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], Any, Type]] = {
    "bitnet-b1.58": ("BitNetForCausalLM", {"tie_word_embeddings": True}, "k128", Type.F16),
    "bitnet": ("BitNetForCausalLM", {"hidden_act": "silu"}, Type.TQ1_0, Type.F32),
    "llama": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3, "attention_bias": True},
        "k64",
        Type.F32,
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 64}, Type.TQ2_0, Type.F32),
}
"""Architecture in the file to transformers class, configuration, ternary type, table type."""


def checkpoint(folder: Path, architecture: str, config: dict[str, Any]) -> Any:
    """A checkpoint whose scales and tables are float16: TQ types hold no more."""
    recipe = Recipe(architecture, DIRECT, {**WIDE, **config}, torch.float16)
    return make(recipe, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A BitNet checkpoint of one layer, and transformers' model of it."""
    path = tmp_path_factory.mktemp("gguf") / "base"
    return path, checkpoint(path, "BitNetForCausalLM", {"num_hidden_layers": 1})


def write(base: tuple[Path, Any], path: Path, kind: Any = "k128", **options: Any) -> Path:
    model = base[1]
    ternary = gguf_files.ternary_of(model)
    return gguf_files.write(path, model, "bitnet-b1.58", ternary, kind, **options)


def weights(path: Path, kind: Any) -> GgufWeights:
    file = GgufFile(str(path))
    return GgufWeights(file, Metadata(file), kind if isinstance(kind, str) else None)


# --- the same weights, whatever the file --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_gives_the_weights_of_the_checkpoint(
    base: tuple[Path, Any], tmp_path: Path, kind: Any
) -> None:
    """Packed bytes, scales and int32 accumulators equal those of the packed checkpoint."""
    path, model = base
    stored = Checkpoint.open(str(path))
    stored.open_weights()
    form = WeightForm.of(stored.config)
    converted = weights(write(base, tmp_path / "m.gguf", kind), kind)
    rng = np.random.default_rng(0)
    for name, (ternary, _) in gguf_files.ternary_of(model).items():
        N, K = ternary.shape
        ours, theirs = converted.ternary(name, N, K), form.read(stored, name, N, K)
        assert (ours.data == theirs.data).all()
        assert (ours.scale == theirs.scale).all()
        q, _ = numerics.quantize_activations(rng.standard_normal((3, K)).astype(np.float32))
        expected = q.astype(np.int32) @ ternary.T.astype(np.int32)
        assert (numerics.integer_matmul(q, ours.ternary()) == expected).all()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    name, config, kind, table = FAMILIES[architecture]
    model = checkpoint(tmp_path / "hf", name, config)
    ternary = gguf_files.ternary_of(model)
    extra = {}
    if architecture == "llama":
        extra = {"rope_freqs.weight": gguf_files.rope_factors(model.config)}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, architecture, ternary, kind, table=table, extra=extra)
    imported = load(str(path), order=kind if isinstance(kind, str) else None)
    assert imported.source == "model.gguf"
    language = imported.language
    assert language is not None
    assert (language.num_layers, language.vocab_size, language.tokenizer_files) == (2, 97, ())
    run, cache = session(imported.graph), {}
    ids = np.random.default_rng(0).integers(0, 97, (1, 24)).tolist()
    measured = [step(run, [ids[0][:20]], cache), step(run, [ids[0][20:]], cache)]
    expected = reference_logits(model, ids)
    assert cosine(np.concatenate(measured, axis=1), expected) >= 0.9999


def grouped(model: Any, columns: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The ternary layers of ``model`` with a float16 scale a row and group; one group is zero."""
    rng = np.random.default_rng(columns)
    result = {}
    for name, (weight, _) in gguf_files.ternary_of(model).items():
        N, K = weight.shape
        scale = rng.uniform(0.01, 0.2, (N, K // columns)).astype(np.float16).astype(np.float32)
        scale[0, 0] = 0
        weight[0, :columns] = 0
        result[name] = weight, scale
    return result


@pytest.mark.parametrize("kind", GROUPS, ids=str)
def test_scales_of_groups_are_kept(base: tuple[Path, Any], tmp_path: Path, kind: Any) -> None:
    """Blocks of a row with scales of their own: the same floats, and the same int32 products."""
    ternary = grouped(base[1], GROUPS[kind])
    path = tmp_path / "m.gguf"
    gguf_files.write(path, base[1], "bitnet-b1.58", ternary, kind)
    converted = weights(path, kind)
    rng = np.random.default_rng(0)
    for name, (weight, scale) in ternary.items():
        N, K = weight.shape
        packed = converted.ternary(name, N, K)
        assert packed.group_size == (0 if GROUPS[kind] == K else GROUPS[kind])
        assert (packed.ternary() == weight).all()
        assert (packed.scale == scale).all()
        q, _ = numerics.quantize_activations(rng.standard_normal((3, K)).astype(np.float32))
        for begin in range(0, K, GROUPS[kind]):
            span = slice(begin, begin + GROUPS[kind])
            expected = q[:, span].astype(np.int32) @ weight[:, span].T.astype(np.int32)
            assert (
                numerics.integer_matmul(q[:, span], packed.ternary()[:, span]) == expected
            ).all()


def test_rows_move_with_the_scales_of_their_groups(tmp_path: Path) -> None:
    """llama.cpp's order of query and key rows, undone for codes and scales alike."""
    model = checkpoint(tmp_path / "hf", "LlamaForCausalLM", {"num_hidden_layers": 1})
    ternary = grouped(model, 64)
    stored = {
        name: (weight, gguf_files.permuted(scale, 2 if "k_proj" in name else 4))
        if name.endswith(("q_proj", "k_proj"))
        else (weight, scale)
        for name, (weight, scale) in ternary.items()
    }
    gguf_files.write(tmp_path / "m.gguf", model, "llama", stored, 64)
    converted = weights(tmp_path / "m.gguf", 64)
    for name, (weight, scale) in ternary.items():
        packed = converted.ternary(name, *weight.shape)
        assert (packed.ternary() == weight).all()
        assert (packed.scale == scale).all()


def test_tables_may_be_of_q2_0(base: tuple[Path, Any], tmp_path: Path) -> None:
    """A table may use code 3, twice the scale; a ternary weight may not."""
    weight = np.random.default_rng(0).integers(-1, 3, (97, 256)).astype(np.int8)
    data = gguf_files.q2_bytes(weight, 0.25, 128)
    values = gguf_ternary.block_values("table", "Q2_0 g128", data.reshape(-1), weight.shape)
    assert (values == weight * np.float32(0.25)).all()
    with pytest.raises(InputError, match="w is not ternary: a packed code is 3"):
        gguf_ternary.block_weight("w", "Q2_0 g128", data.reshape(-1), *weight.shape)


def test_q2_0_that_fits_both_block_sizes_is_refused(base: tuple[Path, Any], tmp_path: Path) -> None:
    """One tensor whose two sizes lie within one padding step, 128 values: 36 or 34 bytes."""
    ternary = {"x": np.ones((1, 128), np.int8)}
    data = gguf_files.q2_bytes(ternary["x"], 1.0, 64)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", data.view(np.int8), raw_shape=(1, 128), raw_dtype=gguf_files.Q2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="too few to be told as blocks of 64 or of 128"):
        GgufFile(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("number", "name"), [(142, "PQ2_0"), (143, "PTQ1_0")])
def test_types_of_rotated_models_are_refused(
    base: tuple[Path, Any], tmp_path: Path, number: int, name: str
) -> None:
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, f"attn_q.weight is {name}, whose models may need rotated activations")


def test_unpermuted_undoes_the_converter() -> None:
    rows = np.arange(5 * 8 * 3).reshape(40, 3)
    stored = gguf_files.permuted(rows, 5)
    assert (stored != rows).any()
    assert (unpermuted(stored, 5) == rows).all()
    with pytest.raises(InputError, match="40 query or key rows are no 3 heads"):
        unpermuted(rows, 3)


def test_a_scale_stored_apart_multiplies(base: tuple[Path, Any], tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.scale": np.array([0.5], np.float32)}
    converted = weights(write(base, tmp_path / "m.gguf", extra=extra), "k128")
    module = "model.layers.0.self_attn.q_proj"
    ternary, scale = gguf_files.ternary_of(base[1])[module]
    assert converted.ternary(module, *ternary.shape).scale[0, 0] == np.float32(scale / 2)
    assert "blk.0.attn_q.scale" not in converted.unused()


# --- the order of I2_S --------------------------------------------------------------------------


def trained(order: str) -> list[gguf_order.Layer]:
    """Every second layer of the trained checkpoint, as an I2_S file in ``order`` holds it."""
    stored = Checkpoint.open(str(ROOT / "examples" / "docs-bitnet-25m"))
    stored.open_weights()
    config, form = stored.config, WeightForm.of(stored.config)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "gate": ("mlp.gate_proj", ffn, hidden),
        "up": ("mlp.up_proj", ffn, hidden),
        "down": ("mlp.down_proj", hidden, ffn),
        "value": ("self_attn.v_proj", hidden * kv_heads // heads, hidden),
        "output": ("self_attn.o_proj", hidden, hidden),
    }
    layers = []
    for i in range(0, config["num_hidden_layers"], 2):
        tensors = {}
        for role, (module, N, K) in shapes.items():
            weight = form.read(stored, f"model.layers.{i}.{module}", N, K).ternary()
            tensors[role] = (gguf_files.i2s_bytes(weight, 1.0, order).view(np.uint8)[:-32], N, K)
        layers.append(gguf_order.Layer(tensors, heads, kv_heads))
    return layers


def shapes_of(layers: list[gguf_order.Layer]) -> list[tuple[int, int]]:
    return [(N, K) for layer in layers for _, N, K in layer.tensors.values()]


@pytest.mark.parametrize("order", gguf_ternary.I2S_ORDERS)
def test_the_order_of_trained_weights_is_found(order: str) -> None:
    layers = trained(order)
    assert gguf_order.i2s_order(shapes_of(layers), layers) == order


def test_the_order_of_random_weights_is_asked_for(base: tuple[Path, Any], tmp_path: Path) -> None:
    path = write(base, tmp_path / "m.gguf")
    refused(path, r"do not say in which order.*give --i2s-order.*k128.*k64.*n4")


def test_shuffled_units_are_not_taken_for_an_order() -> None:
    """What agrees in trained weights is gone, their statistics are not."""
    rng = np.random.default_rng(0)
    layers = []
    for layer in trained("k128"):
        tensors = {}
        for role, (data, N, K) in layer.tensors.items():
            codes = gguf_ternary.i2s_codes(data, N, K, "k128").astype(np.int8) - 1
            shuffled = codes[rng.permutation(N)][:, rng.permutation(K)]
            tensors[role] = (gguf_files.i2s_bytes(shuffled, 1.0, "k128").view(np.uint8)[:-32], N, K)
        layers.append(gguf_order.Layer(tensors, layer.heads, layer.kv_heads))
    with pytest.raises(InputError, match="weights do not tell"):
        gguf_order.i2s_order(shapes_of(layers), layers)


def test_a_width_of_64_columns_tells_the_order() -> None:
    assert gguf_order.i2s_order([(32, 128), (128, 192)], []) == "k64"
    with pytest.raises(InputError, match=r"\[32, 100\] weight in any known order"):
        gguf_order.i2s_order([(32, 100)], [])


def test_the_order_can_be_given(base: tuple[Path, Any], tmp_path: Path) -> None:
    path = write(base, tmp_path / "m.gguf", "k64")
    stopped(path, "k64")
    with pytest.raises(UsageError, match=r"i2s_order must be one of k128, k64, n4, not arm"):
        bitcompile.build(path, out=tmp_path / "out", i2s_order="arm")
    with pytest.raises(UsageError, match=r"i2s_order belongs to \.gguf files"):
        bitcompile.build(base[0], out=tmp_path / "out", i2s_order="k64")
    with pytest.raises(UsageError, match="order 'arm' is not one of k128, k64, n4"):
        load(str(path), order="arm")


# --- tokenizers ---------------------------------------------------------------------------------

TEXTS = [
    "The following example creates a table",
    "  def f(x):\n\treturn x  # 12345 naïve — 日本語 🙂",
    "it's  <|end_of_text|> I'LL\r\n\r\n 3.14",
]


def metadata_of(path: Path) -> dict[str, Any]:
    return GgufFile(str(path)).metadata


def tokenizer_file(path: Path, add: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_byte_level_tokenizer_encodes_as_the_original(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    original = ROOT / "examples" / "docs-bitnet-25m" / "tokenizer.json"
    path = tokenizer_file(tmp_path / "t.gguf", gguf_files.byte_level(original, "gpt-2"))
    files = gguf_tokenizer.write(metadata_of(path), tmp_path)
    ours, theirs = Tokenizer.from_file(str(files[0])), Tokenizer.from_file(str(original))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == [0, *theirs.encode(text).ids]
        assert ours.decode(ids) == theirs.decode(theirs.encode(text).ids)
    config = json.loads(files[1].read_text())
    assert (config["bos_token"], config["pad_token"]) == ("<|begin_of_text|>", "<|pad|>")


def test_modern_splits_cut_numbers_and_contractions() -> None:
    from tokenizers import Regex, pre_tokenizers

    def words(pre: str, text: str) -> list[str]:
        split = pre_tokenizers.Split(Regex(gguf_tokenizer.SPLITS[pre]), behavior="isolated")
        return [word for word, _ in split.pre_tokenize_str(text)]

    assert words("llama-bpe", "I'LL 12345") == ["I", "'LL", " ", "123", "45"]
    assert words("qwen2", "I'LL 123") == ["I", "'LL", " ", "1", "2", "3"]
    assert words("gpt-2", "I'LL 12345") == ["I", "'", "LL", " 12345"]


def test_the_vocabulary_of_llama3_names_its_split(tmp_path: Path) -> None:
    """Files of BitNet b1.58 2B-4T give no tokenizer.ggml.pre."""
    from tokenizers import Tokenizer

    tokens = [*"'.ILabc0123456789", "123", *(f"<unused {i}>" for i in range(128256))]
    for i, token in gguf_tokenizer.LLAMA3_TOKENS.items():
        tokens[i] = token
    values = {"tokens": tokens[:128256], "merges": ["1 2", "12 3"], "bos_token_id": 128000}
    values["tokens"][20] = "12"
    files = gguf_tokenizer.write(tokenizer_metadata("gpt2", **values), tmp_path)
    assert Tokenizer.from_file(str(files[0])).encode("12345").tokens == ["123", "4", "5"]


def sentence_piece(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece BPE vocabulary: bytes, then tokens that score by the order they were made."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3, *[6] * 256]
    made = ["▁t", "he", "▁the", "in", "▁a", "re", "er", "▁in", "the", "▁s"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *made, *letters])
    writer.add_token_types([*types, *[1] * (len(made) + len(letters))])
    scores = [*[0.0] * len(tokens), *(float(-i) for i in range(len(made)))]
    writer.add_token_scores([*scores, *(-1000.0 - i for i in range(len(letters)))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentence_piece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = tokenizer_file(tmp_path / "t.gguf", sentence_piece)
    files = gguf_tokenizer.write(metadata_of(path), tmp_path)
    tokenizer = Tokenizer.from_file(str(files[0]))
    encoded = tokenizer.encode("the rein in é")
    tokens = ["<s>", "▁the", "▁", "re", "in", "▁in", "▁", "<0xC3>", "<0xA9>"]
    assert encoded.tokens == tokens
    assert tokenizer.decode(encoded.ids) == "the rein in é"


def test_tokenizer_files_live_as_long_as_their_model(
    base: tuple[Path, Any], tmp_path: Path
) -> None:
    original = ROOT / "examples" / "docs-bitnet-25m" / "tokenizer.json"
    add = gguf_files.byte_level(original, "gpt-2")
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0, metadata=add)
    imported = load(str(path))
    language = imported.language
    assert language is not None
    assert (language.bos_token_id, language.eos_token_ids, language.pad_token_id) == (0, (1,), 2)
    files = language.tokenizer_files
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    assert all(file.is_file() for file in files)
    del imported, language
    gc.collect()
    assert not files[0].parent.exists()


def tokenizer_metadata(kind: str, **values: Any) -> dict[str, Any]:
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "ab"]}
    return {
        "tokenizer.ggml.model": kind,
        **tokens,
        **{f"tokenizer.ggml.{k}": v for k, v in values.items()},
    }


BAD_TOKENIZERS = {
    "kind": (tokenizer_metadata("bert"), "kind 'bert' is not supported"),
    "split": (tokenizer_metadata("gpt2", pre="viking"), "pre 'viking' is not supported.*llama-bpe"),
    "no split": (tokenizer_metadata("gpt2"), "pre None is not supported"),
    "merge": (tokenizer_metadata("gpt2", pre="gpt-2", merges=["a"]), "no pair"),
    "stray merge": (
        tokenizer_metadata("gpt2", pre="gpt-2", merges=["a c"]),
        "metadata are damaged",
    ),
    "types": (tokenizer_metadata("gpt2", pre="gpt-2", token_type=[1]), "does not give 3 types"),
    "scores": (tokenizer_metadata("llama", scores=[1.0]), "does not give 3 scores"),
    "begin": (
        tokenizer_metadata("gpt2", pre="gpt-2", merges=["a b"], bos_token_id=3, add_bos_token=True),
        "bos_token_id is 3",
    ),
    "twice": (tokenizer_metadata("gpt2", tokens=["a", "a"]), "a token twice"),
    "no tokens": (tokenizer_metadata("gpt2", tokens=[]), "holds no tokens"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_refuses_tokenizers(case: str, tmp_path: Path) -> None:
    metadata, words = BAD_TOKENIZERS[case]
    with pytest.raises(InputError, match=words):
        gguf_tokenizer.write(metadata, tmp_path)


# --- a trained model, from file to text --------------------------------------------------------


def trained_file(path: Path, order: str) -> Path:
    """The trained checkpoint as an I2_S file."""
    from transformers import BitNetConfig

    folder = ROOT / "examples" / "docs-bitnet-25m"
    stored = Checkpoint.open(str(folder))
    stored.open_weights()
    form = WeightForm.of(stored.config)
    state, ternary = {}, {}
    for name in stored.unused():
        module, _, leaf = name.rpartition(".")
        shape = stored.shape(name)
        if leaf == "weight_scale":
            continue
        if f"{module}.weight_scale" in stored:
            packed = form.read(stored, module, 4 * shape[0], shape[1])
            ternary[module] = packed.ternary(), float(packed.scale[0, 0])
        state[name] = stored.tensor(name, shape)
    model = SimpleNamespace(
        config=BitNetConfig.from_dict(stored.config), state_dict=lambda: dict(state)
    )
    add = gguf_files.byte_level(folder / "tokenizer.json", "gpt-2")
    return gguf_files.write(
        path, model, "bitnet-b1.58", ternary, order, table=Type.F32, metadata=add
    )


def test_a_trained_file_speaks_as_its_checkpoint(tmp_path: Path) -> None:
    """The order found, the tokenizer converted, built, run by onnxruntime-genai."""
    greedy = json.loads((ROOT / "examples" / "docs-bitnet-25m" / "reference.json").read_text())
    prompt, expected = next(iter(greedy["greedy"].items()))
    source = trained_file(tmp_path / "docs.gguf", "k64")
    artifact = bitcompile.build(source, out=tmp_path / "out", head="float", context=64)
    assert artifact.manifest["source"] == "docs.gguf"
    model = TextModel(artifact, threads=1)
    generator = model._generator(model.context, Sampling())
    tokens = model.encode(prompt)
    generator.append_tokens(tokens)
    for _ in range(12):
        generator.generate_next_token()
    assert [int(t) for t in generator.get_sequence(0)][len(tokens) :] == expected[:12]


# --- what is refused ----------------------------------------------------------------------------


def refused(path: Path, words: str, order: str | None = None) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(str(path), order=order)
    assert "\n" not in str(caught.value)


def stopped(path: Path, order: str | None = None) -> None:
    """Convert up to the export, which every weight has been read before."""

    def stop(phase: str) -> None:
        if phase == "exporting graph":
            raise BitcompileError("stop")

    with pytest.raises(BitcompileError, match="stop"):
        load(str(path), progress=stop, order=order)


@pytest.mark.parametrize("kind", ["k128", "k64", "n4", Type.TQ2_0], ids=str)
def test_refuses_a_code_3(base: tuple[Path, Any], tmp_path: Path, kind: Any) -> None:
    def edit(name: str, data: np.ndarray) -> np.ndarray:
        if name == "blk.0.ffn_up.weight":
            data.reshape(-1).view(np.uint8)[5] |= 0x30
        return data

    path = write(base, tmp_path / "m.gguf", kind, edit=edit)
    refused(path, "blk.0.ffn_up.weight is not ternary: a packed code is 3", as_order(kind))


def as_order(kind: Any) -> str | None:
    return kind if isinstance(kind, str) else None


@pytest.mark.parametrize("place", [3, 49])
def test_refuses_a_byte_that_is_no_trits(
    base: tuple[Path, Any], tmp_path: Path, place: int
) -> None:
    def edit(name: str, data: np.ndarray) -> np.ndarray:
        data[0, place] = 1  # ceil(256 v / 243) is 0, 2, 3, ...
        return data

    path = write(base, tmp_path / "m.gguf", Type.TQ1_0, edit=edit)
    refused(path, "is not ternary: a byte stands for no five trits")


def test_a_block_of_zeros_takes_the_scale_of_its_row() -> None:
    values = np.zeros((2, 512), np.float32)
    values[0, :3] = 0.25, -0.25, 0.25
    for kind in (Type.TQ1_0, Type.TQ2_0):
        raw = gguf.quants.quantize(values, kind).reshape(-1)
        packed = gguf_ternary.block_weight("w", kind.name, raw, 2, 512)
        assert (packed.scale == [[0.25], [0.0]]).all()
        assert (packed.ternary() * packed.scale == values).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_refuses_a_scale_that_is_none(base: tuple[Path, Any], tmp_path: Path, scale: float) -> None:
    def edit(name: str, data: np.ndarray) -> np.ndarray:
        data[-32:-28] = np.frombuffer(np.float32(scale).tobytes(), np.int8)
        return data

    refused(write(base, tmp_path / "m.gguf", edit=edit), "has a scale that is", "k128")


def test_refuses_weights_that_are_not_ternary(base: tuple[Path, Any], tmp_path: Path) -> None:
    ternary = gguf_files.ternary_of(base[1])
    name = "model.layers.0.self_attn.k_proj"
    weight, scale = ternary[name]
    weight[3, 4] = 2
    path = tmp_path / "m.gguf"
    gguf_files.write(path, base[1], "bitnet-b1.58", {**ternary, name: (weight, scale)}, Type.F32)
    refused(path, "attn_k.weight is not ternary: its values are not -s, 0 and s with one s a row")


def removing(name: str) -> Any:
    def remove(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][f"bitnet-b1.58.{name}"]

    return {"metadata": remove}


def setting(name: str, value: Any) -> Any:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"bitnet-b1.58.{name}", None)
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_int32}
        add[type(value)](f"bitnet-b1.58.{name}", value)

    return {"metadata": change}


REFUSED = {
    "no layers": (removing("block_count"), "block_count is None, not a number"),
    "text": (setting("block_count", "two"), "block_count is 'two', not a number"),
    "no layer": (setting("block_count", 0), "no ternary layer"),
    "millions of layers": (setting("block_count", 1 << 24), "16777216 layers in the metadata"),
    "many layers": (setting("block_count", 2), "no tensor blk.1.attn_q.weight"),
    "no heads": (setting("attention.head_count", 0), "0 attention heads"),
    "rotated": (setting("rope.dimension_count", 32), "32 rotated and 64 values"),
    "rope": (setting("rope.scaling.type", "yarn"), "rope.scaling.type 'yarn'"),
    "experts": (setting("expert_count", 8), "expert_count is 8"),
    "embedding model": (setting("pooling_type", 1), "pooling_type is 1"),
    "context": (setting("context_length", 0), "max_position_embeddings is 0"),
    "width": (setting("feed_forward_length", 256), r"\[512, 256\], the metadata make it"),
    "stray": ({"extra": {"blk.7.x": np.ones(1, np.float32)}}, "blk.7.x belongs to no layer"),
    "rope factors": ({"extra": {"rope_freqs.weight": np.zeros(3, np.float32)}}, "positive"),
    "bad scale": ({"extra": {"blk.0.attn_q.scale": np.zeros(1, np.float32)}}, "one positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, base: tuple[Path, Any], tmp_path: Path) -> None:
    options, words = REFUSED[case]
    refused(write(base, tmp_path / "m.gguf", Type.TQ2_0, **options), words)


def test_refuses_other_architectures(base: tuple[Path, Any], tmp_path: Path) -> None:
    def rename(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["general.architecture"]
        writer.add_string("general.architecture", "mamba")

    path = write(base, tmp_path / "m.gguf", metadata=rename)
    refused(path, "architecture 'mamba' is not supported; supported: llama, .*bitnet-b1.58")


def test_refuses_a_context_beyond_the_model(base: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1\.\.48"):
        load(str(write(base, tmp_path / "m.gguf", Type.TQ2_0)), context=49)


def test_refuses_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent.gguf", "no file")
    for data in (b"", b"GGUF", b"GGUX" + bytes(100), bytes(1000)):
        (tmp_path / "bad.gguf").write_bytes(data)
        refused(tmp_path / "bad.gguf", "bad.gguf is damaged, not complete or no GGUF file")


def test_refuses_truncated_files(base: tuple[Path, Any], tmp_path: Path) -> None:
    """At any length: in the header's counts, names, arrays, and in each tensor."""
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0)
    data = path.read_bytes()
    lengths = np.random.default_rng(0).integers(0, len(data) - 64, 60)
    for length in [*range(0, 400, 7), *lengths]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"m\.gguf") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_damaged_headers_are_refused_or_harmless(base: tuple[Path, Any], tmp_path: Path) -> None:
    """Every byte of the header, set to all ones: a count too large must not be counted to."""
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0)
    data = path.read_bytes()
    header = data.index(b"token_embd.weight")
    for place in range(0, header, 3):
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        with pytest.raises(BitcompileError) as caught:
            load(str(path), progress=_stop_at_weights)
        assert "\n" not in str(caught.value)


def _stop_at_weights(phase: str) -> None:
    if phase == "reading weights":
        raise BitcompileError("stop")


def test_refuses_tensors_that_overlap_or_run_out(base: tuple[Path, Any], tmp_path: Path) -> None:
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16 + 4
    for offset, words in ((1 << 40, "runs past its end"), (64, "runs past the next")):
        data[at : at + 8] = offset.to_bytes(8, "little")
        path.write_bytes(data)
        refused(path, words)
    data[at - 4 : at] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "attn_q.weight is of type 99")


def test_no_folder_is_left_behind(
    base: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(base, tmp_path / "m.gguf", Type.TQ2_0)
    stopped(path)
    path.write_bytes(path.read_bytes()[:1000])
    refused(path, "damaged")
    assert not list((tmp_path / "temporary").iterdir())
