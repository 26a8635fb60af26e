"""Golden vectors as a file for ``conformance.c``: nodes of every operator and what they give.

Inputs are those of ``tests/golden``; outputs those of the NumPy reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile import numerics
from bitcompile.calibration import describe
from bitcompile.custom_ops import OPS
from bitcompile.packing import CPU_TILE, PackedTernary
from tests.golden import make

NONE = np.zeros((), np.float32)
Arrays = Mapping[str, np.ndarray]


def _weight(weight: np.ndarray, scale: np.ndarray, group_size: int) -> tuple[np.ndarray, ...]:
    packed = PackedTernary.pack(weight, scale, CPU_TILE, group_size)
    return packed.data, CPU_TILE.encode_scale(packed.scale, group_size)


def _linear(a: Arrays, group_size: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """BitLinear, NormBitLinear, and for whole rows the bare accumulators."""
    N, K = a["weight"].shape
    attributes = {"K": K, "N": N, "layout": CPU_TILE.id, "group_size": group_size}
    data, scale = _weight(a["weight"], a["scale"], group_size)
    inputs = {"x": a["x"], "w": data, "w_scale": scale, "bias": a["bias"],
              "residual": a["residual"]}  # fmt: skip
    yield "BitLinear", attributes, inputs
    yield "NormBitLinear", {**attributes, "eps": make.EPS}, {**inputs, "gamma": a["gamma"]}
    if group_size == 0:
        # Rows of one scale s: weights scaled by s leave the int32 sums themselves.
        x = a["x"][:-2].copy()
        x[:, 0] = np.abs(x).max()
        s = numerics.quantize_activations(x)[1]
        assert (s == s[0]).all()
        unit = np.full((N, 1), s[0, 0], np.float32)
        yield "BitLinear", attributes, {**inputs, "x": x, "w_scale": unit, "bias": NONE,
                                        "residual": NONE}  # fmt: skip


def _glu(seed: int, activation: str, sub_norm: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    K, F, M = 70, 150, 11
    up, down = (
        _weight(rng.integers(-1, 2, shape).astype(np.int8), rng.random((shape[0], 1), "f4"), 0)
        for shape in ((2 * F, K), (K, F))
    )
    attributes = {"K": K, "N": K, "F": F, "F2": 2 * F, "layout": CPU_TILE.id, "eps": make.EPS,
                  "activation": activation, "sub_norm": sub_norm, "group_size": 0}  # fmt: skip
    x = (3 * rng.standard_normal((M, K))).astype(np.float32)
    x[-1, 1] = np.nan
    return "BitGLU", attributes, {
        "x": x, "gamma_in": rng.random(K, "f4"), "w_gate_up": up[0], "s_gate_up": up[1],
        "gamma_sub": rng.random(F, "f4") if sub_norm else NONE, "w_down": down[0],
        "s_down": down[1], "residual": x}  # fmt: skip


def nodes() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Name, operator, attributes and inputs of every node."""
    golden = make.load()
    for name, (_, _, _, group_size) in make.LINEAR.items():
        for i, node in enumerate(_linear(golden[name], group_size)):
            yield f"{name} {('linear', 'norm', 'accumulators')[i]}", *node
    for i, activation in enumerate(numerics.ACTIVATIONS):
        yield f"glu {activation}", *_glu(i, activation, i % 2)
    for name, (V, K, _, bits) in make.HEADS.items():
        a = golden[name]
        yield name, "HeadLinear", {"K": K, "N": V, "bits": bits, "block": 128}, {
            "x": a["x"], "table": a["codes"], "scale": a["table_scale"]}  # fmt: skip


def write(path: Path) -> int:
    """Write the file; returns the number of cases. Each node also runs on its first rows alone."""
    count = 0
    with path.open("wb") as file:
        for name, op, attributes, inputs in nodes():
            for rows in dict.fromkeys((len(inputs["x"]), 2, 1)):
                called = {
                    key: value[:rows] if key in ("x", "residual") and value.ndim else value
                    for key, value in inputs.items()
                }
                y = OPS[op].reference(called, OPS[op].complete(attributes))
                tensors = [np.asarray(called[i.name], order="C") for i in OPS[op].inputs]
                varies = [i.name in ("x", "residual") for i in OPS[op].inputs]
                shapes = [(t.dtype == np.uint8, t.shape, v and t.ndim > 0)
                          for t, v in zip(tensors, varies, strict=True)]  # fmt: skip
                line = describe(op, attributes, shapes)
                file.write(f"{name} {rows}\t{line}\n".encode("ascii"))
                for tensor in (*tensors, np.int64(y.size), y.astype("<f4")):
                    file.write(tensor.tobytes())
                count += 1
    return count
