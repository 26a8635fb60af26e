"""The Android example's Java classes: compiled against Android's, and run on a desktop.

They run with the classes and the JNI library of onnxruntime-android and the installed onnxruntime;
``tests/desktop/bionic.c`` stands in for the few functions of Android that the JNI library needs.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitcompile.artifact import Artifact
from bitcompile.decoder import kv_bytes
from bitcompile.targets import TARGETS
from tests import embedding
from tests.embedding import EXAMPLES, MODEL, REFERENCE, X86, prompt, zig
from tests.tools import embedding_kit, java_json, program

ANDROID = EXAMPLES / "android"
JAVA = ANDROID / "app" / "src" / "main" / "java"
DESKTOP = Path(__file__).parent / "desktop"
TEXT = next(iter(REFERENCE))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split of Llama 3's tokenizer, which is also that of BitNet b1.58 2B-4T."""
LETTERS = [
    *"abc XYZ'sStT019\n\t\r .,!?éßñ中文日本語한국어👍🏽😀"
    "\u00a0\u2028\u200b\u0300\u0085\x1c\x0b½²٣ǅſ"
]
PIECES = [*LETTERS, "'ll", "'RE", "<|begin_of_text|>", "<|end_of_text|>", "  ", "\n\n", " \n"]

Java = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> Java:
    """Runs ``Desktop`` with arguments and standard input."""
    folder, kit = tmp_path_factory.mktemp("java"), embedding_kit("android")
    jars = f"{kit / 'classes.jar'}:{kit / 'android.jar'}"
    sources = sorted([*JAVA.rglob("*.java"), *DESKTOP.rglob("*.java")])
    # Java 8 is what Android's tools take everywhere; nothing newer may be used.
    strict = ["-Xlint:all,-options", "-Werror", "--release", "8", "-cp", jars, "-d", folder]
    compile_java(*strict, *sources)
    for name in ("libc", "libm", "libdl", "libonnxruntime"):
        flags = ("-O1", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}.so")
        zig("-target", X86, *flags, DESKTOP / "bionic.c", "-o", folder / f"{name}.so")
    shutil.copy(kit / "libonnxruntime4j_jni.so", folder)
    runtime = embedding.desktop_onnxruntime(folder / "onnxruntime") / "libonnxruntime.so.1"
    environment = {"LD_LIBRARY_PATH": str(folder), "DESKTOP_ONNXRUNTIME": str(runtime)}
    classes = f"{folder}:{kit / 'classes.jar'}:{java_json()}"
    options = [f"-Donnxruntime.native.path={folder}", "-cp", classes, "dev.bitcompile.Desktop"]

    def run(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [program("java"), *options, *map(str, arguments)]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, env=environment
        )

    return run


