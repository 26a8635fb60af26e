"""The files that stand beside the model for its users: onnxruntime-genai's config and a README."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitcompile.opset import MIN_ONNXRUNTIME

if TYPE_CHECKING:
    from bitcompile.model import Imported, LanguageModel, Lowered


def genai_config(language: LanguageModel, library: str) -> dict[str, Any]:
    """``genai_config.json`` for a decoder whose plugin ``library`` lies in the same folder.

    The model type is ``llama`` whatever the architecture: onnxruntime-genai has a fixed list, and
    this entry of it feeds exactly the inputs our graphs have.
    """
    ids: dict[str, Any] = {"eos_token_id": list(language.eos_token_ids)}
    if language.bos_token_id is not None:
        ids["bos_token_id"] = language.bos_token_id
    pad = language.pad_token_id
    if pad is None and language.eos_token_ids:
        pad = language.eos_token_ids[0]
    if pad is not None:
        ids["pad_token_id"] = pad
    return {
        "model": {
            "type": "llama",
            **ids,
            "vocab_size": language.vocab_size,
            "context_length": language.context_length,
            "decoder": {
                # Threads are not fixed here: the artifact runs on machines of any size.
                "session_options": {"provider_options": [], "custom_ops_library": library},
                "filename": "model.onnx",
                "head_size": language.head_size,
                "hidden_size": language.hidden_size,
                "num_attention_heads": language.num_heads,
                "num_hidden_layers": language.num_layers,
                "num_key_value_heads": language.num_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": language.context_length,
            "do_sample": False,
            "past_present_share_buffer": True,
        },
    }


_HEADER = """\
# {source} for {target}

Built by bitcompile {version}: {emits}. Weights are ternary, layout `{layout}`;
the plugin is for {host}. It needs onnxruntime {minimum} or newer.

The commands below are run inside this folder. Only the plugin depends on the machine: without it
the same `model.onnx` gives the same results on any onnxruntime, slower and with more memory.

## Python, plain onnxruntime

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library("./{library}")  # leave out to run without the plugin
session = onnxruntime.InferenceSession("model.onnx", options)
print([(i.name, i.type, i.shape) for i in session.get_inputs()])
```

With bitcompile installed, `bitcompile.load(".")` is the same.

"""

_GENAI = """\
## Python, onnxruntime-genai

```python
import numpy
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # as Hugging Face tokenizers do
params = og.GeneratorParams(model)
params.set_search_options(max_length={length})
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
for _ in range(32):
    if generator.is_done():
        break
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

The last token of an answer is sampled but not yet in the KV cache. To go on talking, feed it again:

```python
held = generator.token_count()
last = generator.get_sequence(0)[held - 1 :]
generator.rewind_to(held - 1)
generator.append_tokens(numpy.concatenate([last, tokenizer.encode("\\nAnd then?")]))
```

On the command line: `bitcompile run . --prompt "Once upon a time"`, or `--chat`.

"""

_C = """\
## C

```c
OrtSessionOptions *options;
api->CreateSessionOptions(&options);
api->RegisterCustomOpsLibrary_V2(options, ORT_TSTR("./{library}"));
api->CreateSession(env, ORT_TSTR("model.onnx"), options, &session);
```

## Files

`model.onnx` and `model.onnx.data` must stay together. `bitcompile.json` says what this artifact
was built from and holds the size and SHA-256 of every file; `bitcompile verify .` checks them, and
that the plugin computes what the model means.
"""


def readme(imported: Imported, lowered: Lowered) -> str:
    """``README.md``: how to load exactly this artifact."""
    from bitcompile import __version__

    language = imported.language
    template = _HEADER + (_GENAI if language is not None else "") + _C
    values = {
        "source": imported.source,
        "target": lowered.target.name,
        "version": __version__,
        "emits": lowered.target.emits,
        "layout": lowered.layout,
        "host": lowered.target.host,
        "library": lowered.target.library,
        "minimum": MIN_ONNXRUNTIME,
        "length": str(min(256, language.context_length) if language is not None else 0),
    }
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    return template
