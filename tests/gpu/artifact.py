"""Whole models through onnxruntime-gpu: the tokens of an artifact, and the speed of a 2B-4T shape.

    python -m tests.gpu.artifact OUT --expected tokens.json     # greedy tokens of an artifact
    python -m tests.gpu.artifact OUT --shape 2b-4t              # random weights, OUT's plugin

``tokens.json``: a list of ``{"prompt": ids, "tokens": ids, "gaps": logits}`` of the CPU artifact,
where a gap lies between the two best candidates. ``bitcompile verify`` and ``bench`` do the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 gives numpy its bfloat16
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitcompile import runtime
from bitcompile.artifact import MANIFEST, Artifact
from bitcompile.bench import bench
from bitcompile.cuda_decoder import CudaDecoder
from bitcompile.packing import CUDA_TILE, PackedTernary
from bitcompile.verification import empty_caches, step

TIES = {"float16": 0.2, "bfloat16": 1.6}
"""Logits closer than this may swap ranks: where the CPU artifact's two best are 0.17 apart, the
float16 graph's own fallback on a CPU takes either of them, by the head; bfloat16 has eight times
the rounding."""
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, SIZE, VOCAB = 30, 2560, 6912, 20, 5, 128, 128256
QKV = (HEADS + 2 * KV_HEADS) * SIZE


def greedy(made: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens by plain runs, the cache handed from run to run."""
    caches, feed, tokens = empty_caches(made), prompt, []
    for _ in range(count):
        logits = step(made, np.array([feed], np.int64), caches)
        tokens.append(int(logits[0, -1].argmax()))
        feed = tokens[-1:]
    return tokens


def compare_tokens(artifact: Artifact, expected: Path) -> None:
    """Raises AssertionError where a token differs and the CPU's two best were no tie."""
    made = runtime.load(artifact.path)
    agreed = total = 0
    for case in json.loads(expected.read_text()):
        got = greedy(made, case["prompt"], len(case["tokens"]))
        differs = [a != b for a, b in zip(got, case["tokens"], strict=True)]
        first = differs.index(True) if any(differs) else len(got)
        agreed, total = agreed + first, total + len(got)
        if first < len(got):
            gap = case["gaps"][first]
            print(f"   token {first} differs; the CPU's two best logits are {gap:.4f} apart")
            tie = TIES[artifact.activations]
            assert gap < tie, f"prompt {case['prompt'][:6]}: {got} instead of {case['tokens']}"
    print(f"greedy tokens as the CPU artifact's: {agreed} of {total} before a tie")


# --- the shape of 2B-4T ---------------------------------------------------------------------------


class Shape:
    """A decoder with random weights in an external file, written where it runs."""

    def __init__(self, folder: Path, context: int, activations: str, layers: int = LAYERS) -> None:
        self.folder, self.context, self.activations = folder, context, activations
        self.ternary = 0
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
        self.ternary += packed.nbytes + scale.nbytes
        return [self.const(f"{name}.w", packed), self.const(f"{name}.s", scale)]

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "bitcompile",
             **attributes: Any) -> str:  # fmt: skip
        """A node; its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def _write(self, layers: int) -> None:
        layout = {"layout": "i2_n16k128", "act_bits": 8, "group_size": 0}
        wide = {"eps": 1e-5, **layout}
        half = np.dtype(self.activations)
        none = self.const("none", np.zeros((), np.float32))
        none_half = self.const("none.narrow", np.zeros((), half))
        table = self.const(
            "table", (self.rng.standard_normal((VOCAB, HIDDEN), np.float32) * 0.02).astype(half)
        )
        ones = {n: self.const(f"ones{n}", np.ones(n, np.float32)) for n in (HIDDEN, FFN)}
        ones_half = self.const("ones.narrow", np.ones(HIDDEN, half))
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
        self.node("FusedMatMul", [x, table], ["narrow"], "com.microsoft", transB=1)
        self.node("Cast", ["narrow"], ["logits"], "", to=TensorProto.FLOAT)
        self._save(cache)

    def _save(self, cache: list[str]) -> None:
        info = helper.make_tensor_value_info
        half = helper.np_dtype_to_tensor_dtype(np.dtype(self.activations))
        kv = ["batch", KV_HEADS, None, SIZE]
        inputs = [info("input_ids", TensorProto.INT64, ["batch", None]),
                  info("attention_mask", TensorProto.INT64, ["batch", None]),
                  *(info(name, half, kv) for name in cache)]  # fmt: skip
        outputs = [info("logits", TensorProto.FLOAT, ["batch", 1, VOCAB])]
        outputs += [info(n.replace("past_key_values", "present"), half, kv) for n in cache]
        graph = helper.make_graph(self.nodes, "shape", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid(d, v)
                  for d, v in (("", 21), ("bitcompile", 1), ("com.microsoft", 1))]  # fmt: skip
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        (self.folder / "model.onnx").write_bytes(model.SerializeToString())


def shape_artifact(made: Artifact, folder: Path, context: int, activations: str) -> Artifact:
    """An artifact of the shape with the plugin of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    shape = Shape(folder, context, activations)
    shutil.copy(made.library, folder / made.library.name)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""}
             for path in folder.iterdir() if path.name != MANIFEST}  # fmt: skip
    language = {"vocab_size": VOCAB, "context_length": context, "hidden_size": HIDDEN,
                "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
                "head_size": SIZE}  # fmt: skip
    inspection = {**made.manifest["inspection"]}
    inspection["bytes"] = {**inspection["bytes"], "ternary": shape.ternary}
    options = {**made.manifest["options"], "head": "float", "activations": activations}
    manifest = {**made.manifest, "language": language, "inspection": inspection,
                "options": options, "files": files}  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    print(f"random 2B-4T shape, {activations}, in {time.monotonic() - begin:.0f} s", flush=True)
    return Artifact.open(folder)


