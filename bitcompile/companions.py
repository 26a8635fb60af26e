"""The files that stand beside the model for its users: onnxruntime-genai's config and a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bitcompile.opset import MIN_ONNXRUNTIME

if TYPE_CHECKING:
    from bitcompile.model import Imported, LanguageModel, Lowered


PROVIDERS = {"cuda": ("cuda", "CUDAExecutionProvider")}
"""Device of a target to what onnxruntime-genai and onnxruntime call its execution provider."""
PROVIDER_OPTIONS = {"use_tf32": "0"}
"""TF32 would round the factors of float32 products to ten bits."""


def genai_config(language: LanguageModel, library: str, device: str = "cpu") -> dict[str, Any]:
    """``genai_config.json`` for a decoder whose plugin ``library`` lies in the same folder.

    A static library is not named there: the app links it.

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
    # Threads are not fixed here: the artifact runs on machines of any size.
    options: list[dict[str, Any]] = [{PROVIDERS[device][0]: {}}] if device in PROVIDERS else []
    session: dict[str, Any] = {"provider_options": options}
    if PurePath(library).suffix != ".a":
        session["custom_ops_library"] = library
    return {
        "model": {
            "type": "llama",
            **ids,
            "vocab_size": language.vocab_size,
            "context_length": language.context_length,
            "decoder": {
                "session_options": session,
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

Only the plugin depends on the machine: without it the same `model.onnx` runs on any onnxruntime of
that age, slower and with more memory. Ternary products are then the same integers, and floats agree
within rounding.

"""

_NO_TOKENIZER = """\
The model came without {missing}, which onnxruntime-genai's tokenizer needs: give token numbers
where the examples encode a text, and read them where they decode one.

"""

_PYTHON = """\
## Python, plain onnxruntime

Run inside this folder:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library("./{library}")  # leave out to run without the plugin
session = onnxruntime.InferenceSession("model.onnx", options, providers={providers})
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

_CUDA = """\
## The GPU

It needs the CUDA builds of these packages in the place of the others, and a driver for CUDA 13:

```console
$ pip uninstall -y onnxruntime onnxruntime-genai
$ pip install "onnxruntime-gpu[cuda,cudnn]" onnxruntime-genai-cuda
```

Where onnxruntime does not find the libraries that `[cuda,cudnn]` installs, call
`onnxruntime.preload_dlls()` first.

"""

_GENAI_CUDA = """\
One sequence decodes faster if its kernels are replayed as a CUDA graph, as `bitcompile run` has it;
prompts of several sequences do not run then:

```python
import json

options = {"provider_options": [{"cuda": {"enable_cuda_graph": "1"}}]}
config = og.Config(".")
config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
model = og.Model(config)
```

"""

_C = """\
## C

```c
OrtSessionOptions *options;
api->CreateSessionOptions(&options);
api->RegisterCustomOpsLibrary_V2(options, ORT_TSTR("./{library}"));
api->CreateSession(env, ORT_TSTR("model.onnx"), options, &session);
```

"""

_C_STATIC = """\
## C and C++, linked statically

`include/bitcompile.h` declares the one function of the static library `{archive}`:

```c
#include "bitcompile.h"

OrtStatus *status = bitcompile_RegisterCustomOps(options, OrtGetApiBase());
```

Compile with `-Iinclude` and link `{archive}` and ONNX Runtime. Then no other file than the model is
needed at run time.

"""

_ANDROID = """\
## Kotlin, onnxruntime-android

Put `{library}` into `src/main/jniLibs/arm64-v8a/` of the app. Put `model.onnx` and
`model.onnx.data` into one folder of files (`filesDir`, not packed in the APK): the weights are then
mapped, not copied.

```kotlin
val environment = OrtEnvironment.getEnvironment()
val options = OrtSession.SessionOptions()
options.registerCustomOpLibrary("{library}")
val session = environment.createSession(File(context.filesDir, "model.onnx").path, options)
```

"""

_SWIFT = """\
## Swift, onnxruntime-objc

Add `{archive}` to "Link Binary With Libraries", and `include/bitcompile.h` to the bridging header.
Add `model.onnx` and `model.onnx.data` to the app's resources.

```swift
let options = try ORTSessionOptions()
try options.registerCustomOps(usingFunctionPointer: { bitcompile_RegisterCustomOps($0, $1) })
let model = Bundle.main.path(forResource: "model", ofType: "onnx")!
let session = try ORTSession(env: ORTEnv(loggingLevel: .warning), modelPath: model,
                             sessionOptions: options)
```

"""

_OPENCL = """\
## The GPU

When `{library}` is loaded it looks for an OpenCL driver, takes the first GPU
(`BITCOMPILE_CL_DEVICE` may hold a part of another one's name), checks its arithmetic and compiles
the kernels. That takes seconds once; the result is kept in `$BITCOMPILE_CACHE`, else
`~/.cache/bitcompile`. `BITCOMPILE_VERBOSE=1` prints what it runs on.

"""

_OPENCL_ANDROID = """\
## The phone's GPU

From Android 12 on an app sees the vendor's OpenCL only if its manifest asks, inside
`<application>`:

```xml
<uses-native-library android:name="libOpenCL.so" android:required="false" />
<uses-native-library android:name="libOpenCL-pixel.so" android:required="false" />
```

When the plugin is loaded it checks the GPU's arithmetic and compiles the kernels, which takes
seconds once. Say before where the result may be kept:

```kotlin
android.system.Os.setenv("BITCOMPILE_CACHE", context.codeCacheDir.path, true)
```

"""

_CALIBRATE = """\
## What goes to the GPU

Prompts, and every call if the GPU has memory of its own; the CPU computes the rest, and all of it
where there is no GPU, to the same numbers. `calibrate` measures both here and writes its choice to
`{library}.offload`, which the plugin reads when it is loaded:

```console
$ ./calibrate -t 4 .
```

`BITCOMPILE_OFFLOAD`, one of `none`, `prefill` and `all`, overrules it.

"""

_CALIBRATE_ANDROID = """\
## What goes to the GPU

Prompts, and every call if the GPU has memory of its own; the CPU computes the rest, and all of it
where there is no GPU, to the same numbers. `calibrate` measures both on a phone:

```console
$ adb shell mkdir -p /data/local/tmp/bitcompile
$ adb push calibrate calibrate.txt {library} /data/local/tmp/bitcompile/
$ adb shell 'cd /data/local/tmp/bitcompile && chmod 755 calibrate && ./calibrate -t 4 .'
```

Its last line names the choice. An app cannot write beside its libraries, so it gives the choice
itself, before the session is made:

```kotlin
android.system.Os.setenv("BITCOMPILE_OFFLOAD", "prefill", true) // or none, all
```

"""

_FILES = """\
## Files

`model.onnx` and `model.onnx.data` must stay together. `bitcompile.json` says what this artifact
was built from and holds the size and SHA-256 of every file; `bitcompile verify .` checks them, and
that the plugin computes what the model means (`--fallback` on a machine that cannot run it).
"""


SECTIONS = {
    "python": _PYTHON,
    "genai": _GENAI,
    "c": _C,
    "cuda": _CUDA,
    "genai_cuda": _GENAI_CUDA,
    "c_static": _C_STATIC,
    "android": _ANDROID,
    "swift": _SWIFT,
    "opencl": _OPENCL,
    "opencl_android": _OPENCL_ANDROID,
    "calibrate": _CALIBRATE,
    "calibrate_android": _CALIBRATE_ANDROID,
}
"""What a target's ``guide`` names."""


def missing_tokenizer(files: Sequence[str]) -> list[str]:
    """What onnxruntime-genai needs to read a text and ``files``, those of a model, lack."""
    return sorted({"tokenizer.json", "tokenizer_config.json"} - set(files))


def readme(imported: Imported, lowered: Lowered) -> str:
    """``README.md``: how to load exactly this artifact."""
    from bitcompile import __version__

    language = imported.language
    chosen = [x for x in lowered.target.guide if language is not None or "genai" not in x]
    files = language.tokenizer_files if language is not None else ()
    missing = missing_tokenizer([file.name for file in files]) if language is not None else []
    note = _NO_TOKENIZER.replace("{missing}", " and ".join(missing)) if missing else ""
    template = _HEADER + note + "".join(SECTIONS[x] for x in chosen) + _FILES
    device = lowered.target.device
    first = [(PROVIDERS[device][1], PROVIDER_OPTIONS)] if device in PROVIDERS else []
    values = {
        "source": imported.source,
        "target": lowered.target.name,
        "version": __version__,
        "emits": lowered.target.emits,
        "layout": lowered.layout,
        "host": lowered.target.host,
        "library": lowered.target.library,
        "archive": PurePath(lowered.target.library).with_suffix(".a").name,
        "minimum": MIN_ONNXRUNTIME,
        "providers": str([*first, "CPUExecutionProvider"]),
        "length": str(min(256, language.context_length) if language is not None else 0),
    }
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    return template
