"""Run an artifact with onnxruntime and numpy alone: nothing here imports bitcompile.

    python examples/plain_onnxruntime.py ARTIFACT

Feeds random arrays of the declared shapes, once with the plugin and once without it (the model
then runs through the functions it carries, slower), and prints how far the results are apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
LIBRARY = "libbitcompile_ops.so"


def open_session(artifact: Path, plugin: bool = True) -> onnxruntime.InferenceSession:
    """A session; ``plugin`` registers the library that lies beside the model."""
    options = onnxruntime.SessionOptions()
    if plugin:
        options.register_custom_ops_library(str((artifact / LIBRARY).absolute()))
    return onnxruntime.InferenceSession(
        str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def random_inputs(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """One array an input; open dimensions are 1, those of an empty KV cache 0."""
    rng = np.random.default_rng(0)
    feeds = {}
    for declared in session.get_inputs():
        shape = [
            dim if isinstance(dim, int) else int(dim != "past_sequence_length")
            for dim in declared.shape
        ]
        kind = TYPES[declared.type]
        values: Any = rng.standard_normal(shape) if kind is np.float32 else np.ones(shape)
        feeds[declared.name] = values.astype(kind)
    return feeds


def main(arguments: list[str] | None = None) -> float:
    """Run both ways; the largest difference between their float results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    artifact = parser.parse_args(arguments).artifact
    session = open_session(artifact)
    feeds = random_inputs(session)
    for name, array in feeds.items():
        print(f"in   {name}  {array.dtype}{list(array.shape)}")
    results = session.run(None, feeds)
    for declared, array in zip(session.get_outputs(), results, strict=True):
        print(f"out  {declared.name}  {array.dtype}{list(array.shape)}")
    without = open_session(artifact, plugin=False).run(None, feeds)
    pairs = [(a, b) for a, b in zip(results, without, strict=True) if a.size]
    difference = max(float(np.abs(a - b).max()) for a, b in pairs if a.dtype == np.float32)
    print(f"largest difference with and without the plugin: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
