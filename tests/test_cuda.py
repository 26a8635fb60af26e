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
from bitcompile import numerics
from bitcompile.artifact import Artifact
from bitcompile.errors import ToolchainError
from bitcompile.packing import CUDA_TILE, PackedTernary
from bitcompile.targets import TARGETS
from bitcompile.verification import empty_caches, step, verify
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
    """The reference rounds each; only Newton steps, of a quotient or a root, may use one."""
    cuda_compiler()
    from bitcompile.targets.tir.cuda.compiler import IMAGES, compile_image
    from bitcompile.targets.tir.cuda.kernels import KERNELS, kernel_source

    ptx = next(image for image in IMAGES if image.ptx)
    text = compile_image(kernel_source(ptx.arch), ptx).decode("ascii").rstrip("\0")
    kernels = re.split(r"\.visible \.entry ", text)[1:]
    fused = {re.match(r"\w+", k)[0] for k in kernels if "fma.rn.f32" in k}  # type: ignore[index]
    one_token = {kernel.name for kernel in KERNELS if kernel.name.startswith("bc_fused")}
    assert fused == {"bc_gemm", *one_token}
    approximate = {(k.split("(")[0], a) for k in kernels for a in re.findall(r"\w+\.approx", k)}
    assert approximate == {(name, "rsqrt.approx") for name in one_token}  # where the steps begin


def test_activations_between_operators_are_float16(artifact: Artifact) -> None:
    model = ir.load(artifact.model)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    narrow = {name for name, dtype in types.items() if dtype == ir.DataType.FLOAT16}
    assert narrow == {name for name in types if name not in ("input_ids", "attention_mask")}
    config = json.loads((artifact.path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


def test_without_a_driver_the_error_names_the_remedy(artifact: Artifact) -> None:
    if TARGETS["cuda"].can_run_here() is None:
        pytest.skip("this machine has a driver")
    with pytest.raises(ToolchainError, match=r"libcuda\.so\.1.*--target native"):
        bitcompile.load(artifact.path)


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
    with pytest.raises(ToolchainError, match="bitcompile verify --fallback"):
        verify(artifact)


def test_types_follow_the_activations(artifact: Artifact, tmp_path: Path) -> None:
    """A stand-in for the driver lets the plugin register: the graph's types must then fit, and
    only kernels be missing, as this onnxruntime has no CUDA provider."""
    library = tmp_path / "libcuda.so.1"
    zig = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC"]
    subprocess.run([*zig, "-o", library, FAKE], check=True)
    script = (
        "import onnxruntime, sys\n"
        "options = onnxruntime.SessionOptions(); options.log_severity_level = 4\n"
        "options.register_custom_ops_library(sys.argv[1])\n"
        "onnxruntime.InferenceSession(sys.argv[2], options)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact.library), str(artifact.model)],
        env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    assert "Failed to find kernel for bitcompile.NormBitLinear" in done.stderr, done.stderr
    assert "Type Error" not in done.stderr


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
