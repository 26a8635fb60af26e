"""The CUDA target without a GPU; ``tests/gpu`` is for a machine that has one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import bitcompile
from bitcompile import cuda_bench, cuda_decoder, numerics, runtime
from bitcompile.artifact import Artifact
from bitcompile.bench import bench
from bitcompile.decoder import Decoder
from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.generate import TextModel, _check_inputs
from bitcompile.packing import CUDA_TILE, PackedTernary
from bitcompile.targets import TARGETS
from bitcompile.targets.tir.linking import CSRC
from bitcompile.verification import empty_caches, step, variants, verify
from tests import artifacts
from tests.tools import cuda_compiler

MODEL = Path(__file__).parents[1] / "examples" / "docs-bitnet-25m"
FAKE = Path(__file__).with_name("fake_cuda.c")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model for CUDA: device code of every architecture is compiled for it."""
    cuda_compiler()
    folder = tmp_path_factory.mktemp("cuda")
    return bitcompile.build(MODEL, "cuda", out=folder / "artifact")


def fragments(words: np.ndarray) -> np.ndarray:
    """Codes ``[lane, word, register, byte]`` of a unit, as a lane masks and shifts them."""
    bytes_ = words.reshape(32, 4, 4)
    return np.stack([(bytes_ >> (2 * f)) & 3 for f in range(4)], axis=2)


