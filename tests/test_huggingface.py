"""The Hugging Face front end against transformers itself, and every input it refuses."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitcompile.errors import BitcompileError, InputError, UsageError
from bitcompile.frontends.checkpoint import Checkpoint, resolve, unpack_rows
from bitcompile.frontends.huggingface import load
from bitcompile.model import Imported
from tests.checkpoints import (
    DIRECT,
    INVERSE,
    ONLINE,
    Recipe,
    cosine,
    make,
    reference_logits,
    session,
    step,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
RECIPES = {
    "bitnet direct, tied": Recipe("BitNetForCausalLM", DIRECT, {"tie_word_embeddings": True}),
    "llama inverse, bias, llama3 rope": Recipe(
        "LlamaForCausalLM",
        INVERSE,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        torch.float32,
    ),
    "llama online, inner norm, yarn": Recipe(
        "LlamaForCausalLM",
        {**ONLINE, "use_rms_norm": True, "rms_norm_eps": 1e-4},
        {"intermediate_size": 75, "rope_parameters": YARN},
        torch.float16,
    ),
    "mistral, window": Recipe(
        "MistralForCausalLM", DIRECT, {"num_hidden_layers": 1, "sliding_window": 24}
    ),
    "qwen2": Recipe("Qwen2ForCausalLM", DIRECT, {"num_hidden_layers": 1}),
    "qwen3": Recipe("Qwen3ForCausalLM", INVERSE, {"num_hidden_layers": 1, "head_dim": 32}),
}
TOKENS = [[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]]


@pytest.fixture(scope="module", params=RECIPES)
def converted(request: Any, tmp_path_factory: Any) -> tuple[Recipe, Any, Imported]:
    """(recipe, transformers' model, imported) of one recipe."""
    recipe = RECIPES[request.param]
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = make(recipe, path)
    return recipe, model, load(str(path))


def test_logits_equal_transformers(converted: tuple[Recipe, Any, Imported]) -> None:
    _, model, imported = converted
    expected = reference_logits(model, TOKENS)
    run = session(imported.graph)
    prefill = step(run, TOKENS, {})
    assert prefill.shape == expected.shape
    assert cosine(prefill, expected) >= 0.9999
    cache: dict[str, Any] = {}
    parts = [step(run, [TOKENS[0][:3]], cache)]  # then one token at a time, then two
    parts += [step(run, [[token]], cache) for token in TOKENS[0][3:4]]
    parts += [step(run, [TOKENS[0][4:]], cache)]
    assert cosine(np.concatenate(parts, axis=1), expected[:1]) >= 0.9999


@pytest.fixture(scope="module")
def direct(tmp_path_factory: Any) -> Path:
    """A tied BitNet checkpoint in packed direct form."""
    path: Path = tmp_path_factory.mktemp("checkpoint") / "direct"
    make(RECIPES["bitnet direct, tied"], path)
    return path


@pytest.fixture(scope="module")
def graph(direct: Path) -> ir.Model:
    """Its graph with a context below the model's limit."""
    return load(str(direct), context=32).graph


def test_names_and_dimensions_are_those_of_genai(graph: ir.Model) -> None:
    shapes = {v.name: [str(d) for d in v.shape] for v in graph.graph.inputs if v.shape}
    past = ["batch_size", "2", "past_sequence_length", "16"]
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{i}.{kv}": past for i in range(2) for kv in ("key", "value")},
    }
    shapes = {v.name: [str(d) for d in v.shape] for v in graph.graph.outputs if v.shape}
    present = ["batch_size", "2", "total_sequence_length", "16"]
    assert shapes == {
        "logits": ["batch_size", "sequence_length", "97"],
        **{f"present.{i}.{kv}": present for i in range(2) for kv in ("key", "value")},
    }
    assert dict(graph.opset_imports) == {"": 23, "bitcompile": 1, "com.microsoft": 1}


def test_a_layer_is_linears_norms_and_one_attention(graph: ir.Model) -> None:
    count = Counter(node.op_type for node in graph.graph)
    assert count["BitLinear"] == 14
    assert count["GroupQueryAttention"] == 2
    assert count["RMSNormalization"] == 9
    assert set(count) & {"ReduceMean", "Softmax", "Sin", "Cos", "Where"} == set()


def test_tied_head_reads_the_table_of_the_embedding(graph: ir.Model) -> None:
    logits: Any = graph.graph.outputs[0].producer()
    transpose = logits.inputs[1].producer()
    cast = transpose.inputs[0].producer()
    table = cast.inputs[0]
    assert [n.op_type for n in (logits, transpose, cast)] == ["MatMul", "Transpose", "Cast"]
    assert transpose.attributes["perm"].as_ints() == (1, 0)
    assert table.name == "model.embed_tokens.weight"
    assert table.is_initializer()
    assert table.dtype == ir.DataType.BFLOAT16
    gather = next(node for node in graph.graph if node.op_type == "Gather")
    assert gather.inputs[0] is table
    assert gather.inputs[1] is graph.graph.inputs[0]
    assert [node.op_type for node, _ in gather.outputs[0].uses()] == ["Cast"]
    assert "lm_head.weight" not in graph.graph.initializers


