"""Whole models through onnxruntime-gpu: the tokens of an artifact, and the speed of a 2B-4T shape.

    python -m tests.gpu.artifact OUT --expected tokens.json       # greedy tokens of an artifact
    python -m tests.gpu.artifact OUT --shape 2b-4t [--context N]  # random weights, OUT's plugin

``tokens.json``: a list of ``{"prompt": ids, "tokens": ids, "gaps": logits}`` of the CPU artifact.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import itertools
import json
import site
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TIE = 0.2
"""Logits of float16 activations closer than this may swap ranks: where the CPU artifact's two best
are 0.17 apart, the float16 graph's own fallback on a CPU takes either of them, by the head."""
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, SIZE, VOCAB = 30, 2560, 6912, 20, 5, 128, 128256
QKV = (HEADS + 2 * KV_HEADS) * SIZE


def runtime() -> Any:
    """onnxruntime, with the CUDA libraries that PyTorch brought."""
    names = ("cudart", "cublas", "cudnn", "cufft", "curand", "nvrtc", "nvJitLink")
    for folder in site.getsitepackages():
        for path in sorted(glob.glob(f"{folder}/nvidia/**/lib/*.so*", recursive=True)):
            if any(name in path for name in names):
                try:
                    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
                except OSError:
                    continue  # some need others that come later, or a part that is not installed
    import onnxruntime

    return onnxruntime


def session(model: Path, library: Path, **options: str) -> Any:
    """A session on the CUDA provider; raises RuntimeError if it did not take it."""
    onnxruntime = runtime()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.register_custom_ops_library(str(library.absolute()))
    made = onnxruntime.InferenceSession(
        str(model), settings, providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    )
    if made.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"providers are {made.get_providers()}")
    return made


