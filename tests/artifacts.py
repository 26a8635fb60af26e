"""Artifacts of tiny decoders, made through the real passes, lowering and writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from bitcompile import artifact, inspection, passing
from bitcompile.artifact import Artifact
from bitcompile.custom_ops import OPS
from bitcompile.lower import lower
from bitcompile.model import Imported, LanguageModel, Lowered
from bitcompile.opset import DOMAIN
from bitcompile.passes import finishing, pipeline
from bitcompile.targets import resolve
from tests.graphs import Decoder, decoder

CONTEXT = 160
LETTERS = 256
BOS, EOS, PAD = LETTERS, LETTERS + 1, LETTERS + 2
CONFIG = Decoder(hidden=64, ffn=96, vocab=LETTERS + 4, context=CONTEXT, heads=4, kv_heads=2)
"""Small, but with weights large enough to lie in the external data file."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer_files(folder: Path, chat: bool = True) -> tuple[Path, ...]:
    """A byte-level tokenizer: one token a byte, and a start token before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json", folder / "tokenizer_config.json"


def imported(folder: Path, chat: bool = True, config: Decoder = CONFIG) -> Imported:
    """What a front end gives for a tiny decoder; its tokenizer is written to ``folder``."""
    language = LanguageModel(
        vocab_size=config.vocab,
        context_length=config.context,
        hidden_size=config.hidden,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_size=config.head_size,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        pad_token_id=PAD,
        tokenizer_files=tokenizer_files(folder, chat),
    )
    graph = decoder(config)
    for node in graph.graph:
        if node.domain == DOMAIN:  # front ends write every attribute
            given = {name: attribute.value for name, attribute in node.attributes.items()}
            complete = ir.convenience.convert_attributes(OPS[node.op_type].complete(given))
            node.attributes.update({attribute.name: attribute for attribute in complete})
    _quieten(graph.graph.initializers["model.embed_tokens.weight"])
    return Imported(graph, "toy", language)


def _quieten(table: ir.Value) -> None:
    """Make the embedding small beside the layers, so that every token depends on the cache.

    Otherwise a random model with tied tables repeats its last token for ever.
    """
    assert table.const_value is not None
    data = table.const_value.numpy()
    table.const_value = ir.tensor((data * 0.02).astype(data.dtype), name=table.name)


def lowered(
    source: Imported,
    options: passing.Options,
    target: str = "native",
    host: str | None = None,
    choices: Mapping[str, str] | None = None,
) -> Lowered:
    """The model of ``source``, fused and lowered."""
    passing.run(source.graph, pipeline(options))
    result = lower(source.graph, resolve(target, host, choices))
    passing.run(result.graph, finishing())
    return result


def write(
    folder: Path,
    *,
    chat: bool = True,
    head: str = "q8",
    logits: str = "last",
    force: bool = False,
    config: Decoder = CONFIG,
    target: str = "native",
    host: str | None = None,
    choices: Mapping[str, str] | None = None,
) -> Artifact:
    """A complete artifact in ``folder``."""
    source = imported(folder.parent / "tokenizer", chat, config)
    result = lowered(source, passing.Options(head, logits), target, host, choices)
    with artifact.staged(folder, force) as stage:
        artifact.write(
            stage,
            source,
            result,
            options={"head": head},
            passes=[],
            inspection=inspection.inspect_graph(result.graph),
        )
    return Artifact.open(folder)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Change keys of the manifest; the value REMOVED removes one."""
    path = folder / artifact.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in manifest.items() if value != "REMOVED"}
    path.write_text(json.dumps(kept))


def seal(folder: Path) -> None:
    """Make the manifest agree with the files as they are now."""
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry["bytes"] = (folder / name).stat().st_size
        entry["sha256"] = artifact.sha256(folder / name)
    path.write_text(json.dumps(manifest))
