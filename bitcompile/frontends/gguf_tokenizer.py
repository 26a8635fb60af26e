"""The tokenizer in a GGUF file's metadata, to the files a runtime for text reads.

Kinds (``tokenizer.ggml.model``): ``gpt2``, byte-level BPE whose split of text into words
``tokenizer.ggml.pre`` names (:data:`SPLITS`; patterns as the models' own tokenizer.json have
them), and ``llama``, SentencePiece BPE, whose merges follow from the scores of its tokens. Anything
else is refused rather than tokenised differently from how the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitcompile.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type``."""
SPACE = "\u2581"
"""Stands for a space in SentencePiece tokens."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _GPT2,
    "llama-bpe": _MODERN % r"\p{N}{1,3}",
    "llama3": _MODERN % r"\p{N}{1,3}",
    "llama-v3": _MODERN % r"\p{N}{1,3}",
    "falcon3": _MODERN % r"\p{N}{1,3}",
    "qwen2": _MODERN % r"\p{N}",
}
"""What text is split by before merging, by the name llama.cpp gives it."""
LLAMA3_TOKENS = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128009: "<|eot_id|>"}
"""Where Llama 3's vocabulary has its special tokens; no other has them there.

bitnet.cpp's converter for BitNet b1.58 2B-4T, which uses this vocabulary, writes no name.
"""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
"""Splits of tokenizers that take a whole word that is a token as it is (``ignore_merges``)."""


def write(metadata: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """Write tokenizer.json and tokenizer_config.json to ``folder``; none for a file without one.

    Raises InputError for a kind that cannot be converted, or metadata that contradict themselves.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return ()
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"tokenizer kind {kind!r} is not supported (gpt2 and llama are): convert the model's "
            "Hugging Face checkpoint instead"
        )
    tokens, types = _tokens(metadata)
    try:
        tokenizer = (_byte_level if kind == "gpt2" else _sentence_piece)(metadata, tokens, types)
        _add_special(tokenizer, tokens, types)
        _add_template(tokenizer, metadata, tokens, kind)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer's metadata are damaged ({reason})") from None
    files = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer.save(str(files[0]))
    files[1].write_text(json.dumps(_config(metadata, tokens), ensure_ascii=False), "utf-8")
    return files


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise InputError("tokenizer.ggml.tokens holds no tokens: convert the model again")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type does not give {len(tokens)} types: damaged")
    if len(set(tokens)) != len(tokens):
        raise InputError("tokenizer.ggml.tokens holds a token twice: convert the model again")
    return tokens, types


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = metadata.get("tokenizer.ggml.pre")
    if split in (None, "default") and _is_llama3(tokens):
        split = "llama-bpe"
    if split not in SPLITS:
        raise InputError(
            f"tokenizer.ggml.pre {split!r} is not supported (supported: {', '.join(SPLITS)}): "
            "convert the model's Hugging Face checkpoint instead"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    if not all(len(merge) == 2 for merge in merges):
        raise InputError("tokenizer.ggml.merges holds what is no pair: convert the model again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _is_llama3(tokens: list[str]) -> bool:
    known = LLAMA3_TOKENS.items()
    return len(tokens) > max(LLAMA3_TOKENS) and all(tokens[i] == token for i, token in known)


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"tokenizer.ggml.scores does not give {len(tokens)} scores: damaged")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(tokens, types, scores),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair that makes the best token; BPE the first pair of a list.

    So the list is every way to make each token of two, best token first.
    """
    rank = {
        token: (-score, i)
        for i, (token, kind, score) in enumerate(zip(tokens, types, scores, strict=True))
        if kind == NORMAL
    }
    pairs = []
    for token in sorted(rank, key=lambda token: rank[token]):
        ways = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += [(left, right) for left, right in ways if left in rank and right in rank]
    return pairs


def _add_special(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _add_template(
    tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str], kind: str
) -> None:
    """Beginning and end tokens; a silent SentencePiece file begins with one, as in llama.cpp."""
    from tokenizers import processors

    begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    begin = special_token(metadata, tokens, "bos") if begins else None
    end = special_token(metadata, tokens, "eos") if ends else None
    used = [token for token in (begin, end) if token is not None]
    if used:
        pieces = [begin, "$A", end]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pieces if piece is not None],
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(used)],
        )


def special_token(metadata: Mapping[str, Any], tokens: list[str], role: str) -> str | None:
    """The token of a role (``bos``, ``eos``, ``padding``); InputError if its id is out of range."""
    i = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise InputError(
            f"tokenizer.ggml.{role}_token_id is {i!r}, not one of {len(tokens)} tokens"
        )
    return tokens[i]


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    values = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": special_token(metadata, tokens, "bos"),
        "eos_token": special_token(metadata, tokens, "eos"),
        "pad_token": special_token(metadata, tokens, "padding"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in values.items() if value is not None}
