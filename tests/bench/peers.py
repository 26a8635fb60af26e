"""Our ternary operator beside what stock ONNX Runtime offers, in one run on one machine.

    python -m tests.bench.peers --folder /tmp/peers            # whole stacks, 2B-4T shape
    python -m tests.bench.peers --folder /tmp/peers --ops      # single operators, DRAM-bound
    python -m tests.bench.peers --folder /tmp/peers --layers 4 # smaller: says little about memory

A *stack* is every matrix product of a model and nothing else but the glue between them (no
attention, no norms), each layer with its own random weights: equal weights would stay in the cache
and look twice as fast. Every engine gets the same glue. Repeats are interleaved; medians are
printed. llama.cpp and bitnet.cpp are measured by their own tools on a model of the same shape
(``--command 'NAME=PROGRAM ARGUMENTS'``, which prints tokens per second on its last line).
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET
from bitcompile.packing import CPU_TILE, T5_TILE, Layout
from bitcompile.targets import resolve
from tests.bench.fill import valid_bytes

MICROSOFT = "com.microsoft"
HIDDEN, FFN, QKV, LAYERS = 2560, 6912, 3840, 30
OP_SHAPES = ((6912, 2560), (2560, 6912), (2560, 2560))
OP_BYTES = 640 << 20
"""Weights of a single-operator stack: more than any cache keeps."""
BLOCK = 128


class Writer:
    """A model whose large weights go straight into its data file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data = path.with_suffix(".data").open("wb")
        self.rng = np.random.default_rng(0)

    def external(self, name: str, array: np.ndarray[Any, Any], dtype: int) -> str:
        """Append ``array`` to the data file under ``name``."""
        start = self._data.tell() + -self._data.tell() % 16384
        self._data.seek(start)
        array.tofile(self._data)
        tensor = TensorProto(name=name, data_type=dtype, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": self.path.with_suffix(".data").name, "offset": start}
        for key, value in {**entries, "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def small(self, name: str, array: Any) -> str:
        """An initializer inside the model."""
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Append a node of one output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def save(self, x: str, K: int, y: str) -> Path:
        """Write the model ``x [M, K] -> y``."""
        given = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["m", K])
        result = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "stack", [given], [result], self.initializers)
        opsets = [helper.make_opsetid(d, v) for d, v in (("", ONNX_OPSET), (MICROSOFT, 1))]
        opsets.append(helper.make_opsetid(DOMAIN, 1))
        made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        self._data.close()
        self.path.write_bytes(made.SerializeToString())
        return self.path


Linear = Callable[[Writer, str, str, int, int], str]
"""``(writer, input, name, N, K)``: append one matrix product, return its output."""


def bitcompile(tile: Layout) -> Linear:
    """BitLinear in a CPU layout."""

    def linear(w: Writer, x: str, name: str, N: int, K: int) -> str:
        valid = valid_bytes(tile.id)
        codes = valid[w.rng.integers(0, len(valid), tile.shape(N, K), np.uint8)]
        weight = w.external(f"{name}.w", codes, TensorProto.UINT8)
        scale = w.small(f"{name}.s", np.full((N, 1), 0.02, np.float32))
        none = w.small(f"{name}.none", np.float32(0))
        attributes = {"N": N, "K": K, "layout": tile.id}
        return w.node("BitLinear", [x, weight, scale, none, none], DOMAIN, **attributes)

    return linear