@pytest.mark.parametrize(("N", "K"), [(16, 128), (17, 129), (50, 300), (129, 1000)])
def test_lanes_hold_the_operands_of_the_tensor_cores(N: int, K: int) -> None:
    """A product summed lane by lane, by the fragments of PTX's mma.m16n8k32 (A and B, 8 bit)."""
    rng = np.random.default_rng(N)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    packed = PackedTernary.pack(weight, 1.0, CUDA_TILE).data
    tiles, units = packed.shape[:2]
    q = np.zeros(units * 128, np.int64)
    q[:K] = rng.integers(-128, 128, K)
    acc = np.zeros(tiles * 16, np.int64)
    for tile in range(tiles):
        for unit in range(units):
            codes = fragments(packed[tile, unit]).astype(np.int64)
            for lane in range(32):
                row, column = lane // 4, lane % 4
                for word in range(4):
                    start = unit * 128 + word * 32 + column * 4
                    b = q[start : start + 4], q[start + 16 : start + 20]
                    for register in range(4):  # rows g, g + 8, then the same 16 columns on
                        at = tile * 16 + row + 8 * (register % 2)
                        acc[at] += codes[lane, word, register] @ b[register // 2]
    np.testing.assert_array_equal(acc[:N] - q.sum(), weight.astype(np.int64) @ q[:K])


def test_unshifted_operands_divide_without_rest() -> None:
    """What ``bc_mma_scaled`` and its reader do with one word: masks alone, then exact shifts."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (4, 4))  # [bit pair, byte]
    word = sum(int(codes[f, b]) << (8 * b + 2 * f) for f in range(4) for b in range(4))
    q = rng.integers(-128, 128, (2, 4))
    for f in range(4):
        masked = word & (0x03030303 << (2 * f))
        unsigned = np.array([(masked >> (8 * b)) & 255 for b in range(4)])
        scaled = int(unsigned @ q[f // 2])
        assert scaled % 4**f == 0
        assert scaled >> (2 * f) == codes[f] @ q[f // 2]


def test_the_layout_round_trips_and_pads_with_weight_zero() -> None:
    weight = np.random.default_rng(1).integers(-1, 2, (37, 200)).astype(np.int8)
    packed = PackedTernary.pack(weight, 1.0, CUDA_TILE)
    assert packed.data.shape == (3, 2, 512)
    np.testing.assert_array_equal(packed.ternary(), weight)
    whole = CUDA_TILE.decode(packed.data, 48, 256)
    assert (whole[37:] == 1).all()
    assert (whole[:, 200:] == 1).all()


def test_an_artifact_holds_code_for_every_architecture(artifact: Artifact) -> None:
    built = {kernel["isa"] for kernel in artifact.manifest["kernels"]}
    assert built == set(TARGETS["cuda"].isas)
    only_hopper = {k["isa"] for k in artifact.manifest["kernels"] if "wgmma" in k["name"]}
    assert only_hopper == {"sm_90a"}


def test_no_product_is_fused_into_a_sum() -> None:
    """The reference rounds each; only Newton steps may use one."""
    cuda_compiler()
    from bitcompile.targets.tir.cuda.compiler import IMAGES, compile_image
    from bitcompile.targets.tir.cuda.kernels import KERNELS, kernel_source

    ptx = next(image for image in IMAGES if image.ptx)
    text = compile_image(kernel_source(ptx.arch), ptx).decode("ascii").rstrip("\0")
    kernels = re.split(r"\.visible \.entry ", text)[1:]
    fused = {re.match(r"\w+", k)[0] for k in kernels if "fma.rn.f32" in k}  # type: ignore[index]
    one_token = {kernel.name for kernel in KERNELS if kernel.name.startswith("bc_fused")}
    quantise = {"bc_rows", "bc_any_rows", "bc_head_quantize8", "bc_head_quantize4", *one_token}
    assert fused == {"bc_gemm", *quantise}
    approximate = {(k.split("(")[0], a) for k in kernels for a in re.findall(r"\w+\.approx", k)}
    # Where the steps begin.
    roots = {(name, "rsqrt.approx") for name in one_token}
    assert approximate == roots | {(name, "rcp.approx") for name in quantise}


def test_activations_between_operators_are_float16(artifact: Artifact) -> None:
    model = ir.load(artifact.model)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    narrow = {name for name, dtype in types.items() if dtype == ir.DataType.FLOAT16}
    assert narrow == {name for name in types if name not in ("input_ids", "attention_mask")}
    config = json.loads((artifact.path / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    assert options == [{"cuda": {}}]
    assert "enable_cuda_graph" in (artifact.path / "README.md").read_text()


def test_activations_may_be_bfloat16(tmp_path: Path) -> None:
    cuda_compiler()
    made = bitcompile.build(MODEL, "cuda", out=tmp_path / "out", activations="bfloat16")
    assert made.activations == "bfloat16"
    assert "functions of 24 of 24 operators" in made.manifest["verification"]["summary"]
    kinds = {value.dtype for value in ir.load(made.model).graph.inputs}
    assert kinds == {ir.DataType.INT64, ir.DataType.BFLOAT16}
    with pytest.raises(ToolchainError, match=r"has no CUDAExecutionProvider.*onnxruntime-gpu"):
        bitcompile.load(made.path, plugin=False)  # the CPU has no attention in bfloat16
    np.savez(tmp_path / "in.npz", input_ids=np.zeros((1, 1), np.int64))
    declared = [type("", (), {"name": "x", "type": "tensor(bfloat16)", "shape": [1]})]
    with pytest.raises(InputError, match="--activations float16"):
        _check_inputs({"x": np.zeros(1)}, declared)


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (MODEL, "x86", "target x86 has no --activations: it is an option of cuda"),
        ("model.onnx", "cuda", "leave out --activations"),
    ],
)
def test_activations_are_chosen_for_checkpoints_on_cuda(
    model: str | Path, target: str, message: str, tmp_path: Path
) -> None:
    cuda_compiler()
    with pytest.raises(UsageError, match=message):
        bitcompile.build(model, target, out=tmp_path / "out", activations="bfloat16")


def test_without_a_driver_the_error_names_the_remedy(artifact: Artifact) -> None:
    if TARGETS["cuda"].can_run_here() is None:
        pytest.skip("this machine has a driver")
    with pytest.raises(ToolchainError, match=r"libcuda\.so\.1.*--target native"):
        bitcompile.load(artifact.path)
    for use in (verify, bench):
        with pytest.raises(ToolchainError, match="verify with --fallback"):
            use(artifact)


def test_without_the_plugin_it_runs_on_a_cpu(artifact: Artifact, tmp_path: Path) -> None:
    """The functions take and give float16; the first tokens are those of transformers."""
    session = bitcompile.load(artifact.path, plugin=False, threads=1)
    reference = json.loads((MODEL / "reference.json").read_text())
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text, expected = next(iter(reference["greedy"].items()))
    feed = [0, *tokenizer.encode(text, add_special_tokens=False).ids]
    caches, tokens = empty_caches(session), []
    for _ in range(8):
        logits = step(session, np.array([feed], np.int64), caches)
        tokens.append(int(logits[0, -1].argmax()))
        feed = tokens[-1:]
    assert tokens == expected[:8]


def test_its_functions_are_verified_and_its_plugin_is_not(artifact: Artifact) -> None:
    report = verify(artifact, plugin=False)
    assert all(node.exact for node in report.nodes)


def test_a_gpu_has_no_variants_and_no_operator_times(artifact: Artifact) -> None:
    for isa in ("sm_80", "all"):
        with pytest.raises(UsageError, match="leave out --isa"):
            variants(artifact) if isa == "all" else verify(artifact, isa=isa)
    with pytest.raises(UsageError, match="--ops times operators on CPUs"):
        bench(artifact, ops=True)


def test_text_on_a_gpu_needs_its_own_packages(artifact: Artifact) -> None:
    with pytest.raises(ToolchainError, match="onnxruntime-genai-cuda"):
        TextModel(artifact)


def test_a_report_of_a_gpu(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a measurement that took 10 ms for everything."""
    measured = {
        "seconds": {name: [0.01, 0.01] for name in ("read", "prefill", "decode")},
        "device": "a card", "cuda_graph": True, "load_s": 1.0, "gpu_memory_bytes": 5,
        "kv_cache_bytes": 7,
    }  # fmt: skip
    monkeypatch.setattr(cuda_bench, "measure", lambda *_: measured)
    report = bench(artifact, prefill=20, decode=10, context=0)
    language = artifact.manifest["language"]
    assert report["decode_tokens_per_s"] == 1000
    assert report["prefill_tokens_per_s"] == 2000
    head = 2 * language["vocab_size"] * language["hidden_size"]  # float16
    cache = 2 * 2 * language["num_layers"] * language["num_kv_heads"] * language["head_size"] * 5
    ternary = artifact.manifest["inspection"]["bytes"]["ternary"]
    assert report["bytes_per_token"] == ternary + head + cache
    roof = report["bytes_per_token"] * 1000 / (cuda_bench.ROOF_BYTES * 100)
    assert report["decode_roof_share"] == pytest.approx(roof)


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for the driver."""
    folder = tmp_path_factory.mktemp("driver")
    zig = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC"]
    subprocess.run([*zig, "-o", folder / "libcuda.so.1", FAKE], check=True)
    return folder


def test_an_old_gpu_does_not_run_it(fake_driver: Path, tmp_path: Path) -> None:
    """A build there verifies by the functions, as on a machine without a GPU."""
    zig = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-DCOMPUTE_CAPABILITY=7"]
    subprocess.run([*zig, "-o", tmp_path / "libcuda.so.1", FAKE], check=True)
    script = "from bitcompile.targets import TARGETS; print(TARGETS['cuda'].can_run_here())"
    assert "a stand-in is too old" in with_driver(tmp_path, script)
    assert "onnxruntime-gpu" in with_driver(fake_driver, script)


def with_driver(folder: Path, script: str, *arguments: object) -> str:
    """What a script says on a machine with that driver."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={"LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_types_follow_the_activations(artifact: Artifact, fake_driver: Path) -> None:
    """A stand-in for the driver lets the plugin register: the graph's types must then fit, and
    only kernels be missing, as this onnxruntime has no CUDA provider."""
    script = (
        "import onnxruntime, sys\n"
        "options = onnxruntime.SessionOptions(); options.log_severity_level = 4\n"
        "options.register_custom_ops_library(sys.argv[1])\n"
        "onnxruntime.InferenceSession(sys.argv[2], options)\n"
    )
    said = with_driver(fake_driver, script, artifact.library, artifact.model)
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    assert "Failed to find kernel for bitcompile.NormBitLinear" in said, said
    assert "Type Error" not in said


def test_with_a_driver_the_error_names_the_package(artifact: Artifact, fake_driver: Path) -> None:
    script = (
        "import sys; from bitcompile.artifact import Artifact; from bitcompile.errors import *\n"
        "from bitcompile.verification import verify; from bitcompile.runtime import load\n"
        "from bitcompile.bench import bench\n"
        "opened = Artifact.open(sys.argv[1])\n"
        "for use, what in ((load, opened.path), (verify, opened), (bench, opened)):\n"
        "    try: use(what)\n"
        "    except ToolchainError as error: print(error)\n"
    )
    said = with_driver(fake_driver, script, artifact.path).splitlines()
    refusals = [line for line in said if "has no CUDAExecutionProvider here" in line]
    assert len(refusals) == 3, said
    assert all("onnxruntime-gpu" in line for line in refusals)


def test_a_provider_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[NotImplemented] Failed to find kernel for bitcompile.BitGLU(1)")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    chosen = [("CUDAExecutionProvider", {}), "CPUExecutionProvider"]
    with pytest.raises(ToolchainError, match="CUDAExecutionProvider of onnxruntime does not start"):
        runtime.open_session(b"", None, chosen)
    with pytest.raises(runtime.OnnxruntimeError):
        runtime.open_session(b"", None, chosen[1:])


LAUNCHES = """
import ctypes, sys
from itertools import product
class Job(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("x", "gamma", "w", "s", "bias", "residual", "y")),
                *((n, ctypes.c_int32) for n in ("M", "N", "K", "type_x", "type_y", "gate_in",
                                                "gate_out", "group_size")), ("eps", ctypes.c_float),
                *((n, ctypes.c_int32) for n in ("early", "quantised", "step", "tile", "split"))]
library = ctypes.CDLL(sys.argv[1])
library.bc_cuda_gpu.restype = ctypes.c_void_p
assert not library.bc_cuda_open()
reason = ctypes.c_char_p()
gpu = ctypes.c_void_p(library.bc_cuda_gpu(ctypes.byref(reason)))
assert gpu, reason
def launch(M, N, K, group_size):
    job = Job(M=M, N=N, K=K, type_x=10, type_y=10, gate_in=-1, gate_out=-1, group_size=group_size)
    return library.bc_cuda_linear(gpu, None, ctypes.byref(job), ctypes.c_void_p(256))
for sizes in product((1, 3, 16, 17, 300, int(sys.argv[2])), (1, 4000, 1 << 23), (1, 100, 20000),
                     (0, 16, 32, 128, 256)):
    assert not launch(*sizes), sizes
assert launch(1 << 20, 16, 16, 16), "what passes of rows are for"
print("good")
"""


def test_every_launch_of_a_pass_fits_the_gpu(fake_driver: Path, tmp_path: Path) -> None:
    """Grids, blocks and shared memory, of products of any size."""
    from bitcompile.targets.tir.cuda.kernels import KERNELS, header

    names = ", ".join(f'"{kernel.name}"' for kernel in KERNELS)
    (tmp_path / "cuda_kernels.h").write_text(header())
    (tmp_path / "table.c").write_text(
        '#include "cuda_launch.h"\n'
        'const bc_image bc_images[] = {{"sm_80", 8, 0, 0, ""}};\nconst int bc_image_count = 1;\n'
        f"const char *const bc_kernel_names[] = {{{names}}};\n"
        f"const int bc_kernel_count = {len(KERNELS)};\n"
    )
    zig = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", f"-I{CSRC}", f"-I{tmp_path}"]
    library = tmp_path / "launch.so"
    subprocess.run(
        [*zig, "-o", library, tmp_path / "table.c", CSRC / "cuda_launch.c", "-ldl"], check=True
    )
    rows = re.search(r"LINEAR_ROWS = 1 << (\d+)", (CSRC / "cuda.c").read_text())
    assert rows is not None
    said = with_driver(fake_driver, LAUNCHES, library, 1 << int(rows[1]))
    assert said.strip() == "good", said


def test_sums_that_begin_with_a_power_of_two_lose_nothing() -> None:
    """How ``bc_grouped_many`` makes a float32 of the difference of two integers."""
    begin = np.int32(0x4B400000)
    rng = np.random.default_rng(0)
    codes, ones = (rng.integers(-(1 << 17), 1 << 17, 4096, np.int32) for _ in range(2))
    difference = (begin + codes).view(np.float32) - (begin + ones).view(np.float32)
    np.testing.assert_array_equal(difference, (codes - ones).astype(np.float32))


def test_group_scaled_weights_are_packed_for_it() -> None:
    """A scale a group keeps its shape in tiles, which is what ``bc_grouped`` reads."""
    scale = np.arange(18 * 5, dtype=np.float32).reshape(18, 5) + 1
    stored = CUDA_TILE.encode_scale(scale, 32)
    assert stored.shape == CUDA_TILE.scale_shape(18, 160, 32) == (2, 5, 16)
    assert stored[1, 3, 1] == scale[17, 3]
    assert TARGETS["cuda"].grouped


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_lane_gathers_what_the_reference_does(bits: int) -> None:
    """``bc_head`` on the CPU, with codes as ``bc_codes`` makes them."""
    rng = np.random.default_rng(bits)
    K, block, parts = 300, 128, 8 // bits
    B, per_block = 3, 128 * bits // 512
    codes = rng.integers(0, 256, (5, B, block * bits // 8)).astype(np.uint8)
    scale = rng.random((5, B, 1)).astype(np.float32)
    x = rng.standard_normal((1, K)).astype(np.float32)
    q, s = numerics.quantize_head_activations(x)
    q = np.pad(q[0], (0, B * block - K)).reshape(-1, 64, parts)  # [chunk, byte, part]
    table = codes.reshape(5, -1, 64).astype(np.int64)
    fields = [(table ^ 128) - 256 * ((table ^ 128) > 127)]
    if bits == 4:
        nibbles = (((table << 4) & 0xF0) ^ 128, (table & 0xF0) ^ 128)
        fields = [field - 256 * (field > 127) for field in nibbles]
    sums = np.zeros((5, 16), np.float32)
    for b in range(B):
        acc = np.zeros((5, 16), np.int64)
        for chunk in range(b * per_block, (b + 1) * per_block):
            for part, field in enumerate(fields):
                products = field[:, chunk] * q[chunk, :, part]
                acc += products.reshape(5, 16, 4).sum(axis=2)
        acc >>= 4 if bits == 4 else 0
        sums = sums + scale[:, b] * acc.astype(np.float32)
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    y = sums[:, 0] * (np.float32(1) / s[0])
    np.testing.assert_array_equal(y, numerics.head_matmul(x, codes, scale, bits)[0])


def test_a_quantised_head_can_be_chosen(tmp_path: Path) -> None:
    cuda_compiler()
    made = bitcompile.build(MODEL, "cuda", out=tmp_path / "out", head="q4")
    model = ir.load(made.model)
    (head,) = [node for node in model.graph if node.op_type == "HeadLinear"]
    assert head.inputs[0].dtype == ir.DataType.FLOAT16
    verify(made, plugin=False)  # raises where a function is wrong


def test_the_compiler_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitcompile.targets.tir.cuda import compiler

    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler, "_nvrtc_path", lambda: None)
    assert TARGETS["cuda"].can_build_here() == compiler.MISSING
    assert "bitcompile[cuda]" in compiler.MISSING


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is meant for a GPU stays in the CPU's memory, on its provider."""
    monkeypatch.setattr(cuda_decoder, "DEVICE", ("cpu", 0))
    monkeypatch.setattr(cuda_bench, "DEVICE", ("cpu", 0))
    monkeypatch.setattr(runtime, "providers", lambda *_, **__: ["CPUExecutionProvider"])
    monkeypatch.setattr(cuda_bench, "ROOF_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifacts.write(tmp_path_factory.mktemp("tiny") / "out")


@pytest.mark.usefixtures("on_cpu")
def test_the_decoder_of_a_gpu_computes_what_the_other_does(tiny: Artifact) -> None:
    """A prompt and a step behind it, whose mask is as long as the cache where a graph wants it."""
    language = tiny.manifest["language"]
    session = bitcompile.load(tiny.path, threads=1)
    usual = Decoder(session, language, 16)
    usual.feed(np.ones(5, np.int64))
    expected = usual.feed(np.ones(1, np.int64))
    for graph in (False, True):
        decoder = cuda_decoder.CudaDecoder(session, language, 16)
        decoder.step(5, 0)()
        run = decoder.step(1, 5, graph)
        run()
        assert int(run.logits.numpy()[0, -1].argmax()) == expected


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("graphs", [True, False])
def test_what_a_gpu_is_measured_by(
    tiny: Artifact, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole measurement on the CPU; without graphs if onnxruntime refuses them."""

    class Card:
        name = "a card"

        def used_bytes(self) -> int:
            return 0

    def providers(*_: object, enable_cuda_graph: str = "0", **__: object) -> list[str]:
        if enable_cuda_graph == "1" and not graphs:
            raise RuntimeError("a node runs on the CPU")
        return ["CPUExecutionProvider"]

    monkeypatch.setattr(cuda_bench, "Card", Card)
    monkeypatch.setattr(runtime, "providers", providers)
    sizes = {"prefill": 4, "decode": 4, "context": 2, "batch": 2}
    too_long = {**sizes, "prefill": 500}  # longer than the rotary tables
    with pytest.raises(ToolchainError, match="ask for fewer tokens or sequences"):
        cuda_bench.measure(tiny, too_long, 1, 1, lambda _: None)
    measured = cuda_bench.measure(tiny, sizes, 2, 1, lambda _: None)
    assert measured["cuda_graph"] is graphs
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {
        "read": 2, "prefill": 2, "decode": 2,
    }  # fmt: skip
