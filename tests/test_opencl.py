"""The OpenCL plugins on PoCL: exact results, and what happens where a device has faults.

PoCL is a CPU driver: it proves the kernels and the host, and nothing about speed on a GPU.
"""

from __future__ import annotations

import ctypes.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitcompile import numerics
from bitcompile.errors import UsageError
from bitcompile.targets import TARGETS, resolve
from bitcompile.targets.adreno import SCHEDULES as ADRENO
from bitcompile.targets.mali import SCHEDULES as MALI
from bitcompile.targets.opencl import SCHEDULES as GENERIC
from bitcompile.targets.tir.linking import CSRC, zig
from tests import opencl_case, tools
from tests.opencl_case import differences, glu, head, inputs, linear, open_session, run

HOST = "x86_64-linux"
GPUS = [name for name, target in TARGETS.items() if target.device == "opencl"]
SCHEDULES = {"opencl": GENERIC, "mali": MALI, "adreno": ADRENO}
HERE = Path(__file__).parent
PRELUDE = HERE.parent / "targets" / "tir" / "opencl"
POCL_HEADERS = Path("/usr/share/pocl/include")
OCLGRIND = Path("/usr/lib/oclgrind/liboclgrind-rt-icd.so")


def driver() -> str:
    name = ctypes.util.find_library("OpenCL")
    tools.require("an OpenCL driver (pocl-opencl-icd, ocl-icd-libopencl1)", name is not None)
    return str(name)


@pytest.fixture(scope="module", params=GPUS)
def gpu_plugin(request: pytest.FixtureRequest) -> Path:
    """One target's plugin without CPU kernels: nothing can take over unseen."""
    driver()
    return resolve(request.param, HOST, {"fallback": "none"}).compile()[0]


@pytest.fixture(scope="module")
def alone() -> Path:
    driver()
    return resolve("opencl", HOST, {"fallback": "none"}).compile()[0]


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The plugin of `--target opencl`, which has CPU kernels."""
    driver()
    return resolve("opencl").compile()[0]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Variables that put ``fake_opencl.c`` in the driver's place; the cache is empty."""
    folder = tmp_path_factory.mktemp("faulty")
    real = next(Path("/usr/lib").rglob(driver()))
    flags = [
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        f"-I{CSRC}",
        "-o",
        str(folder / "libOpenCL.so"),
    ]
    zig(["cc", *flags, str(HERE / "fake_opencl.c"), str(real)])
    cache = folder / "cache"
    return {"LD_LIBRARY_PATH": str(folder), "BITCOMPILE_CACHE": str(cache)}


# --- exact results ------------------------------------------------------------------------------


def _cases(rng: np.random.Generator) -> Iterator[tuple[opencl_case.Case, int]]:
    """Every operator, shapes with tails, decode (1, 2) and prefill (3 and more)."""
    for M, N, K in [
        (1, 1, 1),
        (2, 33, 50),
        (1, 300, 1040),
        (3, 17, 16),
        (9, 70, 130),
        (37, 50, 77),
    ]:
        yield linear(rng, N, K, norm=False), M
        yield linear(rng, N, K, norm=True), M
    for M, group_size in [(1, 16), (4, 64), (18, 256)]:
        yield linear(rng, 45, 333, norm=True, group_size=group_size), M
        yield glu(rng, 40, 90, "relu2", 1, group_size), M
    for M, sub_norm in [(1, 0), (2, 1), (21, 1)]:
        yield glu(rng, 50, 70, "relu2", sub_norm), M
    for activation in numerics.ACTIVATIONS:
        yield glu(rng, 30, 65, activation, 1), 5
    for bits in (8, 4):
        yield head(rng, 37, 300, bits), 3


def test_every_operator_is_bit_identical(gpu_plugin: Path) -> None:
    rng = np.random.default_rng(7)
    for case, M in _cases(rng):
        session = open_session(case, str(gpu_plugin))
        wrong = differences(session, case, inputs(rng, case, M))
        assert wrong == 0, (case[0], case[1], M)


def test_random_shapes_give_exact_accumulators(gpu_plugin: Path) -> None:
    rng = np.random.default_rng(3)
    for _ in range(25):
        M, N, K = (int(v) for v in rng.integers(1, [24, 200, 500]))
        case = linear(rng, N, K, norm=bool(rng.integers(2)))
        session = open_session(case, str(gpu_plugin))
        assert differences(session, case, inputs(rng, case, M)) == 0, (M, N, K)