def test_no_float_weight_of_a_ternary_layer_exists(graph: ir.Model) -> None:
    initializers: dict[str, Any] = dict(graph.graph.initializers)
    shapes = {name: tuple(value.shape) for name, value in initializers.items()}
    floats = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and shape[-1] != 1 and initializers[name].dtype != ir.DataType.UINT8
    }
    caches = {"cos_cache": (32, 8), "sin_cache": (32, 8)}
    assert floats == {"model.embed_tokens.weight": (97, 64), **caches}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 25)


def test_absent_inputs_are_one_rank_0_zero(graph: ir.Model) -> None:
    nodes: list[Any] = [node for node in graph.graph if node.op_type == "BitLinear"]
    assert {node.inputs[i].name for node in nodes for i in (3, 4)} == {"absent"}
    initializer: Any = graph.graph.initializers["absent"]
    absent = initializer.const_value.numpy()
    assert absent.shape == ()
    assert absent == 0


def test_language_describes_the_model(converted: tuple[Recipe, Any, Imported]) -> None:
    recipe, model, imported = converted
    language = imported.language
    assert imported.source == "tiny"
    assert language is not None
    assert language.num_layers == model.config.num_hidden_layers
    assert language.head_size == recipe.config.get("head_dim", 16)
    assert language.context_length == recipe.config.get("sliding_window", 48)
    assert (language.bos_token_id, language.eos_token_ids, language.pad_token_id) == (0, (1,), 2)
    assert [file.name for file in language.tokenizer_files] == ["tokenizer.json"]


def test_untied_head_has_its_own_table(converted: tuple[Recipe, Any, Imported]) -> None:
    recipe, _, imported = converted
    own = "lm_head.weight" in imported.graph.graph.initializers
    assert own is not recipe.config.get("tie_word_embeddings", False)


def test_progress_names_the_phases(direct: Path) -> None:
    phases: list[str] = []

    def stop_at_weights(phase: str) -> None:
        phases.append(phase)
        if phase == "reading weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(str(direct), progress=stop_at_weights)
    assert phases == ["reading configuration", "reading weights"]


def test_the_swap_is_undone_after_a_failure() -> None:
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.models.bitnet import modeling_bitnet

    from bitcompile.frontends.export import ATTENTION, _swapped_attention

    before = modeling_bitnet.apply_rotary_pos_emb
    with torch.device("meta"):
        model = BitNetForCausalLM(BitNetConfig(num_hidden_layers=1))
    with contextlib.suppress(KeyError), _swapped_attention(model):
        assert modeling_bitnet.apply_rotary_pos_emb is not before
        assert model.config._attn_implementation == ATTENTION
        raise KeyError
    assert modeling_bitnet.apply_rotary_pos_emb is before
    assert model.config._attn_implementation != ATTENTION


def test_unpack_rows_is_the_inverse_of_transformers_packing() -> None:
    from transformers.integrations.bitnet import pack_weights

    weight = torch.randint(-1, 2, (12, 7))
    codes = unpack_rows(pack_weights(weight.clone()).numpy(), "w")
    assert (codes.astype(np.int8) - 1 == weight.numpy()).all()


def test_shards_are_read_through_the_index(direct: Path, tmp_path: Path) -> None:
    path = split(direct, tmp_path / "sharded")
    whole, sharded = (Checkpoint.open(str(p)) for p in (direct, path))
    for checkpoint in (whole, sharded):
        checkpoint.open_weights()
    assert sharded.unused() == whole.unused()
    for name in whole.unused():
        shape = whole.shape(name)
        assert whole.tensor(name, shape).equal(sharded.tensor(name, shape))
    assert sharded.unused() == []


# What is refused: (edit of config.json or None, edit of the tensors or None, the error's words).

Q0 = "model.layers.0.self_attn.q_proj.weight"
S0 = Q0 + "_scale"
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def quantization(**values: Any) -> Callable[[Config], None]:
    return lambda config: config["quantization_config"].update(values)


