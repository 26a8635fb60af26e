"""Runs a plugin in a process of its own: its driver, device and cache come from the environment.

``python -m tests.opencl_case PLUGIN`` computes one node of each operator, at decode and prefill,
and prints JSON: ``exact``, ``error`` and ``open_s``, the seconds of registering the plugin.
``OPENCL_CASE_ROWS``: the numbers of rows, 1 and 12 by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bitcompile import numerics
from bitcompile.custom_ops import OPS
from bitcompile.packing import CPU_TILE, PackedTernary, groups
from tests.single_node import NONE, model

Case = tuple[str, dict[str, Any], dict[str, np.ndarray]]
"""An operator, its attributes and its constants."""


def packed(rng: np.random.Generator, N: int, K: int, group_size: int = 0) -> PackedTernary:
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    scale = rng.random((N, groups(K, group_size))).astype(np.float32)
    return PackedTernary.pack(weight, scale, CPU_TILE, group_size)


def linear(rng: np.random.Generator, N: int, K: int, *, norm: bool, group_size: int = 0) -> Case:
    weight = packed(rng, N, K, group_size)
    stored = CPU_TILE.encode_scale(weight.scale, group_size)
    constants = {"w": weight.data, "w_scale": stored, "bias": rng.random(N).astype(np.float32)}
    attributes = {"K": K, "N": N, "layout": CPU_TILE.id, "group_size": group_size}
    if not norm:
        return "BitLinear", attributes, constants
    gamma = rng.random(K).astype(np.float32)
    return "NormBitLinear", {**attributes, "eps": 1e-5}, {"gamma": gamma, **constants}


def glu(
    rng: np.random.Generator, K: int, F: int, activation: str, sub_norm: int, group_size: int = 0
) -> Case:
    up, down = packed(rng, 2 * F, K, group_size), packed(rng, K, F, group_size)
    attributes = {"K": K, "N": K, "F": F, "F2": 2 * F, "layout": CPU_TILE.id, "eps": 1e-5}
    attributes |= {"activation": activation, "sub_norm": sub_norm, "group_size": group_size}
    constants = {
        "gamma_in": rng.random(K).astype(np.float32),
        "w_gate_up": up.data,
        "s_gate_up": CPU_TILE.encode_scale(up.scale, group_size),
        "gamma_sub": rng.random(F).astype(np.float32) if sub_norm else NONE,
        "w_down": down.data,
        "s_down": CPU_TILE.encode_scale(down.scale, group_size),
    }
    return "BitGLU", attributes, constants


def head(rng: np.random.Generator, V: int, K: int, bits: int) -> Case:
    table = rng.standard_normal((V, K)).astype(np.float32)
    codes, scale = numerics.quantize_table(table, bits, 128)
    return "HeadLinear", {"K": K, "N": V, "bits": bits}, {"table": codes, "scale": scale}


def inputs(rng: np.random.Generator, case: Case, M: int) -> dict[str, np.ndarray]:
    """Rows of several magnitudes; with enough of them one is of zeros and one holds a NaN."""
    op, attributes, _ = case
    x = rng.standard_normal((M, attributes["K"])).astype(np.float32)
    x *= np.float32(10.0) ** rng.integers(-3, 4, (M, 1)).astype(np.float32)
    if M > 3:
        x[1], x[2, 0] = 0, np.nan
    if op == "HeadLinear":
        return {"x": x}
    return {"x": x, "residual": rng.standard_normal((M, attributes["N"])).astype(np.float32)}


def differences(session: Any, case: Case, feeds: Mapping[str, np.ndarray]) -> int:
    """Outputs that are not the reference's, NaN being equal to NaN."""
    op, attributes, constants = case
    complete = OPS[op].complete(attributes)
    expected = OPS[op].reference({**constants, **feeds}, complete)
    measured = session.run(None, dict(feeds))[0]
    assert measured.shape == expected.shape
    return int(((measured != expected) & ~(np.isnan(measured) & np.isnan(expected))).sum())


def open_session(case: Case, plugin: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(plugin)
    return onnxruntime.InferenceSession(model(*case).SerializeToString(), options)


def main(plugin: str) -> dict[str, Any]:
    report: dict[str, Any] = {"exact": None, "error": None, "open_s": 0.0}
    rng = np.random.default_rng(0)
    both = tuple(int(rows) for rows in os.environ.get("OPENCL_CASE_ROWS", "1,12").split(","))
    cases = [(linear(rng, 33, 50, norm=True), both), (glu(rng, 24, 40, "relu2", 1), both)]
    cases += [(head(rng, 9, 70, 4), both), (linear(rng, 20, 90, norm=True, group_size=32), both)]
    # More columns than local memory holds at a time.
    cases += [(linear(rng, 5, 1100, norm=False), (1,)), (linear(rng, 5, 280, norm=False), (3,))]
    try:
        began = time.perf_counter()
        onnxruntime.SessionOptions().register_custom_ops_library(plugin)
        report["open_s"] = time.perf_counter() - began
        wrong = 0
        for case, rows in cases:
            session = open_session(case, plugin)
            wrong += sum(differences(session, case, inputs(rng, case, M)) for M in rows)
        report["exact"] = wrong == 0
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        report["error"] = str(error)
    return report


def run(plugin: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """The report of a new process with these variables beside ours, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.opencl_case", str(plugin)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