def test_more_rows_than_one_pass_and_any_rank(alone: Path) -> None:
    rng = np.random.default_rng(1)
    case = glu(rng, 20, 33, "relu2", 1)
    session = open_session(case, str(alone))
    x = rng.standard_normal((2, 1100, 20)).astype(np.float32)
    for residual in (x, rng.standard_normal(x.shape).astype(np.float32)):
        assert differences(session, case, {"x": x, "residual": residual}) == 0
    empty = np.zeros((0, 20), np.float32)
    assert session.run(None, {"x": empty, "residual": empty})[0].shape == (0, 20)


def test_weights_that_the_graph_computes(alone: Path) -> None:
    rng = np.random.default_rng(2)
    op, attributes, constants = linear(rng, 20, 30, norm=False)
    session = open_session((op, attributes, {}), str(alone))
    case = (op, attributes, constants)
    assert differences(session, case, {**constants, **inputs(rng, case, 4)}) == 0


def test_two_sessions_with_constants_at_the_same_address(alone: Path) -> None:
    """What a closed session held is gone: another one's weights may lie where its were."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        case = linear(rng, 64, 256, norm=True)
        session = open_session(case, str(alone))
        assert differences(session, case, inputs(rng, case, 3)) == 0
        del session


@pytest.mark.parametrize("rough", [0, 3])
def test_division_and_root_are_rounded_to_nearest(rough: int, tmp_path: Path) -> None:
    """Every significand of a reciprocal and a root, and millions of quotients near half-way,
    also where the device's own division is off by three units in the last place.
    """
    program = tmp_path / "arithmetic"
    flags = ["-O2", "-ffp-contract=off", "-march=native", "-Wno-unknown-pragmas", "-Wno-everything"]
    source = [str(HERE / "opencl_arithmetic.c"), f"-I{PRELUDE}", f"-DROUGH={rough}"]
    zig(["cc", *flags, *source, "-lm", "-o", str(program)])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# --- the whole model ----------------------------------------------------------------------------


def test_the_model_generates_the_tokens_of_the_cpu(plugin: Path, tmp_path: Path) -> None:
    import bitcompile
    from tests.single_node import isa
    from tests.test_docs_model import MODEL, greedy, prompt_tokens

    del plugin  # compiled once, for the build
    made = bitcompile.build(MODEL, "opencl", out=tmp_path / "artifact")
    assert made.manifest["verification"]["summary"].startswith("25 of 25 operators bit-exact")
    assert made.manifest["target"]["isas"][0] == "opencl"
    prompt = prompt_tokens("The following example creates a table")
    tokens = {}
    for variant in (None, "opencl", "portable"):
        with isa(variant):
            tokens[variant] = greedy(made, prompt, 12)[0]
    assert tokens[None] == tokens["opencl"] == tokens["portable"]


# --- the host -----------------------------------------------------------------------------------


def test_the_second_start_takes_the_binary_from_the_cache(alone: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    places = {"BITCOMPILE_CACHE": str(cache), "POCL_CACHE_DIR": str(tmp_path / "pocl")}
    (tmp_path / "pocl").mkdir()
    first, _ = run(alone, **places)
    second, _ = run(alone, **places)
    assert (first["exact"], second["exact"]) == (True, True)
    assert second["open_s"] * 20 < first["open_s"]

    (binary,) = cache.iterdir()
    whole = binary.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", whole[:-100] + bytes(100), whole + b"x"]
    for bad in damaged:
        binary.write_bytes(bad)
        again, _ = run(alone, **places)
        assert again["exact"]
        assert binary.read_bytes() != bad


def test_a_driver_with_copies_and_a_cache_that_cannot_be_written(
    alone: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    report, noise = run(alone, **faulty, FAKE_OPENCL="copies")
    assert (report["exact"], noise) == (True, "")
    nowhere = {**faulty, "BITCOMPILE_CACHE": "/dev/null", "HOME": "/dev/null"}
    nowhere |= {"POCL_CACHE_DIR": str(tmp_path)}  # PoCL itself needs one
    beside = tmp_path / "plugin"  # the last place is the plugin's own, which other tests share
    beside.mkdir()
    report, noise = run(Path(shutil.copy(alone, beside)), **nowhere, XDG_CACHE_HOME="/dev/null")
    assert [path.suffix for path in beside.iterdir() if path.name.startswith("opencl-")] == [".bin"]
    assert (report["exact"], noise) == (True, "")


FAULTS = {
    "small groups": r"work-groups of 16 items .* use another device",
    "bad source": r"cannot build the kernels: .*error",
    "no fma": r"divides or takes roots wrongly: update the GPU's driver",
    "no room": r"cannot hold \d+ bytes of activations, out of memory \(-4\): use shorter",
    "no weights": r"cannot hold a weight of \d+ bytes, out of memory \(-4\)",
    "lost": r"cannot run bc_\w+, out of resources \(-5\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_clear_error_or_goes_to_the_cpu(
    fault: str, alone: Path, plugin: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    places = {**faulty, "BITCOMPILE_CACHE": str(tmp_path), "FAKE_OPENCL": fault}
    report, _ = run(alone, **places)
    assert report["error"] is not None
    assert _matches(FAULTS[fault], report["error"])
    report, noise = run(plugin, **places, BITCOMPILE_OFFLOAD="all")
    assert report["exact"], report
    assert _matches(FAULTS[fault] + ".*; the CPU kernels take over", noise)
    assert noise.count("take over") == 1  # said once


def _matches(pattern: str, text: str) -> bool:
    found = re.search(pattern, text, re.DOTALL) is not None
    assert found, text
    return found


def test_a_wrong_dot_product_is_not_used(
    alone: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    """The driver says that it has one, which builds and computes something else."""
    places = {**faulty, "BITCOMPILE_CACHE": str(tmp_path), "FAKE_OPENCL": "wrong dot"}
    report, _ = run(alone, **places)
    assert report["exact"], report


@pytest.mark.parametrize("which", ["no library", "no device"])
def test_without_a_driver(which: str, alone: Path, plugin: Path, tmp_path: Path) -> None:
    if which == "no library":
        for name in ("libOpenCL.so", "libOpenCL.so.1", "libmali.so.1"):
            (tmp_path / name).write_text("not a library")
        places = {"LD_LIBRARY_PATH": str(tmp_path)}
        message = r"no OpenCL driver \(libOpenCL.so\): install the GPU's driver"
    else:
        places = {"OCL_ICD_VENDORS": str(tmp_path)}
        message = "no OpenCL device: install the GPU's driver"
    report, _ = run(alone, **places)
    assert _matches(message, str(report["error"]))
    report, noise = run(plugin, **places)
    assert report["exact"], report
    assert _matches(message + "; the CPU kernels take over\n$", noise)
    report, _ = run(plugin, **places, BITCOMPILE_ISA="opencl")  # asked for by name
    assert _matches(message, str(report["error"]))


def test_what_goes_to_the_device_is_chosen(plugin: Path, tmp_path: Path) -> None:
    """A device that fails tells who was asked: decode rows are left to the CPU by default."""
    copy = tmp_path / plugin.name
    shutil.copyfile(plugin, copy)
    report, _ = run(copy, BITCOMPILE_OFFLOAD="some")
    assert _matches("BITCOMPILE_OFFLOAD=some; choose one of: auto, none", str(report["error"]))
    for choice in ("all", "prefill", "none"):
        copy.with_name(copy.name + ".offload").write_text(f"{choice}\n")
        report, noise = run(copy)
        assert (report["exact"], noise) == (True, "")


def test_choices_of_a_target_are_checked() -> None:
    assert resolve("mali").host.startswith("aarch64-linux-android")
    assert resolve("mali", HOST).isas[0] == "mali"
    with pytest.raises(UsageError, match="target x86 has no --offload: it is an option of opencl"):
        resolve("x86", None, {"offload": "all"})
    with pytest.raises(UsageError, match="must be one of auto, prefill, all, none, not some"):
        resolve("mali", None, {"offload": "some"})
    with pytest.raises(UsageError, match=r"builds for host .* not x86_64-lin: "):
        resolve("mali", "x86_64-lin")


# --- other compilers ----------------------------------------------------------------------------

EXTENSIONS = {
    0: ("CL1.2", "", 0),
    1: ("CL3.0", "", 100),
    2: ("CL1.2", "cl_arm_integer_dot_product_accumulate_int8", 100),
    3: ("CL1.2", "cl_qcom_dot_product8", 100),
    4: ("CL1.2", "cl_arm_integer_dot_product_int8", 100),
}
"""BC_DOT to language version, extension macro and the least number of built-in calls."""


@pytest.mark.parametrize("gpu", GPUS)
def test_every_dot_product_compiles_for_spir(gpu: str, tmp_path: Path) -> None:
    from bitcompile.targets.tir.opencl import plugin as opencl_plugin

    tools.require("OpenCL C headers (pocl-opencl-icd)", POCL_HEADERS.is_dir())
    source = tmp_path / "kernels.cl"
    source.write_text(opencl_plugin.sources(SCHEDULES[gpu])[0])
    stub = tmp_path / "qcom.h"  # clang does not know Qualcomm's
    stub.write_text("int qcom_dot8_acc(uint a, uint b, int c);\n")
    for dot, (version, macro, calls) in EXTENSIONS.items():
        out = tmp_path / f"{dot}.ll"
        target = ["-x", "cl", "-target", "spir64-unknown-unknown", f"-cl-std={version}"]
        flags = ["-isystem", str(POCL_HEADERS), "-Xclang", "-finclude-default-header", "-Wall"]
        flags += ["-Werror", "-Wno-unused-function", "-Wno-ignored-pragmas", "-include", str(stub)]
        flags += [f"-DBC_DOT={dot}", *([f"-D{macro}"] if macro else []), "-Xclang", "-emit-llvm"]
        zig(["clang", *target, *flags, "-S", str(source), "-o", str(out)])
        lines = out.read_text().splitlines()
        used = [x for x in lines if " call " in x and ("dot" in x.split("@")[1])]
        builtin = [x for x in used if "bc_dot4" not in x]
        assert len(builtin) >= calls


def oclgrind(plugin: Path, folder: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """The report of a run under Oclgrind, and Oclgrind's own."""
    tools.require("Oclgrind (oclgrind)", OCLGRIND.exists())
    (folder / "grind.icd").write_text(str(OCLGRIND))
    log = folder / "log"
    places = {"OCL_ICD_VENDORS": f"{folder}/", "BITCOMPILE_CACHE": str(folder / "cache")}
    checks = ("DATA_RACES", "UNINITIALIZED", "CHECK_API")
    grind = {f"OCLGRIND_{check}": "1" for check in checks} | {"OCLGRIND_LOG": str(log)}
    # It lacks intrinsics that optimisers write.
    grind["OCLGRIND_BUILD_OPTIONS"] = "-cl-opt-disable"
    report, noise = run(plugin, **{**places, **grind, **environment})
    return report, noise + (log.read_text() if log.exists() else "")


