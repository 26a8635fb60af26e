"""The plugin's own benchmark of a machine as a model of one node."""

from __future__ import annotations

from typing import Any

from bitcompile import runtime
from bitcompile.artifact import Artifact
from bitcompile.errors import ToolchainError
from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET


def roof_session(artifact: Artifact, kind: int, steps: int, threads: int | None = None) -> Any:
    """A session of operator Roof: ``data`` uint8 ``[n]`` to ``out`` uint8 ``[tasks, 64]``.

    ``kind`` 0 reads the data, others are for CPUs; see ``custom_ops/csrc``. Raises ToolchainError
    if the plugin does not have it or the onnx package is missing.
    """
    try:
        from onnx import TensorProto, helper
    except ImportError:
        raise ToolchainError(
            'bench needs the onnx package: pip install "bitcompile[build]", or pip install onnx'
        ) from None
    node = helper.make_node("Roof", ["data"], ["out"], domain=DOMAIN, kind=kind, steps=steps)
    data = helper.make_tensor_value_info("data", TensorProto.UINT8, [None])
    out = helper.make_tensor_value_info("out", TensorProto.UINT8, [None, 64])
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "roof", [data], [out])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = runtime.session_options(artifact.path, threads=threads)
    options.log_severity_level = 3
    try:
        return runtime.open_session(model.SerializeToString(), options, runtime.providers(artifact))
    except runtime.OnnxruntimeError as error:
        raise ToolchainError(f"bench has no roofs here: {error}") from error
