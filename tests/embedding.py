"""The C example as a program, and what it generates from the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
C = EXAMPLES / "c"
MODEL = EXAMPLES / "docs-bitnet-25m"
REFERENCE: dict[str, list[int]] = json.loads((MODEL / "reference.json").read_text())["greedy"]
COUNT = 32
STRICT = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
X86 = "x86_64-linux-gnu.2.28"


def prompt(text: str) -> list[int]:
    """The tokens of ``reference.json``'s protocol."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [0, *tokenizer.encode(text, add_special_tokens=False).ids]


def zig(*arguments: str | Path) -> None:
    """``zig cc``; the output of a failure is the test's message."""
    command = [sys.executable, "-m", "ziglang", "cc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def desktop_onnxruntime(folder: Path) -> Path:
    """``folder`` with the library of the installed package under the names linkers look for."""
    folder.mkdir(parents=True, exist_ok=True)
    capi = Path(onnxruntime.__file__).parent / "capi"
    library = next(capi.glob("libonnxruntime.so.1.*"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    return folder


@dataclass(frozen=True)
class Answer:
    """What the example printed and wrote."""

    tokens: list[int]
    logits: npt.NDArray[np.float64]
    """[tokens, vocabulary]."""


def generate(
    command: Sequence[str | Path],
    artifact: Path,
    tokens: Sequence[int],
    folder: Path,
    *options: str | Path,
    count: int = COUNT,
) -> Answer:
    """``count`` greedy tokens after ``tokens`` by the program ``command`` on one thread."""
    log = folder / "logits.f32"
    done = subprocess.run(
        [str(w) for w in (*command, artifact, "-n", count, "-t", 1, "-l", log, *options, *tokens)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = [int(word) for word in done.stdout.split()]
    return Answer(answer, np.fromfile(log, "<f4").reshape(len(answer), -1).astype(np.float64))


def cosine(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Of two arrays as vectors."""
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def agreed(one: Answer, other: Answer) -> int:
    """How many tokens are the same before the first that differs, all of them after a near-tie.

    A near-tie is a step where the two best logits of ``one`` are no further apart than twice the
    largest difference of a logit at that step: each of the two may have moved by that much. The
    tokens after it continue another text.
    """
    steps = zip(one.tokens, other.tokens, strict=True)
    first = next((i for i, (a, b) in enumerate(steps) if a != b), len(one.tokens))
    if first < len(one.tokens):
        best = np.sort(one.logits[first])[-2:]
        if best[1] - best[0] <= 2 * np.abs(one.logits[first] - other.logits[first]).max():
            return len(one.tokens)
    return first