def setting(**values: Any) -> Callable[[Config], None]:
    return lambda config: config.update(values)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(name)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def extra(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def unpacked(tensors: Tensors) -> None:
    """Every ternary weight as float, as master weights are stored; scales stay."""
    for name, value in list(tensors.items()):
        if value.dtype == torch.uint8:
            tensors[name] = torch.randn(4 * value.shape[0], value.shape[1])


def masters_with_nan(tensors: Tensors) -> None:
    unpacked(tensors)
    tensors[Q0][3, 5] = float("nan")
    for name in [name for name in tensors if name.endswith("_scale")]:
        del tensors[name]


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no architecture": (without("architectures"), None, "architecture None is not supported"),
    "architecture": (setting(architectures=["MambaForCausalLM"]), None, "MambaForCausalLM.*Llama"),
    "float model": (without("quantization_config"), None, "no quantization_config"),
    "method": (quantization(quant_method="gptq"), None, "quant_method 'gptq'.*'bitnet'"),
    "linear class": (quantization(linear_class="bitlin"), None, "linear_class 'bitlin'"),
    "mode": (quantization(quantization_mode="late"), None, "quantization_mode 'late'"),
    "inverse online": (
        quantization(linear_class="bitlinear", quantization_mode="online"),
        None,
        "ambiguous",
    ),
    "packed, said online": (quantization(quantization_mode="online"), None, "declares float"),
    "float, said packed": (None, unpacked, "is float.*declares packed"),
    "online with scales": (quantization(quantization_mode="online"), unpacked, "weight_scale"),
    "online, NaN": (quantization(quantization_mode="online"), masters_with_nan, f"{Q0} holds NaN"),
    "skips no list": (quantization(modules_to_not_convert="lm_head"), None, "no list of names"),
    "skips all": (quantization(modules_to_not_convert=["model", "lm_head"]), None, "no ternary"),
    "tied ternary head": (quantization(modules_to_not_convert=[]), None, "makes it ternary"),
    "norm flag": (quantization(use_rms_norm="yes"), None, "use_rms_norm 'yes'"),
    "inner norm missing": (quantization(use_rms_norm=True), None, "no tensor .*rms_norm.weight"),
    "hidden size": (setting(hidden_size=128), None, "do not belong together"),
    "layers": (setting(num_hidden_layers=1 << 30), None, "1073741824 layers in config.json"),
    "hidden size type": (setting(hidden_size="wide"), None, "config.json is not valid"),
    "negative size": (setting(intermediate_size=-4), None, "config.json is not valid"),
    "activation": (setting(hidden_act="relu7"), None, "hidden_act 'relu7'"),
    "rows": (setting(intermediate_size=102), None, "multiples of 4"),
    "head size": (setting(num_attention_heads=8), None, "head size 8 .*multiples of 16"),
    "no heads": (setting(num_attention_heads=0), None, "0 attention heads"),
    "head groups": (setting(num_key_value_heads=3), None, "4 attention heads cannot share 3"),
    "rope": (setting(rope_parameters={**YARN, "rope_type": "dynamic"}), None, "'dynamic'"),
    "rope base": (setting(rope_parameters={**LLAMA3, "rope_theta": None}), None, "not valid"),
    "bidirectional": (setting(is_causal=False), None, "is_causal is false"),
    "no positions": (setting(max_position_embeddings=0), None, "max_position_embeddings is 0"),
    "end token": (setting(eos_token_id=[1, -5]), None, "eos_token_id"),
    "no scale": (None, without(S0), f"no tensor {S0}"),
    "no weight": (None, without(Q0), f"no tensor {Q0}"),
    "no table": (None, without("model.embed_tokens.weight"), "no tensor model.embed_tokens"),
    "two scales": (None, tensor(S0, lambda t: torch.ones(2)), "do not belong together"),
    "zero scale": (None, tensor(S0, torch.zeros_like), f"{S0} is 0.0"),
    "infinite scale": (None, tensor(S0, lambda t: t / 0), f"{S0} is inf"),
    "integer scale": (None, tensor(S0, lambda t: t.to(torch.int32)), "float type"),
    "code 3": (None, tensor(Q0, lambda t: t | 3), f"{Q0} is not ternary"),
    "signed bytes": (None, tensor(Q0, lambda t: t.to(torch.int8)), "int8, not uint8"),
    "stray tensor": (None, extra("model.layers.9.weight", torch.ones(1)), "layers.9.*no layer"),
    "two heads": (None, extra("lm_head.weight", torch.ones(97, 64)), "but they differ"),
}


def edited(source: Path, target: Path, config: Any, tensors: Any) -> Path:
    """A copy of a checkpoint with config.json and tensors changed."""
    shutil.copytree(source, target)
    if config:
        values = json.loads((target / "config.json").read_text())
        config(values)
        (target / "config.json").write_text(json.dumps(values))
    if tensors:
        state = load_file(target / "model.safetensors")
        tensors(state)
        save_file(state, target / "model.safetensors")
    return target


