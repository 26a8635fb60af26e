"""The plugin's kernels against the NumPy reference: integers exactly, floats bit for bit."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitcompile import numerics
from bitcompile.custom_ops import OPS
from bitcompile.packing import CPU_TILE, GROUP_SIZES, T5_TILE, Layout, PackedTernary, groups
from bitcompile.targets import machine, resolve, x86
from bitcompile.targets.tir.linking import CSRC, zig
from tests.single_node import NONE, accumulator_input, isa, model, plugin, session
from tests.tools import program

HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()
ISAS = ["avx512-vbmi", "avx512-vnni", "avx-vnni", "avx2", "portable"]
TILES = pytest.mark.parametrize("tile", [CPU_TILE, T5_TILE], ids=lambda tile: tile.id)
SWEEP = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def runnable(name: str) -> bool:
    """Whether this machine runs a variant: a session with it can be made."""
    try:
        session(model("BitLinear", *linear(np.zeros((1, 1), np.int8), 1.0)), variant=name)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        return False
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
        return False
    return True


def linear(
    weight: np.ndarray, scale: object, tile: Layout = CPU_TILE
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Attributes and constants of a BitLinear without bias and residual."""
    packed = PackedTernary.pack(weight, scale, tile)
    attributes = {"K": weight.shape[1], "N": weight.shape[0], "layout": tile.id}
    return attributes, {"w": packed.data, "w_scale": packed.scale, "bias": NONE, "residual": NONE}


def test_auto_layout_knows_the_cpus_of_the_variant_that_is_fast_with_t5() -> None:
    """The build reads Linux's names of features, the plugin the CPU itself."""
    assert x86.T5_NEEDS.issubset(machine.cpu_flags()) == runnable("avx512-vbmi")


def mappings(file: Path) -> list[tuple[int, bool]]:
    """Bytes of a file's mappings in this process, and whether they ask for huge pages."""
    found = []
    maps = Path("/proc/self/smaps").read_text()
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.M):
        if str(file) in text:
            begin, end = (int(word, 16) for word in text.split(" ", 1)[0].split("-"))
            found.append((end - begin, "hg" in text.split("VmFlags:")[1].split()))
    return found