def greedy(made: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens by plain runs, the cache handed from run to run."""
    caches = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float16)
        for i in made.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    names = [o.name for o in made.get_outputs()]
    feed, tokens, past = prompt, [], 0
    for _ in range(count):
        mask = np.ones((1, past + len(feed)), np.int64)
        inputs = {"input_ids": np.array([feed], np.int64), "attention_mask": mask, **caches}
        results = dict(zip(names, made.run(None, inputs), strict=True))
        caches = {n: results[n.replace("past_key_values.", "present.")] for n in caches}
        past += len(feed)
        tokens.append(int(results["logits"][0, -1].astype(np.float32).argmax()))
        feed = tokens[-1:]
    return tokens


def compare_tokens(folder: Path, expected: Path) -> None:
    """Raises AssertionError where a token differs and the CPU's two best were no tie."""
    made = session(folder / "model.onnx", folder / "libbitcompile_ops.so")
    agreed = total = 0
    for case in json.loads(expected.read_text()):
        got = greedy(made, case["prompt"], len(case["tokens"]))
        differs = [a != b for a, b in zip(got, case["tokens"], strict=True)]
        first = differs.index(True) if any(differs) else len(got)
        agreed, total = agreed + first, total + len(got)
        if first < len(got):
            gap = case["gaps"][first]
            print(f"   token {first} differs; the CPU's two best logits are {gap:.4f} apart")
            assert gap < TIE, f"prompt {case['prompt'][:6]}: {got} instead of {case['tokens']}"
    print(f"greedy tokens as the CPU artifact's: {agreed} of {total} before a tie")


# --- the shape of 2B-4T ---------------------------------------------------------------------------


class Shape:
    """A float16 decoder with random weights in an external file, written where it runs."""

    def __init__(self, folder: Path, context: int, layers: int = LAYERS) -> None:
        self.folder, self.context = folder, context
        self.rng = np.random.default_rng(0)
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.data = (folder / "model.onnx.data").open("wb")
        self.offset = 0
        valid = [
            a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)
        ]
        self.codes = np.array(valid, np.uint8)
        self._write(layers)
        self.data.close()

    def const(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """A constant: small ones inside, others in the file."""
        if array.nbytes < 1024:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        start = -(-self.offset // 16384) * 16384
        self.data.write(b"\0" * (start - self.offset) + array.tobytes())
        self.offset = start + array.nbytes
        for key, value in (("location", "model.onnx.data"), ("offset", start),
                           ("length", array.nbytes)):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def weight(self, name: str, N: int, K: int) -> list[str]:
        """A ternary weight and its scale."""
        count = (-(-N // 16), -(-K // 128), 512)
        packed = self.codes[self.rng.integers(0, len(self.codes), count)]
        scale = np.full((N, 1), 0.02, np.float32)
        return [self.const(f"{name}.w", packed), self.const(f"{name}.s", scale)]

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "bitcompile",
             **attributes: Any) -> str:  # fmt: skip
        """A node; its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def _write(self, layers: int) -> None:
        layout = {"layout": "i2_n16k128", "act_bits": 8, "group_size": 0}
        wide = {"eps": 1e-5, **layout}
        half = np.float16
        none = self.const("none", np.zeros((), np.float32))
        none_half = self.const("none.float16", np.zeros((), half))
        table = self.const(
            "table", (self.rng.standard_normal((VOCAB, HIDDEN), np.float32) * 0.02).astype(half)
        )
        ones = {n: self.const(f"ones{n}", np.ones(n, np.float32)) for n in (HIDDEN, FFN)}
        ones_half = self.const("ones.float16", np.ones(HIDDEN, half))
        angle = np.arange(self.context)[:, None] / 500000 ** (np.arange(SIZE // 2) * 2 / SIZE)
        tables = [
            self.const(n, f(angle).astype(half)) for n, f in (("cos", np.cos), ("sin", np.sin))
        ]
        axis, one = (self.const(n, np.array([v], np.int64)) for n, v in (("axis", 1), ("one", 1)))
        total = self.node("ReduceSum", ["attention_mask", axis], ["sum"], "", keepdims=0)
        past = self.node("Sub", [total, one], ["past"], "")
        seqlens = self.node("Cast", [past], ["seqlens"], "", to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], ["length64"], "", start=1, end=2)
        length64 = self.node("Squeeze", [shape], ["length0"], "")
        length = self.node("Cast", [length64], ["length"], "", to=TensorProto.INT32)
        x = self.node("Gather", [table, "input_ids"], ["embed"], "", axis=0)
        cache: list[str] = []
        for i in range(layers):
            qkv = self.node(
                "NormBitLinear",
                [x, ones[HIDDEN], *self.weight(f"l{i}.qkv", QKV, HIDDEN), none, none_half],
                [f"l{i}.qkv"], K=HIDDEN, N=QKV, **wide,
            )  # fmt: skip
            names = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
            cache += names
            attended = self.node(
                "GroupQueryAttention",
                [qkv, "", "", *names, seqlens, length, *tables],
                [f"l{i}.attention", *(n.replace("past_key_values", "present") for n in names)],
                "com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
                rotary_interleaved=0, scale=float(SIZE**-0.5), local_window_size=-1, softcap=0.0,
            )  # fmt: skip
            after = self.node(
                "NormBitLinear",
                [attended, ones[HIDDEN], *self.weight(f"l{i}.o", HIDDEN, HIDDEN), none, x],
                [f"l{i}.o"], K=HIDDEN, N=HIDDEN, **wide,
            )  # fmt: skip
            x = self.node(
                "BitGLU",
                [after, ones[HIDDEN], *self.weight(f"l{i}.up", 2 * FFN, HIDDEN), ones[FFN],
                 *self.weight(f"l{i}.down", HIDDEN, FFN), after],
                [f"l{i}.ffn"], K=HIDDEN, N=HIDDEN, F=FFN, F2=2 * FFN, activation="relu2",
                sub_norm=1, **wide,
            )  # fmt: skip
        last = self.const("last", np.array([-1], np.int64))
        x = self.node("Gather", [x, last], ["final"], "", axis=1)
        x = self.node("SimplifiedLayerNormalization", [x, ones_half], ["norm"], "", epsilon=1e-5,
                      axis=-1)  # fmt: skip
        self.node("FusedMatMul", [x, table], ["logits"], "com.microsoft", transB=1)
        self._save(cache)

    def _save(self, cache: list[str]) -> None:
        info = helper.make_tensor_value_info
        half, kv = TensorProto.FLOAT16, [1, KV_HEADS, None, SIZE]
        inputs = [info("input_ids", TensorProto.INT64, [1, None]),
                  info("attention_mask", TensorProto.INT64, [1, None]),
                  *(info(name, half, kv) for name in cache)]  # fmt: skip
        outputs = [info("logits", half, [1, 1, VOCAB])]
        outputs += [info(n.replace("past_key_values", "present"), half, kv) for n in cache]
        graph = helper.make_graph(self.nodes, "shape", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid(d, v)
                  for d, v in (("", 21), ("bitcompile", 1), ("com.microsoft", 1))]  # fmt: skip
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        (self.folder / "model.onnx").write_bytes(model.SerializeToString())


class Decoder:
    """The session with one buffer a cache, bound as past and as present."""

    def __init__(self, folder: Path, library: Path, context: int, graph: bool) -> None:
        self.onnxruntime = runtime()
        self.context = context
        self.session = session(folder / "model.onnx", library, enable_cuda_graph=str(int(graph)))
        self.caches = {
            i.name: self._array(np.zeros((1, KV_HEADS, context, SIZE), np.float16))
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        self.bound: dict[int, tuple[Any, ...]] = {}

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)

    def binding(self, tokens: int, past: int) -> Any:
        """Inputs and outputs of a step of ``tokens`` behind ``past``."""
        if tokens not in self.bound:
            binding = self.session.io_binding()
            mask = np.zeros((1, self.context), np.int64)
            ids = self._array(np.ones((1, tokens), np.int64))
            held = self._array(mask)
            logits = self._array(np.zeros((1, 1, VOCAB), np.float16))
            binding.bind_ortvalue_input("input_ids", ids)
            binding.bind_ortvalue_input("attention_mask", held)
            binding.bind_ortvalue_output("logits", logits)
            for name, cache in self.caches.items():
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
            self.bound[tokens] = (binding, ids, held, logits)
        binding, _, held, _ = self.bound[tokens]
        mask = np.zeros((1, self.context), np.int64)
        mask[0, : past + tokens] = 1
        held.update_inplace(mask)
        return binding

    def step(self, tokens: int, past: int) -> None:
        """Run once; the device has finished when it returns."""
        self.session.run_with_iobinding(self.binding(tokens, past))

    def seconds(self, tokens: int, past: int, repeat: int) -> float:
        """Median seconds of one step at a place in the cache."""
        binding = self.binding(tokens, past)
        for _ in range(4):
            self.session.run_with_iobinding(binding)
        times = []
        for _ in range(repeat):
            begin = time.perf_counter()
            self.session.run_with_iobinding(binding)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def kernel_times(decoder: Decoder, past: int, steps: int = 10) -> None:
    """What each kernel takes of a decode step, by CUPTI. Those that start early wait meanwhile."""
    from torch.profiler import ProfilerActivity, profile

    decoder.step(1, past)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            decoder.step(1, past)
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:14]:
        time, launches = row.self_device_time_total / steps, row.count / steps
        print(f"   {row.key[:70]:70} {time:8.1f} us a token, {launches:.0f} launches")


def measure_shape(library: Path, folder: Path, context: int) -> None:
    """Decode with and without a CUDA graph, and prefill."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    Shape(folder, context)
    print(f"random 2B-4T shape written in {time.monotonic() - begin:.0f} s", flush=True)
    for graph in (False, True):
        try:
            decoder = Decoder(folder, library, context, graph)
            for past in (16, 512):
                t = decoder.seconds(1, past, 100)
                print(f"decode after {past} tokens, CUDA graph {graph}: {t * 1e3:.3f} ms, "
                      f"{1 / t:.0f} tokens/s", flush=True)  # fmt: skip
            if not graph:
                kernel_times(decoder, 16)
                for tokens in (512, 2048):
                    t = decoder.seconds(tokens, 0, 5)
                    print(f"prefill of {tokens}: {t * 1e3:.1f} ms, {tokens / t:.0f} tokens/s")
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            print(f"CUDA graph {graph}: {type(error).__name__}: {str(error)[:600]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--shape", choices=["2b-4t"])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bitcompile-shape"))
    chosen = parser.parse_args()
    if chosen.expected:
        compare_tokens(chosen.artifact, chosen.expected)
    if chosen.shape:
        measure_shape(chosen.artifact / "libbitcompile_ops.so", chosen.folder, chosen.context)