def compile_java(*arguments: object) -> None:
    command = [program("javac"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tokens_are_those_of_the_reference(java: Java, embedded: Callable[[str], Artifact]) -> None:
    artifact = embedded("x86")
    tokens = prompt(TEXT)
    done = java("generate", artifact.path, artifact.library, 64, 32, *tokens)
    assert done.returncode == 0, done.stderr
    first, second, cache = done.stdout.splitlines()
    assert json.loads(first) == REFERENCE[TEXT]
    assert second == first
    assert int(cache) == kv_bytes(artifact.manifest["language"], 64)


@pytest.mark.parametrize(
    ("capacity", "library", "tokens", "message"),
    [
        (2000, "libbitcompile_ops.so", [1], "not between 1 and the model's context of 1024"),
        (64, "absent.so", [1], "absent.so is missing"),
        (64, "model.onnx", [1], "model.onnx"),
        (64, "libbitcompile_ops.so", [4096], "4096 is not in the vocabulary"),
        (8, "libbitcompile_ops.so", [1] * 9, "9 tokens do not fit the cache of 8"),
        (64, "libbitcompile_ops.so", [], "no tokens"),
    ],
)
def test_bad_input_gives_a_message(
    java: Java,
    embedded: Callable[[str], Artifact],
    capacity: int,
    library: str,
    tokens: Sequence[int],
    message: str,
) -> None:
    folder = embedded("x86").path
    done = java("generate", folder, folder / library, capacity, 4, *tokens)
    assert done.returncode == 1
    assert message in done.stderr


def texts() -> list[str]:
    """Real text, and 2,000 random ones of letters, spaces and signs that splits treat apart."""
    rng = random.Random(0)
    made = ["".join(rng.choices(PIECES, k=rng.randrange(1, 60))) for _ in range(2000)]
    return [*made, *(file.read_text("utf-8") for file in sorted(EXAMPLES.parent.glob("docs/*.md")))]


def llama3(folder: Path) -> Path:
    """A tokenizer of Llama 3's kind, trained on this project's documentation."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(file) for file in sorted(EXAMPLES.parent.glob("docs/*.md"))], trainer)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(special[0], 0)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["embedded", "llama3"])
def test_the_tokenizer_equals_the_original(java: Java, kind: str, tmp_path: Path) -> None:
    file = MODEL / "tokenizer.json" if kind == "embedded" else llama3(tmp_path)
    original, inputs = Tokenizer.from_file(str(file)), texts()
    lines = "".join(json.dumps([text]) + "\n" for text in inputs)
    done = java("tokenize", file, text=lines)
    assert done.returncode == 0, done.stderr
    results = done.stdout.rstrip("\n").split("\n")
    for text, line in zip(inputs, results, strict=True):
        ids, decoded = json.loads(line)
        assert ids == original.encode(text).ids, repr(text)
        assert decoded == original.decode(ids), repr(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer", {"type": "NFC"}, "a normalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "the pre-tokenizer"),
        ("model", {"type": "Unigram", "vocab": [], "merges": []}, "a Unigram model"),
    ],
)
def test_other_tokenizers_are_refused(
    java: Java, key: str, value: object, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    file.write_text(json.dumps({**tokenizer, key: value}))
    done = java("tokenize", file)
    assert done.returncode == 1
    assert message in done.stderr
    assert "onnxruntime-extensions" in done.stderr


def test_files_are_installed_once_and_checked(
    java: Java, embedded: Callable[[str], Artifact], tmp_path: Path
) -> None:
    source, to = shutil.copytree(embedded("x86").path, tmp_path / "from"), tmp_path / "to"
    assert java("install", source, to).returncode == 0
    names = {path.name for path in source.iterdir()} - {"libbitcompile_ops.so"}
    assert {path.name for path in to.iterdir()} == names
    again = java("install", source, to)
    assert again.stdout.splitlines() == ["bitcompile.json"]  # only the manifest was read
    manifest = json.loads((source / "bitcompile.json").read_text())
    (source / "bitcompile.json").write_text(json.dumps({**manifest, "source": "another"}))
    (source / "model.onnx").write_bytes(b"damaged")
    damaged = java("install", source, to)
    assert damaged.returncode == 1
    assert "model.onnx is damaged" in damaged.stderr
    assert not (to / "bitcompile.json").exists()  # so the next start installs again


@pytest.mark.parametrize(
    ("frequencies", "big"),
    [([2000] * 4 + [2800] * 3 + [3200], 4), ([1800] * 6 + [2400] * 2, 2), ([2400] * 4, 4), ([], 3)],
)
def test_big_cores(java: Java, frequencies: list[int], big: int, tmp_path: Path) -> None:
    for cpu, frequency in enumerate(frequencies):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{frequency}000\n")
    assert int(java("cores", tmp_path).stdout) == big


def test_the_script_lays_an_artifact_where_gradle_looks(
    embedded: Callable[[str], Artifact], tmp_path: Path
) -> None:
    project = shutil.copytree(ANDROID, tmp_path / "android")
    artifact = shutil.copytree(embedded("x86").path, tmp_path / "artifact")
    script = [str(project / "install-artifact"), str(artifact)]
    refused = subprocess.run(script, capture_output=True, text=True, check=False)
    assert refused.returncode == 3
    assert "is not for Android: build it with --target android" in refused.stderr
    manifest = (artifact / "bitcompile.json").read_text()
    host = f'"host": "{TARGETS["x86"].host}"'
    assert host in manifest
    for_android = manifest.replace(host, f'"host": "{TARGETS["mali"].host}"')
    (artifact / "bitcompile.json").write_text(for_android)
    subprocess.run(script, check=True)
    main = project / "app" / "src" / "main"
    assert (main / "jniLibs" / "arm64-v8a" / "libbitcompile_ops.so").exists()
    listed = set(json.loads(manifest)["files"]) - {"libbitcompile_ops.so"} | {"bitcompile.json"}
    assert {path.name for path in (main / "assets" / "bitcompile").iterdir()} == listed


def test_the_manifest_names_the_activity_and_no_permission() -> None:
    root = ElementTree.parse(ANDROID / "app" / "src" / "main" / "AndroidManifest.xml").getroot()
    name = "{http://schemas.android.com/apk/res/android}name"
    activities = [activity.get(name) for activity in root.iter("activity")]
    assert activities == [".MainActivity"]
    assert (JAVA / "dev" / "bitcompile" / "MainActivity.java").exists()
    assert not list(root.iter("uses-permission"))
    libraries = {library.get(name): library.attrib for library in root.iter("uses-native-library")}
    assert set(libraries) == {"libOpenCL.so", "libOpenCL-pixel.so"}
    required = name.replace("}name", "}required")
    assert all(attributes[required] == "false" for attributes in libraries.values())
