"""Random weights for an artifact whose data file is missing, so that a skeleton can travel.

    python -m tests.bench.fill OUT

Reads what ``OUT/model.onnx`` says of its external data, writes a file of that size with valid
weights (every ternary byte decodes, scales and norms are finite and near what models have), and
makes the manifest agree. The model then computes nonsense at the true speed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bitcompile.artifact import DATA, MANIFEST, MODEL, sha256
from bitcompile.custom_ops import OPS
from bitcompile.opset import DOMAIN
from bitcompile.packing import layout

FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def valid_bytes(id: str) -> np.ndarray[Any, Any]:
    """The bytes of a layout that hold no invalid code."""
    return np.flatnonzero((layout(id).codec.codes < 3).all(axis=1)).astype(np.uint8)


def layouts(model: onnx.ModelProto) -> dict[str, str]:
    """The layout of each initializer that is a ternary weight."""
    found = {}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in OPS:
            continue
        op = OPS[node.op_type]
        ids = [a.s.decode() for a in node.attribute if a.name == "layout"]
        inputs = dict(zip((i.name for i in op.inputs), node.input, strict=True))
        found |= {inputs[weight.data]: ids[0] for weight in op.weights}
    return found


def values(
    rng: np.random.Generator, tensor: onnx.TensorProto, id: str | None
) -> np.ndarray[Any, Any]:
    """Random content of one initializer."""
    shape = tuple(tensor.dims)
    if id is not None:
        valid = valid_bytes(id)
        return valid[rng.integers(0, len(valid), shape, np.uint8)]
    if tensor.data_type == onnx.TensorProto.UINT8:
        return rng.integers(0, 256, shape, np.uint8)
    if tensor.data_type in FLOATS:
        return rng.uniform(0.01, 0.03, shape).astype(FLOATS[tensor.data_type])
    raise ValueError(f"{tensor.name} has data type {tensor.data_type}: fill knows floats and uint8")


def fill(folder: Path, seed: int = 0) -> int:
    """Write the data file of the artifact ``folder``; its bytes."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    ids, rng, size = layouts(model), np.random.default_rng(seed), 0
    with (folder / DATA).open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entries = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entries.get("offset", 0)), int(entries["length"])
            content = values(rng, tensor, ids.get(tensor.name))
            if content.nbytes != length:
                raise ValueError(f"{tensor.name}: {content.nbytes} bytes, the model says {length}")
            file.seek(offset)
            content.tofile(file)
            size = max(size, offset + length)
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        file.truncate(max(size, manifest["files"][DATA]["bytes"]))
    manifest["files"][DATA] = {
        "bytes": (folder / DATA).stat().st_size,
        "sha256": sha256(folder / DATA),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
    return size


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {fill(Path(name)) / 1e6:.0f} MB")
