"""Two sessions over one artifact share its weights: what the second costs in memory.

    python examples/shared_weights.py ARTIFACT

Weights stay in the mapped file, so that sessions, and processes, share their pages. What a session
has of its own is memory that belongs to no file: "Anonymous" in /proc/self/smaps_rollup (Linux).
("Private" there counts a file's pages too, as long as only one mapping has touched them.)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from plain_onnxruntime import open_session, random_inputs

MB = 1e6


@dataclass(frozen=True)
class Memory:
    """Bytes of this process."""

    private: int
    """Of no file, so nobody else's."""
    resident: int


@dataclass(frozen=True)
class Result:
    """Bytes of the weight file, and of private memory that each session added."""

    weights: int
    first: int
    second: int


def memory() -> Memory:
    """What /proc/self/smaps_rollup says."""
    values = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, number, _ = line.split()
        values[key.rstrip(":")] = int(number) * 1024
    return Memory(values["Anonymous"], values["Rss"])


def main(arguments: list[str] | None = None) -> Result:
    """Open two sessions, use them, and print what each added."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    artifact = parser.parse_args(arguments).artifact
    data = artifact / "model.onnx.data"
    states, sessions = [memory()], []
    for _ in range(2):
        sessions.append(open_session(artifact))
        sessions[-1].run(None, random_inputs(sessions[-1]))
        states.append(memory())
    first, second = (b.private - a.private for a, b in pairwise(states))
    result = Result(data.stat().st_size if data.exists() else 0, first, second)
    print(f"weights in the mapped file        {result.weights / MB:8.1f} MB")
    print(f"private memory, first session     {result.first / MB:8.1f} MB")
    print(f"private memory, second session    {result.second / MB:8.1f} MB")
    print(f"resident with {len(sessions)} sessions           {states[-1].resident / MB:8.1f} MB")
    return result


if __name__ == "__main__":
    main()