def test_oclgrind_finds_no_race_and_no_stray_access(
    gpu_plugin: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    """With copies of weights, since it takes host memory for unwritten; see fake_opencl.c."""
    libraries = faulty["LD_LIBRARY_PATH"]
    report, log = oclgrind(
        gpu_plugin, tmp_path, LD_LIBRARY_PATH=libraries, FAKE_OPENCL="copies,keep"
    )
    assert report["exact"], report
    assert log == ""


def test_oclgrind_would_find_a_race(alone: Path, faulty: Mapping[str, str], tmp_path: Path) -> None:
    places = {"LD_LIBRARY_PATH": faulty["LD_LIBRARY_PATH"], "OCLGRIND_UNINITIALIZED": "0"}
    _, log = oclgrind(alone, tmp_path, **places, FAKE_OPENCL="no barrier")
    assert "data race" in log


def test_the_abi_is_khronos(tmp_path: Path) -> None:
    tools.require("CL/cl.h (opencl-c-headers)", Path("/usr/include/CL/cl.h").exists())
    (tmp_path / "CL").symlink_to("/usr/include/CL")
    flags = ["-c", "-Wall", "-Werror", f"-I{tmp_path}", f"-I{CSRC}"]
    zig(["cc", *flags, str(CSRC / "opencl_check.c"), "-o", str(tmp_path / "check.o")])
