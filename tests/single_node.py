"""One-node models of our operators, run in ONNX Runtime with the plugin or by function bodies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bitcompile.custom_ops import OPS
from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET
from bitcompile.targets import resolve

CHOSEN = "BITCOMPILE_TEST_PLUGIN"
"""Environment variable with the plugin to test."""
NONE = np.zeros((), np.float32)
"""An absent optional input."""


def plugin() -> Path:
    """This machine's plugin (compiled once, then from the cache), or an instrumented one."""
    chosen = os.environ.get(CHOSEN)
    return Path(chosen) if chosen else resolve("native").compile()[0]


@contextmanager
def isa(name: str | None) -> Iterator[None]:
    """Sessions made inside use this kernel variant."""
    before = os.environ.pop("BITCOMPILE_ISA", None)
    if name is not None:
        os.environ["BITCOMPILE_ISA"] = name
    try:
        yield
    finally:
        os.environ.pop("BITCOMPILE_ISA", None)
        if before is not None:
            os.environ["BITCOMPILE_ISA"] = before


def model(
    op: str,
    attributes: Mapping[str, Any],
    constants: Mapping[str, np.ndarray],
    *,
    function: bool = False,
) -> onnx.ModelProto:
    """A model of one node; inputs without a constant are graph inputs, any shape."""
    definition = OPS[op]
    node = helper.make_node(
        op, [i.name for i in definition.inputs], ["y"], domain=DOMAIN, **attributes
    )
    types = {"float": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
    inputs = [
        helper.make_tensor_value_info(i.name, types[i.dtype], None)
        for i in definition.inputs
        if i.name not in constants
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph([node], op, inputs, [output], initializers)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    if function:
        complete = definition.complete(attributes)
        for name in dict.fromkeys(("BitLinear", "NormBitLinear", op)):
            filler = {**OPS[name].attributes, **complete}
            made.functions.append(onnx.parser.parse_function(OPS[name].body(filler)))
    return made


def session(
    made: onnx.ModelProto, *, with_plugin: bool = True, variant: str | None = None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """A session on ``made``; spinning is off, because test machines are shared."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with isa(variant):
        if with_plugin:
            options.register_custom_ops_library(str(plugin()))
        return onnxruntime.InferenceSession(made.SerializeToString(), options)


def accumulator_input(rng: np.random.Generator, M: int, K: int) -> tuple[np.ndarray, np.float32]:
    """``x`` ``[M, K]`` whose rows share one quantisation scale ``s``: with w_scale = s, y = acc."""
    from bitcompile import numerics

    x = rng.standard_normal((M, K)).astype(np.float32)
    x[np.arange(M), rng.integers(0, K, M)] = np.float32(np.abs(x).max() + 1)
    _, s = numerics.quantize_activations(x)
    assert (s == s[0]).all()
    return x, s[0, 0]
