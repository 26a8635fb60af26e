"""Where a decoded token's time goes: ONNX Runtime's profile, beside the bytes each node reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile import runtime
from bitcompile.artifact import Artifact
from bitcompile.decoder import Decoder, kv_bytes

STEPS = 24
"""Decoded tokens of a profile; the first third warms up."""
SIZES = {"FLOAT": 4, "UINT8": 1, "INT32": 4, "INT64": 8, "FLOAT16": 2, "INT8": 1}
ATTENTION = "GroupQueryAttention"


def measure_operators(
    artifact: Artifact, sizes: Mapping[str, int], threads: int, roof: float
) -> list[dict[str, Any]]:
    """One row for each kind of operator, slowest first.

    ``sizes``: ``context`` and ``batch`` of the decoding; ``roof``: bytes a second memory gives.
    Rows: ``op, nodes, seconds`` (of one step, all nodes; median), ``bytes`` (constants, and the
    cache for attention), ``roof_share``; ``other`` is the time between nodes. Profiling itself adds
    about a microsecond a node.
    """
    import onnxruntime

    language = artifact.manifest["language"]
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.session_options(artifact.path, threads=threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(artifact.model), options, providers=["CPUExecutionProvider"]
        )
        decoder = Decoder(session, language, sizes["context"] + STEPS, sizes["batch"])
        decoder.reset(sizes["context"])
        for _ in range(STEPS):
            decoder.feed(np.zeros(1, np.int64))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    read = _constant_bytes(artifact.model)
    read[ATTENTION] = kv_bytes(language, 1) * (sizes["context"] + STEPS // 2) * sizes["batch"]
    return _rows(_steps(events), read, roof)


def _steps(events: Iterable[Mapping[str, Any]]) -> list[dict[str, list[float]]]:
    """Of each step after the warm-up: seconds of every node by operator; ``""``: the whole step."""
    runs = [e for e in events if e["name"] == "model_run"]
    steps: list[dict[str, list[float]]] = [{"": [run["dur"] * 1e-6]} for run in runs]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    for step, run in zip(steps, runs, strict=True):
        for node in nodes:
            if run["ts"] <= node["ts"] < run["ts"] + run["dur"]:
                step.setdefault(node["args"]["op_name"], []).append(node["dur"] * 1e-6)
    return steps[STEPS // 3 :]


def _rows(
    steps: list[dict[str, list[float]]], read: Mapping[str, int], roof: float
) -> list[dict[str, Any]]:
    names = {name for step in steps for name in step if name}
    rows: list[dict[str, Any]] = []
    for name in names:
        seconds = float(np.median([sum(step.get(name, [])) for step in steps]))
        touched = read.get(name, 0)
        share = touched / seconds / roof if seconds else 0.0
        nodes = max(len(step.get(name, [])) for step in steps)
        row = {"op": name, "nodes": nodes, "seconds": seconds, "bytes": touched}
        rows.append({**row, "roof_share": share})
    rows.sort(key=lambda row: -row["seconds"])
    between = float(np.median([s[""][0] - sum(sum(v) for k, v in s.items() if k) for s in steps]))
    rows.append({"op": "other", "nodes": 0, "seconds": between, "bytes": 0, "roof_share": 0.0})
    return rows


def _constant_bytes(path: Path) -> dict[str, int]:
    """Bytes of the constants that the nodes of each operator take; an embedding reads one row."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    held = {
        tensor.name: prod(tensor.dims) * SIZES.get(onnx.TensorProto.DataType.Name(kind), 4)
        for tensor in graph.initializer
        for kind in [tensor.data_type]
    }
    total: dict[str, int] = {}
    for node in graph.node:
        if not node.op_type.startswith("Gather"):
            constants = sum(held.get(name, 0) for name in node.input)
            total[node.op_type] = total.get(node.op_type, 0) + constants
    return total