def matmul_nbits(bits: int) -> Linear:
    """ONNX Runtime's own low-bit product; level 4: int8 activations per block."""

    def linear(w: Writer, x: str, name: str, N: int, K: int) -> str:
        shape = (N, K // BLOCK, BLOCK * bits // 8)
        codes = w.external(f"{name}.w", w.rng.integers(0, 256, shape, np.uint8), TensorProto.UINT8)
        scale = np.full((N, K // BLOCK), 0.02, np.float32)
        scales = w.external(f"{name}.s", scale, TensorProto.FLOAT)
        attributes = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return w.node("MatMulNBits", [x, codes, scales], MICROSOFT, **attributes)

    return linear


def dynamic_int8(w: Writer, x: str, name: str, N: int, K: int) -> str:
    """DynamicQuantizeMatMul: four times our bytes."""
    codes = w.external(f"{name}.w", w.rng.integers(-1, 2, (K, N), np.int8), TensorProto.INT8)
    scale = w.small(f"{name}.s", np.float32(0.02))
    return w.node("DynamicQuantizeMatMul", [x, codes, scale], MICROSOFT)


ENGINES: dict[str, Linear] = {
    "bitcompile i2": bitcompile(CPU_TILE),
    "bitcompile t5": bitcompile(T5_TILE),
    "MatMulNBits bits=2": matmul_nbits(2),
    "MatMulNBits bits=4": matmul_nbits(4),
    "DynamicQuantizeMatMul int8": dynamic_int8,
}


def stack(path: Path, linear: Linear, layers: int) -> Path:
    """Every product of a decoder's layers, with what carries one to the next."""
    w = Writer(path)
    start, end, axis = (w.small(n, [v]) for n, v in (("start", 0), ("end", HIDDEN), ("axis", 1)))
    x = "x"
    for i in range(layers):
        x = linear(w, x, f"{i}.qkv", QKV, HIDDEN)
        x = w.node("Slice", [x, start, end, axis])
        x = linear(w, x, f"{i}.o", HIDDEN, HIDDEN)
        gate = linear(w, x, f"{i}.gate", FFN, HIDDEN)
        up = linear(w, x, f"{i}.up", FFN, HIDDEN)
        x = linear(w, w.node("Mul", [gate, up]), f"{i}.down", HIDDEN, FFN)
        x = w.node("Tanh", [x])  # keeps values finite over the layers
    return w.save("x", HIDDEN, x)


def single(path: Path, linear: Linear, N: int, K: int, count: int) -> Path:
    """``count`` products of one shape, all of the same input, with no glue that would be timed too.

    Only two of them are read: to be run with the optimizer off, which would leave the others out.
    """
    w = Writer(path)
    outputs = [linear(w, "x", str(i), N, K) for i in range(count)]
    return w.save("x", K, w.node("Add", [outputs[0], outputs[-1]]))


class Torch:
    """A stack of the same products in torch, with the interface of a session: ``run(None, {x})``.

    ``bfloat16`` linear layers, or float32 ones whose activations are quantised to int8 at run time
    (``quantize_dynamic``, a scale a tensor).
    """

    def __init__(self, kind: str, layers: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._bfloat16 = torch, kind == "bf16"
        shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
        torch.manual_seed(0)
        self._layers = [[self._linear(N, K) for N, K in shapes] for _ in range(layers)]

    def _linear(self, N: int, K: int) -> Any:
        torch = self._torch
        made = torch.nn.Linear(K, N, bias=False)
        if self._bfloat16:
            return made.to(torch.bfloat16)
        kinds = {torch.nn.Linear}
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(made), kinds, torch.qint8)

    def run(self, _: None, feeds: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The stack of :func:`stack`, once."""
        x = self._torch.from_numpy(feeds["x"])
        x = x.to(self._torch.bfloat16) if self._bfloat16 else x
        with self._torch.inference_mode():
            for qkv, o, gate, up, down in self._layers:
                x = o(qkv(x)[:, :HIDDEN])
                x = self._torch.tanh(down(gate(x) * up(x)))
        return [x.float().numpy()]


TORCH = ("bf16", "int8")


def session(path: Path, threads: int, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A session with our plugin; engines run one after the other, so threads must not spin on."""
    options = onnxruntime.SessionOptions()
    if not optimized:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(resolve("native").compile()[0]))
    return onnxruntime.InferenceSession(str(path), options)


def interleaved(
    sessions: dict[str, Any], M: int, K: int, repeat: int, calls: int
) -> dict[str, list[float]]:
    """Seconds of one call, per engine and repeat."""
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeat):
        for name, run in sessions.items():
            time.sleep(0.05)
            run.run(None, {"x": x})
            began = time.perf_counter()
            for _ in range(calls):
                run.run(None, {"x": x})
            seconds[name].append((time.perf_counter() - began) / calls)
    return seconds


def rows(seconds: dict[str, list[float]], unit: Callable[[float], float]) -> Iterator[str]:
    """One line an engine: median, spread, and how much faster ours is."""
    ours = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle = statistics.median(values)
        low, high = unit(max(values)), unit(min(values))
        figure = f"{unit(middle):10.1f} ({min(low, high):.1f} to {max(low, high):.1f})"
        yield f"  {name:28} {figure:32} {middle / ours:6.2f}x"


def measure_stacks(folder: Path, arguments: argparse.Namespace) -> None:
    """Decode and prefill of whole stacks, in tokens per second."""
    sessions = {}
    for name, linear in ENGINES.items():
        path = folder / f"{name.replace(' ', '-')}-{arguments.layers}.onnx"
        sessions[name] = session(
            path if path.exists() else stack(path, linear, arguments.layers), arguments.threads
        )
    for kind in TORCH if arguments.torch else ():
        sessions[f"torch {kind}"] = Torch(kind, arguments.layers, arguments.threads)
    for M in (1, arguments.prefill):
        print(f"{M} tokens at once, tokens/s, and time relative to the first row")
        seconds = interleaved(sessions, M, HIDDEN, arguments.repeat, 8 if M == 1 else 1)
        print("\n".join(rows(seconds, lambda s, M=M: M / s)))


def measure_ops(folder: Path, arguments: argparse.Namespace) -> None:
    """One operator at a time, weights read from memory."""
    engines = {k: v for k, v in ENGINES.items() if k != "DynamicQuantizeMatMul int8"}
    for N, K in OP_SHAPES:
        count = OP_BYTES // (N * K // 4)
        sessions = {}
        for name, linear in engines.items():
            path = folder / f"{name.replace(' ', '-')}-{N}x{K}.onnx"
            made = path if path.exists() else single(path, linear, N, K, count)
            sessions[name] = session(made, arguments.threads, optimized=False)
        print(f"{N}x{K}, one token, microseconds an operator")
        seconds = interleaved(sessions, 1, K, arguments.repeat, 1)
        per_op = {name: [s / count for s in values] for name, values in seconds.items()}
        print("\n".join(rows(per_op, lambda s: s * 1e6)))


def measure_command(text: str) -> None:
    """Run another engine's own benchmark and repeat its last line."""
    name, _, command = text.partition("=")
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    print(f"  {name:28} {done.stdout.strip().splitlines()[-1]}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the stacks, up to 5 GB")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ops", action="store_true", help="single operators instead of stacks")
    parser.add_argument("--torch", action="store_true", help="also torch, bf16 (4 GB) and int8")
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.ops:
        measure_ops(arguments.folder, arguments)
    else:
        measure_stacks(arguments.folder, arguments)
    for command in arguments.command:
        measure_command(command)


if __name__ == "__main__":
    main()
