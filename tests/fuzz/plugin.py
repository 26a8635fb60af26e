"""The plugin as a target: nodes with arbitrary attributes, shapes, types and values.

A case is the JSON of a :func:`node`. One that no change spoiled must give its reference's bits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.edits import FLOATS, integer, small
from tests.fuzz.engine import Prepared

VARIANTS = ("avx512-vnni", "avx2", "portable")
ACTIVATIONS = ("relu2", "silu", "gelu_tanh", "gelu_erf")
FILLS = ("valid", "bytes", "nan", "inf", "zero", "huge", "tiny", "negative zero")
TYPES = ("float32", "uint8", "float64", "float16", "int8", "int32", "int64", "bool")
MOST = 1 << 16
"""Elements of an input."""
ENDS = (127, 128, 129, 255, 256, 257, 300)
OPS = ("BitLinear", "NormBitLinear", "BitGLU", "HeadLinear", "Roof")


def draw_node(draw: Random) -> bytes:
    """A valid node, then up to four changes."""
    op = draw.choice(OPS)
    K, N = (draw.choice(ENDS) if draw.random() < 0.3 else draw.randrange(1, 71) for _ in "KN")
    lead = [draw.choice((0, 1, 1, 2, 3, 5, 9, 14)) for _ in range(draw.randrange(4))]
    case = node(op, K, N, draw.randrange(1, 41), lead, draw.choice((0, 0, 16, 32, 64, 128, 256)))
    case |= {"seed": draw.randrange(1 << 16), "threads": draw.choice((1, 1, 2))}
    case["variant"] = draw.randrange(len(VARIANTS))
    if op == "BitGLU":
        case["attributes"]["activation"] = draw.choice(ACTIVATIONS)
    for entry in case["inputs"].values():
        entry["constant"] = draw.random() < 0.5
    changes = draw.choice((0, 1, 1, 2, 4))
    case["spoiled"] = changes > 0
    for _ in range(changes):
        _change(draw, case)
    return json.dumps(case).encode()


def _change(draw: Random, case: dict[str, Any]) -> None:
    attributes, entry = case["attributes"], draw.choice(list(case["inputs"].values()))
    kind = draw.choice(("attribute", "drop", "shape", "dim", "type", "fill", "fill", "fill"))
    if kind == "attribute":
        name = draw.choice([*attributes, "group_size", "act_bits", "other"])
        texts = ("", "i2", "relu2", "x" * 63, "x" * 64, "x" * 5000)
        attributes[name] = draw.choice(
            (small(integer(draw)), draw.choice(FLOATS), draw.choice(texts))
        )
    elif kind == "drop" and attributes:
        attributes.pop(draw.choice(list(attributes)))
    elif kind == "shape":
        entry["shape"] = [draw.randrange(21) for _ in range(draw.randrange(10))]
    elif kind == "dim" and entry["shape"]:
        at = draw.randrange(len(entry["shape"]))
        entry["shape"][at] = max(0, entry["shape"][at] + draw.choice((-1, 1, 16, -16)))
    elif kind == "type":
        entry["type"] = draw.choice(TYPES)
    else:
        entry["fill"] = draw.choice(FILLS)


def node(op: str, K: int, N: int, F: int, lead: list[int], group_size: int) -> dict[str, Any]:
    """A valid node: its attributes, and shape and type of each input."""
    from bitcompile.packing import CPU_TILE

    def weight(rows: int, columns: int) -> tuple[list[int], list[int]]:
        data = list(CPU_TILE.shape(rows, columns))
        return data, list(CPU_TILE.scale_shape(rows, columns, group_size))

    common = {"K": K, "N": N, "layout": CPU_TILE.id, "group_size": group_size, "act_bits": 8}
    shapes: dict[str, list[int]] = {"x": [*lead, K]}
    if op in ("BitLinear", "NormBitLinear"):
        data, scale = weight(N, K)
        if op == "NormBitLinear":
            shapes["gamma"] = [K]
            common["eps"] = 1e-5
        shapes |= {"w": data, "w_scale": scale, "bias": [N], "residual": [*lead, N]}
    elif op == "BitGLU":
        common |= {"N": K, "F": F, "F2": 2 * F, "eps": 1e-5, "activation": "relu2", "sub_norm": 1}
        (up, up_scale), (down, down_scale) = weight(2 * F, K), weight(K, F)
        shapes |= {"gamma_in": [K], "w_gate_up": up, "s_gate_up": up_scale, "gamma_sub": [F],
                   "w_down": down, "s_down": down_scale, "residual": [*lead, K]}  # fmt: skip
    elif op == "HeadLinear":
        block = 64 * (1 + F % 2)
        blocks = -(-K // block)
        bits = 8 if F % 3 else 4
        block = max(block, 128) if bits == 4 else block
        blocks = -(-K // block)
        common = {"K": K, "N": N, "bits": bits, "block": block}
        shapes |= {"table": [N, blocks, block * bits // 8], "scale": [N, blocks, 1]}
    else:
        common, shapes = {"kind": 0, "steps": 1}, {"data": [256 * (1 + F)]}
    bytes_of = ("w", "table", "data", "w_gate_up", "w_down")
    inputs = {
        name: {"shape": shape, "type": "uint8" if name in bytes_of else "float32", "fill": "valid"}
        for name, shape in shapes.items()
    }
    return {"op": op, "attributes": common, "inputs": inputs}


def values(name: str, entry: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """The array of one input."""
    shape, kind = list(entry["shape"]), np.dtype(entry["type"])
    while int(np.prod(shape, dtype=np.int64)) > MOST:
        shape[int(np.argmax(shape))] //= 2
    if kind == np.uint8 or entry["fill"] == "bytes":
        count = int(np.prod(shape, dtype=np.int64))
        raw = rng.integers(0, 256, count * kind.itemsize).astype(np.uint8)
        if entry["fill"] == "valid" and name.startswith("w"):
            fields = rng.integers(0, 3, (4, count)).astype(np.uint8)
            raw = (fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6).astype(np.uint8)
        return (raw & 1 if kind == np.bool_ else raw).view(kind).reshape(shape)
    data = rng.standard_normal(shape)
    special = {"nan": np.nan, "inf": np.inf, "zero": 0.0, "huge": 3e38, "tiny": 1e-45,
               "negative zero": -0.0}.get(entry["fill"])  # fmt: skip
    if special is not None:
        data = (
            np.where(rng.random(shape) < 0.3, special, data)
            if rng.random() < 0.7
            else (np.full(shape, special))
        )
    elif "scale" in name or name.startswith("s_"):
        data = np.abs(data) + 0.01
    with np.errstate(all="ignore"):
        return np.asarray(data).astype(kind)


def prepare(work: Path) -> Prepared:
    """One node a case, by each variant that this machine runs."""
    from tests import single_node
    from tests.test_plugin import runnable

    variants = [name for name in VARIANTS if runnable(name)]
    os.environ.setdefault(single_node.CHOSEN, str(single_node.plugin()))  # finding it takes longest

    def check(case: bytes) -> None:
        run(json.loads(case), variants)

    return Prepared(draw_node, check)


def run(case: dict[str, Any], variants: list[str]) -> None:
    """Run a node; InputError if ONNX Runtime or the plugin refuses it."""
    from bitcompile.errors import InputError
    from bitcompile.runtime import one_line
    from tests.single_node import session

    rng = np.random.default_rng(case["seed"])
    arrays = {name: values(name, entry, rng) for name, entry in case["inputs"].items()}
    fed = {k: v for k, v in arrays.items() if not case["inputs"][k]["constant"]}
    fixed = {k: v for k, v in arrays.items() if k not in fed}
    try:
        made = _model(case, fixed)
        variant = variants[case["variant"] % len(variants)]
        (y,) = session(made, variant=variant, threads=case["threads"]).run(None, fed)
    except (RuntimeError, ValueError) as error:  # as onnxruntime's exceptions are
        raise InputError(one_line(error)) from None
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise InputError(one_line(error)) from None
        raise
    if not case["spoiled"] and case["op"] != "Roof":
        _compare(case, arrays, y)


def _model(case: dict[str, Any], fixed: dict[str, np.ndarray]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET

    names = list(case["inputs"])
    one = helper.make_node(case["op"], names, ["y"], domain=DOMAIN, **case["attributes"])
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(case["inputs"][name]["type"])), None
        )
        for name in names
        if name not in fixed
    ]
    kind = TensorProto.UINT8 if case["op"] == "Roof" else TensorProto.FLOAT
    output = helper.make_tensor_value_info("y", kind, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in fixed.items()]
    graph = helper.make_graph([one], "fuzz", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _compare(case: dict[str, Any], arrays: dict[str, np.ndarray], y: np.ndarray) -> None:
    from bitcompile.custom_ops import OPS

    op = OPS[case["op"]]
    expected = op.reference(arrays, op.complete(case["attributes"]))
    np.testing.assert_array_equal(y, np.asarray(expected, np.float32))