def split(source: Path, target: Path) -> Path:
    """A copy of a checkpoint in two shards."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({name: state[name] for name in part}, target / shard)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def refused(path: Path | str, words: str, **options: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(str(path), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, direct: Path, tmp_path: Path) -> None:
    config, tensors, words = REFUSED[case]
    refused(edited(direct, tmp_path / "edited", config, tensors), words)


def test_refuses_partial_rotary(tmp_path: Path) -> None:
    rope = {**LLAMA3, "partial_rotary_factor": 0.5}
    make(Recipe("LlamaForCausalLM", DIRECT, {"rope_parameters": rope}), tmp_path / "partial")
    refused(tmp_path / "partial", "8 of 16 head columns rotate")


@pytest.mark.parametrize("context", [0, -1, 49])
def test_refuses_a_context_outside_the_model(direct: Path, context: int) -> None:
    with pytest.raises(UsageError, match=r"1\.\.48, the model's max_position_embeddings"):
        load(str(direct), context=context)


def test_refuses_a_context_beyond_the_sliding_window(tmp_path: Path) -> None:
    make(RECIPES["mistral, window"], tmp_path / "window")
    with pytest.raises(UsageError, match=r"1\.\.24, the model's sliding_window"):
        load(str(tmp_path / "window"), context=25)


def test_refuses_incomplete_directories(direct: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    refused(direct / "config.json", "is a file")
    for text, words in (("{", "config.json cannot be read"), ("[]", "no JSON object")):
        path = tmp_path / words[:4]
        shutil.copytree(direct, path)
        (path / "config.json").write_text(text)
        refused(path, words)


def test_refuses_a_damaged_tokenizer(direct: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(direct, path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text('{"half": ')
        refused(path, f"{name} cannot be read")
        (path / name).unlink()


def test_refuses_missing_or_truncated_weights(direct: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(direct, path)
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    for length in (len(data) - 1, 1000, 4, 0):
        weights.write_bytes(data[:length])
        refused(path, "model.safetensors is damaged")
    weights.unlink()
    refused(path, "model.safetensors is missing")


def test_refuses_missing_or_wrong_shards(direct: Path, tmp_path: Path) -> None:
    path = split(direct, tmp_path / "sharded")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = (path / "b.safetensors").read_bytes()
    (path / "b.safetensors").unlink()
    refused(path, "b.safetensors is missing")
    (path / "b.safetensors").write_bytes(shard[:-10])
    refused(path, "b.safetensors is damaged")
    (path / "b.safetensors").write_bytes(shard)
    index.write_text(json.dumps({"weight_map": {**weight_map, "w": "a.safetensors"}}))
    refused(path, "a.safetensors does not hold w")
    index.write_text(json.dumps({"weight_map": {"w": "../a.safetensors"}}))
    refused(path, "no plain file name")
    index.write_text("{}")
    refused(path, "no weight_map")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["owner/absent", "absent"])
def test_refuses_an_id_that_is_not_cached_when_offline(name: str) -> None:
    refused(name, f"no directory '{name}', and it cannot be fetched")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c"])
def test_refuses_what_is_neither_directory_nor_id(name: str) -> None:
    refused(name, "neither a directory nor a Hugging Face id")


def test_finds_a_cached_id_without_the_network(direct: Path, hub: Path) -> None:
    repository = hub / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(direct, snapshot)
    assert resolve("owner/tiny") == (snapshot, "owner/tiny")
    (snapshot / "model.safetensors").unlink()
    refused("owner/tiny", "model.safetensors is missing")


def test_either_name_of_a_tied_table_will_do(direct: Path, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    def stop(phase: str) -> None:
        if phase == "exporting graph":
            raise BitcompileError("stop")

    path = edited(direct, tmp_path / "renamed", None, rename)
    with pytest.raises(BitcompileError, match="stop"):
        load(str(path), progress=stop)


ROOT = Path(__file__).parent.parent


def test_the_example_writes_a_checkpoint_that_converts(tmp_path: Path) -> None:
    path = tmp_path / "random"
    script = [sys.executable, str(ROOT / "examples" / "make_checkpoint.py"), "--out", str(path)]
    subprocess.run([*script, "--layers", "1"], check=True, capture_output=True)
    imported = load(str(path))
    logits = step(session(imported.graph), [[0, 70, 300, 511]], {})
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
    assert subprocess.run(script, capture_output=True, check=False).returncode == 2


def test_the_trained_checkpoint_continues_as_transformers_does() -> None:
    from tokenizers import Tokenizer

    path = ROOT / "examples" / "docs-bitnet-25m"
    greedy = json.loads((path / "reference.json").read_text())["greedy"]
    prompt, expected = next(iter(greedy.items()))
    ids = [0, *Tokenizer.from_file(str(path / "tokenizer.json")).encode(prompt).ids]
    run = session(load(str(path), context=64).graph)
    cache: dict[str, Any] = {}
    found: list[int] = []
    while len(found) < 12:
        found.append(int(step(run, [ids], cache)[0, -1].argmax()))
        ids = found[-1:]
    assert found == expected[:12]


def test_a_config_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load(str(tmp_path))