def tells_mappings() -> bool:
    """Whether the kernel answers PROCMAP_QUERY (here: nothing lies at address 0)."""
    try:
        with open("/proc/self/maps") as maps:
            fcntl.ioctl(maps, 0xC0686611, (104).to_bytes(8, "little") + bytes(96))
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def test_mapped_weights_are_read_in_huge_pages(tmp_path: Path) -> None:
    """Linux marks their mapping "hg", where its kernel has huge pages at all.

    Since 6.11 it is one of the whole file, shared by nodes and sessions and gone with the last.
    """
    rng = np.random.default_rng(3)
    models = [
        model("BitLinear", *linear(rng.integers(-1, 2, (4096, 2048)).astype(np.int8), 1.0))
        for _ in range(2)
    ]
    rows = rng.standard_normal((1, 2048)).astype(np.float32)
    results = [session(made).run(None, {"x": rows})[0] for made in models]
    assert (results[0] != results[1]).any()
    path, file = tmp_path / "model.onnx", tmp_path / "weights.data"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(plugin()))

    def opened(made: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """With weights in a new file that takes the name of the one before."""
        onnx.save_model(made, path, save_as_external_data=True, location="new.data")
        (tmp_path / "new.data").replace(file)
        for tensor in (written := onnx.load(path, load_external_data=False)).graph.initializer:
            for entry in tensor.external_data:
                entry.value = file.name if entry.key == "location" else entry.value
        path.write_bytes(written.SerializeToString())
        return onnxruntime.InferenceSession(path, options)

    def huge() -> list[int]:
        return [size for size, asks in mappings(file) if asks]

    first = opened(models[0])
    whole = -(-file.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE
    second = onnxruntime.InferenceSession(path, options)
    assert bool(huge()) == HAS_HUGE_PAGES
    if HAS_HUGE_PAGES and tells_mappings():
        assert huge() == [whole]
    del first
    assert bool(huge()) == HAS_HUGE_PAGES  # the second reads there
    np.testing.assert_array_equal(second.run(None, {"x": rows})[0], results[0])
    other = opened(models[1])
    for kept, expected in ((second, results[0]), (other, results[1])):
        np.testing.assert_array_equal(kept.run(None, {"x": rows})[0], expected)
    del second, other, kept
    assert mappings(file) == []


def test_only_what_a_file_holds_is_read_in_its_huge_pages(tmp_path: Path) -> None:
    """``pages.c`` alone: clean mappings, one that was written to, and none."""
    zig(["cc", "-shared", "-fPIC", str(CSRC / "pages.c"), "-o", str(tmp_path / "pages.so")])
    pages = ctypes.CDLL(str(tmp_path / "pages.so"))
    pages.bc_huge_pages.restype = ctypes.c_void_p
    file = tmp_path / "weights.data"
    np.random.default_rng(5).integers(0, 256, 3 << 20).astype(np.uint8).tofile(file)
    kept = ctypes.c_void_p()

    def place(array: np.ndarray, first: int, count: int, keep: ctypes.c_void_p = kept) -> int:
        """Where ``count`` bytes from ``first`` on are to be read, from the array's own place on."""
        at = ctypes.c_void_p(array.ctypes.data + first)
        found = pages.bc_huge_pages(at, ctypes.c_size_t(count), ctypes.byref(keep))
        return int(found) - array.ctypes.data - first

    mapped = np.memmap(file, np.uint8, "c")
    moved = place(mapped, 70000, 2 << 20)
    assert bool(moved) == (HAS_HUGE_PAGES and tells_mappings())
    if not moved:
        return  # each tensor stays where it is
    assert place(mapped, 0, 4096) == moved
    twin = (ctypes.c_uint8 * mapped.size).from_address(mapped.ctypes.data + moved)
    np.testing.assert_array_equal(np.ctypeslib.as_array(twin), mapped)
    mapped[90000] ^= 1
    assert place(mapped, 70000, 2 << 20) == 0
    assert place(mapped, 1 << 20, 1 << 20) == moved
    assert place(np.zeros(3 << 20, np.uint8), 0, 3 << 20) == 0
    copy = tmp_path / "other.data"
    np.zeros(3 << 20, np.uint8).tofile(copy)
    assert place(np.memmap(copy, np.uint8, "r"), 0, 3 << 20) == 0  # a node keeps one file
    assert (mapped.size, True) in mappings(file)
    pages.bc_release_pages(kept)
    assert (mapped.size, True) not in mappings(file)


@pytest.fixture(scope="module", params=ISAS)
def variant(request: pytest.FixtureRequest) -> str:
    if not runnable(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def test_the_portable_variant_runs_everywhere() -> None:
    assert runnable("portable")


shapes = st.tuples(
    st.one_of(st.integers(1, 70), st.sampled_from([97, 127, 128, 129, 255, 640])),
    st.one_of(st.integers(1, 70), st.sampled_from([97, 255, 257, 511, 512, 513, 1021])),
    st.integers(1, 40),
)


@TILES
@SWEEP
@given(shape=shapes, threads=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_accumulators_equal_the_integer_reference(
    variant: str, tile: Layout, shape: tuple[int, int, int], threads: int, seed: int
) -> None:
    N, K, M = shape
    rng = np.random.default_rng(seed)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x, s = accumulator_input(rng, M, K)
    made = model("BitLinear", *linear(weight, s, tile))
    y = session(made, variant=variant, threads=threads).run(None, {"x": x})[0]
    q, _ = numerics.quantize_activations(x)
    np.testing.assert_array_equal(y, q.astype(np.int64) @ weight.T.astype(np.int64))


@settings(SWEEP, max_examples=40)
@given(
    shape=shapes,
    group_size=st.sampled_from(GROUP_SIZES),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_group_scaled_weights_are_bit_identical(
    variant: str, shape: tuple[int, int, int], group_size: int, threads: int, seed: int
) -> None:
    N, K, M = shape
    rng = np.random.default_rng(seed)
    scale = rng.random((N, groups(K, group_size))).astype(np.float32)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    packed = PackedTernary.pack(weight, scale, CPU_TILE, group_size)
    attributes = {"K": K, "N": N, "layout": CPU_TILE.id, "group_size": group_size, "eps": 1e-5}
    constants = {
        "gamma": rng.standard_normal(K).astype(np.float32),
        "w": packed.data,
        "w_scale": CPU_TILE.encode_scale(packed.scale, group_size),
        "bias": rng.standard_normal(N).astype(np.float32),
        "residual": rng.standard_normal((M, N)).astype(np.float32),
    }
    x = rng.standard_normal((M, K)).astype(np.float32)
    made = model("NormBitLinear", attributes, constants)
    y = session(made, variant=variant, threads=threads).run(None, {"x": x})[0]
    reference = OPS["NormBitLinear"].reference({**constants, "x": x}, attributes)
    np.testing.assert_array_equal(y, reference)


def test_each_group_is_an_exact_integer_sum(variant: str) -> None:
    """One scale of 1 among zeros leaves one group's accumulator."""
    N, K, M, size = 20, 300, 9, 64
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x, s = accumulator_input(rng, M, K)
    q, _ = numerics.quantize_activations(x)
    for j in range(5):
        scale = np.zeros((N, 5), np.float32)
        scale[:, j] = 1
        packed = PackedTernary.pack(weight, scale, CPU_TILE, size)
        attributes = {"K": K, "N": N, "layout": CPU_TILE.id, "group_size": size}
        stored = CPU_TILE.encode_scale(packed.scale, size)
        constants = {"w": packed.data, "w_scale": stored, "bias": NONE, "residual": NONE}
        y = session(model("BitLinear", attributes, constants), variant=variant).run(None, {"x": x})
        span = slice(j * size, (j + 1) * size)
        acc = q[:, span].astype(np.int64) @ weight[:, span].T.astype(np.int64)
        np.testing.assert_array_equal(y[0], acc.astype(np.float32) * (np.float32(1) / s))


@TILES
@pytest.mark.parametrize("M", [1, 5, 9])
def test_extreme_accumulators_do_not_overflow(variant: str, tile: Layout, M: int) -> None:
    """All weights and activations at their limit, over more columns than int16 sums could take."""
    N, K = 16, 20000
    weight = np.ones((N, K), np.int8)
    weight[1::2] = -1
    x = np.full((M, K), 3.0, np.float32)
    x[:, 1::2] = [[-3.0]] if M == 5 else [[3.0]]
    _, s = numerics.quantize_activations(x)
    made = model("BitLinear", *linear(weight, s[0, 0], tile))
    y = session(made, variant=variant).run(None, {"x": x})[0]
    expected = 0 if M == 5 else 127 * K
    np.testing.assert_array_equal(y, np.tile([expected, -expected], (M, N // 2)))


@TILES
@SWEEP
@given(shape=shapes, threads=st.integers(1, 4), seed=st.integers(0, 2**31), extras=st.booleans())
def test_norm_bit_linear_is_bit_identical(
    variant: str, tile: Layout, shape: tuple[int, int, int], threads: int, seed: int, extras: bool
) -> None:
    N, K, M = shape
    rng = np.random.default_rng(seed)
    attributes, constants = linear(
        rng.integers(-1, 2, (N, K)).astype(np.int8), rng.random(N).astype(np.float32), tile
    )
    attributes["eps"] = 1e-5
    constants["gamma"] = rng.standard_normal(K).astype(np.float32)
    if extras:
        constants["bias"] = rng.standard_normal(N).astype(np.float32)
        constants["residual"] = rng.standard_normal((M, N)).astype(np.float32)
    x = (rng.standard_normal((M, K)) * 5).astype(np.float32)
    made = model("NormBitLinear", attributes, constants)
    y = session(made, variant=variant, threads=threads).run(None, {"x": x})[0]
    reference = OPS["NormBitLinear"].reference({**constants, "x": x}, attributes)
    np.testing.assert_array_equal(y, reference)


@TILES
@settings(SWEEP, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 200), st.integers(1, 20)),
    activation=st.sampled_from(sorted(numerics.ACTIVATIONS)),
    sub_norm=st.integers(0, 1),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_bit_glu_is_bit_identical(
    variant: str, tile: Layout, shape: tuple[int, int, int], activation: str, sub_norm: int,
    threads: int, seed: int,
) -> None:  # fmt: skip
    K, F, M = shape
    rng = np.random.default_rng(seed)
    attributes, constants = glu(rng, K, F, activation, sub_norm, tile)
    x = rng.standard_normal((M, K)).astype(np.float32)
    inputs = {"x": x, "residual": x}
    y = session(model("BitGLU", attributes, constants), variant=variant, threads=threads).run(
        None, inputs
    )[0]
    reference = OPS["BitGLU"].reference({**constants, **inputs}, attributes)
    np.testing.assert_array_equal(y, reference)


def glu(
    rng: np.random.Generator,
    K: int,
    F: int,
    activation: str,
    sub_norm: int,
    tile: Layout = CPU_TILE,
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    gate_up = PackedTernary.pack(rng.integers(-1, 2, (2 * F, K)).astype(np.int8), 0.1, tile)
    down = PackedTernary.pack(rng.integers(-1, 2, (K, F)).astype(np.int8), 0.2, tile)
    attributes = {"K": K, "F": F, "F2": 2 * F, "N": K, "layout": tile.id, "eps": 1e-5}
    attributes |= {"activation": activation, "sub_norm": sub_norm}
    constants = {
        "gamma_in": rng.random(K).astype(np.float32),
        "w_gate_up": gate_up.data,
        "s_gate_up": gate_up.scale,
        "gamma_sub": rng.random(F).astype(np.float32) if sub_norm else NONE,
        "w_down": down.data,
        "s_down": down.scale,
    }
    return attributes, constants


@pytest.mark.parametrize(("rows", "F"), [(600, 24), (600, 32), (515, 32)])
def test_bit_glu_over_more_rows_than_one_pass(rows: int, F: int) -> None:
    """Up rows that begin inside a tile or with one; a last pass of many rows or of a few."""
    rng = np.random.default_rng(5)
    attributes, constants = glu(rng, 8, F, "relu2", 1)
    x = rng.standard_normal((2, rows, 8)).astype(np.float32)
    inputs = {"x": x, "residual": x}
    y = session(model("BitGLU", attributes, constants), threads=2).run(None, inputs)[0]
    reference = OPS["BitGLU"].reference({**constants, **inputs}, attributes)
    np.testing.assert_array_equal(y, reference)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("V", "K", "M"), [(1, 1, 1), (37, 128, 1), (50, 300, 3), (700, 512, 2), (41, 300, 8)]
)
def test_head_is_bit_identical(variant: str, bits: int, V: int, K: int, M: int) -> None:
    rng = np.random.default_rng(V)
    codes, scale = numerics.quantize_table(rng.standard_normal((V, K)).astype("f4"), bits, 128)
    made = model("HeadLinear", {"K": K, "N": V, "bits": bits}, {"table": codes, "scale": scale})
    x = rng.standard_normal((M, K)).astype(np.float32)
    y = session(made, variant=variant, threads=2).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, numerics.head_matmul(x, codes, scale, bits))


def test_rows_with_nan_or_inf_poison_only_themselves(variant: str) -> None:
    rng = np.random.default_rng(7)
    attributes, constants = linear(rng.integers(-1, 2, (33, 50)).astype(np.int8), 0.5)
    x = rng.standard_normal((12, 50)).astype(np.float32)
    clean = session(model("BitLinear", attributes, constants), variant=variant)
    expected = clean.run(None, {"x": x})[0]
    for row, column, value in ((1, 0, np.nan), (4, 49, np.inf), (9, 17, -np.inf)):
        x[row, column] = value
        expected[row] = np.nan
    np.testing.assert_array_equal(clean.run(None, {"x": x})[0], expected)
    normed = model(
        "NormBitLinear", {**attributes, "eps": 1e-5}, {**constants, "gamma": np.ones(50, "f4")}
    )
    y = session(normed, variant=variant).run(None, {"x": x})[0]
    assert np.isnan(y).all(axis=1).tolist() == np.isnan(expected).all(axis=1).tolist()
    assert np.isnan(y).any(axis=1).tolist() == np.isnan(expected).all(axis=1).tolist()


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (1, 1, 1, 1, 6)])
def test_any_rank_and_empty_batches(shape: tuple[int, ...]) -> None:
    attributes, constants = linear(np.ones((4, 6), np.int8), 1.0)
    x = np.ones(shape, np.float32)
    y = session(model("BitLinear", attributes, constants)).run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 4)
    np.testing.assert_allclose(y, 6.0, rtol=1e-6)


def test_weights_may_be_computed_by_the_graph() -> None:
    rng = np.random.default_rng(8)
    weight = rng.integers(-1, 2, (20, 30)).astype(np.int8)
    attributes, constants = linear(weight, 0.5)
    x = rng.standard_normal((3, 30)).astype(np.float32)
    fixed = session(model("BitLinear", attributes, constants)).run(None, {"x": x})[0]
    fed = {name: constants.pop(name) for name in ("w", "w_scale")}
    y = session(model("BitLinear", attributes, constants)).run(None, {"x": x, **fed})[0]
    np.testing.assert_array_equal(y, fixed)


def error_of(made: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> str:
    with pytest.raises(Exception, match=r"bitcompile|Unexpected input") as caught:
        session(made).run(None, inputs)
    return str(caught.value)


def test_bad_inputs_name_the_remedy() -> None:
    x = np.ones((2, 6), np.float32)
    attributes, constants = linear(np.ones((4, 6), np.int8), 1.0)

    def change(**changes: object) -> str:
        names = {"x": changes.pop("x", x)}
        changed = {**constants, **{k: v for k, v in changes.items() if k in constants}}
        others = {k: v for k, v in changes.items() if k not in constants}
        return error_of(model("BitLinear", {**attributes, **others}, changed), names)

    assert "last dimension of x is 5; the weights have K = 6" in change(x=np.ones((2, 5), "f4"))
    assert "expected [1, 1, 64]" in change(w=np.zeros((2, 1, 64), np.uint8))
    assert "w_scale has shape [4], expected [4, 1]" in change(w_scale=np.ones(4, np.float32))
    assert "bias has shape [3], expected [4]" in change(bias=np.zeros(3, np.float32))
    assert "bias is a scalar other than 0" in change(bias=np.float32(1))
    assert "residual has shape [4], expected [2, 4]" in change(residual=np.zeros(4, np.float32))
    assert "build the artifact for this target" in change(layout="i2")
    assert "act_bits = 8" in change(act_bits=4)
    assert "act_bits = 8" in change(act_bits=8.0)
    assert "group_size = 48; it must be 0, 16" in change(group_size=48)
    assert "w_scale has shape [4, 1], expected [1, 1, 16]" in change(group_size=16)
    assert "16 columns does not fit layout 't5_n16k20'" in change(layout=T5_TILE.id, group_size=16)
    assert "w has shape [1, 1, 64], expected [1, 2, 64]" in change(K=30, x=np.ones((2, 30), "f4"))
    assert "K must be 1.." in change(K=1 << 30)
    assert "1..8388608" in change(N=1 << 24)
    assert "Unexpected input data type" in change(x=np.ones((2, 6), np.float64))


def test_glu_and_head_refuse_what_they_cannot_do() -> None:
    rng = np.random.default_rng(0)
    attributes, constants = glu(rng, 8, 8, "silu", 0)
    x = np.ones((1, 8), np.float32)
    wrong = model("BitGLU", {**attributes, "activation": "tanh"}, constants)
    assert "activation 'tanh' is unknown" in error_of(wrong, {"x": x, "residual": x})
    for changes, message in (
        ({"F2": 17}, "F2 twice as much"),
        ({"sub_norm": 7}, "sub_norm is an int attribute"),
        ({"eps": 1}, "eps = -1; it is a float attribute"),
        ({"eps": -1.0}, "eps = -1"),
    ):
        wrong = model("BitGLU", {**attributes, **changes}, constants)
        assert message in error_of(wrong, {"x": x, "residual": x})
    codes, scale = numerics.quantize_table(np.ones((2, 128), np.float32), 8, 128)
    head = {"K": 128, "N": 2, "bits": 8}
    for changes in ({"bits": 3}, {"block": 1 << 61}, {"block": 129}, {"block": 32768}):
        wrong = model("HeadLinear", {**head, **changes}, {"table": codes, "scale": scale})
        assert "bits must be 8 or 4" in error_of(wrong, {"x": np.ones((1, 128), np.float32)})


def test_head_over_more_rows_than_one_pass() -> None:
    rng = np.random.default_rng(4)
    codes, scale = numerics.quantize_table(rng.standard_normal((5, 128)).astype("f4"), 8, 128)
    made = model("HeadLinear", {"K": 128, "N": 5, "bits": 8}, {"table": codes, "scale": scale})
    x = rng.standard_normal((2, 1030, 128)).astype(np.float32)
    y = session(made, threads=2).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, numerics.head_matmul(x, codes, scale, 8))


def test_unknown_isa_is_one_clear_error() -> None:
    with isa("sse9"):
        options = onnxruntime.SessionOptions()
        with pytest.raises(Exception, match=r"BITCOMPILE_ISA=sse9 .* choose one of: .*portable"):
            options.register_custom_ops_library(str(plugin()))


def test_one_session_serves_many_threads() -> None:
    rng = np.random.default_rng(9)
    attributes, constants = glu(rng, 64, 96, "relu2", 1)
    shared = session(model("BitGLU", attributes, constants), threads=2)
    inputs = [rng.standard_normal((1 + i * 3, 64)).astype(np.float32) for i in range(8)]
    expected = [shared.run(None, {"x": x, "residual": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            y = shared.run(None, {"x": inputs[i], "residual": inputs[i]})[0]
            if not np.array_equal(y, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_output_shapes_are_inferred() -> None:
    attributes, constants = linear(np.ones((4, 6), np.int8), 1.0)
    made = model("BitLinear", attributes, constants)
    made.graph.input[0].CopyFrom(
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "seq", 6])
    )
    assert session(made).get_outputs()[0].shape == ["batch", "seq", 4]


def test_the_library_exports_its_entry_point_only() -> None:
    nm = program("nm")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", str(plugin())], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in listing.stdout.splitlines()] == ["RegisterCustomOps"]


def test_the_kernel_table_names_every_variant() -> None:
    library, kernels = resolve("x86").compile()
    assert Path(library).name == "libbitcompile_ops.so"
    assert {k.isa for k in kernels} == set(ISAS)
    assert len({k.symbol for k in kernels}) == len(kernels)