def kernel_times(artifact: Artifact, past: int, steps: int = 10) -> None:
    """What each kernel takes of a decode step, by CUPTI. Those that start early wait meanwhile."""
    from torch.profiler import ProfilerActivity, profile

    decoder = CudaDecoder(runtime.load(artifact.path), artifact.manifest["language"], past + 1)
    run = decoder.step(1, past)
    for _ in range(4):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            run()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:14]:
        time, launches = row.self_device_time_total / steps, row.count / steps
        print(f"   {row.key[:70]:70} {time:8.1f} us a token, {launches:.0f} launches")


def measure_shape(artifact: Artifact) -> None:
    """Decode at two places of the cache and two batches, and two prompts."""
    for prefill, context, batch in ((512, 16, 1), (2048, 512, 1), (512, 16, 8)):
        report = bench(artifact, prefill, 64, context=context, batch=batch)
        for key in ("device", "activations", "cuda_graph", "context", "batch", "prefill_tokens",
                    "prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_range",
                    "read_roof_bytes_per_s", "decode_roof_share", "gpu_memory_bytes",
                    "load_s"):  # fmt: skip
            print(f"   {key} {report[key]}", end=";")
        print(flush=True)


def check_many_rows(artifact: Artifact) -> None:
    """More rows than one pass takes, and more than 2**31 results: some against themselves alone."""
    N, K, M = 32768, 128, 70000
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    packed = PackedTernary.pack(weight, 0.5, CUDA_TILE)
    tensors = [numpy_helper.from_array(a, n)
               for n, a in (("w", packed.data), ("s", packed.scale), ("bias", np.zeros((), "f4")),
                            ("none", np.zeros((), np.float16)))]  # fmt: skip
    node = helper.make_node("BitLinear", ["x", "w", "s", "bias", "none"], ["y"],
                            domain="bitcompile", K=K, N=N, layout=CUDA_TILE.id)  # fmt: skip
    info, half = helper.make_tensor_value_info, TensorProto.FLOAT16
    graph = helper.make_graph([node], "rows", [info("x", half, [None, K])],
                              [info("y", half, [None, N])], tensors)  # fmt: skip
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 21), ("bitcompile", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.session_options(artifact.path)
    options.log_severity_level = 3
    session = runtime.open_session(model.SerializeToString(), options, runtime.providers(artifact))
    x = rng.standard_normal((M, K)).astype(np.float16)
    (y,) = session.run(None, {"x": x})
    assert y.size > 1 << 31
    for begin in (0, 65500, M - 40):
        rows = slice(begin, begin + 40)
        np.testing.assert_array_equal(y[rows], session.run(None, {"x": x[rows]})[0])
    print(f"{M} rows of {N}: as those rows alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--shape", choices=["2b-4t"])
    parser.add_argument("--activations", choices=list(TIES), default="float16")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rows", action="store_true", help="a product of very many rows")
    parser.add_argument("--kernels", action="store_true", help="what each takes (needs torch)")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bitcompile-shape"))
    chosen = parser.parse_args()
    given = Artifact.open(chosen.artifact)
    if chosen.expected:
        compare_tokens(given, chosen.expected)
    if chosen.rows:
        check_many_rows(given)
    if chosen.shape:
        shaped = shape_artifact(given, chosen.folder, chosen.context, chosen.activations)
        measure_shape(shaped)
        if chosen.kernels:
            kernel_times(shaped, 16)
