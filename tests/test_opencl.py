"""The OpenCL plugins on PoCL: exact results, and what happens where a device has faults.

PoCL is a CPU driver: it proves the kernels and the host, and nothing about speed on a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lief
import numpy as np
import pytest

from bitcompile import inspection, numerics
from bitcompile.artifact import DATA, Artifact
from bitcompile.bench import bench
from bitcompile.errors import ToolchainError, UsageError
from bitcompile.targets import TARGETS, resolve
from bitcompile.targets.adreno import SCHEDULES as ADRENO
from bitcompile.targets.mali import SCHEDULES as MALI
from bitcompile.targets.opencl import SCHEDULES as GENERIC
from bitcompile.targets.tir.linking import CSRC, LINUX, zig
from bitcompile.targets.x86 import TRIPLE as X86
from tests import artifacts, opencl_case, tools
from tests.device import conformance_program, vectors
from tests.opencl_case import differences, glu, head, inputs, linear, open_session, run

HOST = "x86_64-linux"
GPUS = [name for name, target in TARGETS.items() if target.device == "opencl"]
SCHEDULES = {"opencl": GENERIC, "mali": MALI, "adreno": ADRENO}
HERE = Path(__file__).parent
PRELUDE = HERE.parent / "targets" / "tir" / "opencl"
POCL_HEADERS = Path("/usr/share/pocl/include")
OCLGRIND = Path("/usr/lib/oclgrind/liboclgrind-rt-icd.so")


@pytest.fixture(scope="module", params=GPUS)
def gpu_plugin(request: pytest.FixtureRequest) -> Path:
    """One target's plugin without CPU kernels: nothing can take over unseen."""
    tools.opencl_driver()
    return resolve(request.param, HOST, {"fallback": "none"}).compile()[0]


@pytest.fixture(scope="module")
def alone() -> Path:
    tools.opencl_driver()
    return resolve("opencl", HOST, {"fallback": "none"}).compile()[0]


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The plugin of `--target opencl`, which has CPU kernels."""
    tools.opencl_driver()
    return resolve("opencl").compile()[0]


@pytest.fixture(scope="module")
def conformance(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program that compares golden vectors, and the vectors."""
    folder = tmp_path_factory.mktemp("conformance")
    conformance_program(LINUX, X86, folder / "conformance")
    vectors.write(folder / "vectors")
    return folder / "conformance", folder / "vectors"


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


def test_golden_vectors(gpu_plugin: Path, conformance: tuple[Path, Path]) -> None:
    """Int32 sums, and every float, by the program that runs on phones."""
    program, golden = conformance
    command = [program, gpu_plugin, golden, *GPUS]  # two of the names are refused
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| exact |") == 1
    assert done.stdout.count("is not a variant of this plugin") == len(GPUS) - 1


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


def test_the_model_generates_the_tokens_of_the_cpu(
    plugin: Path, embedded: Callable[[str], Artifact], tmp_path: Path
) -> None:
    import bitcompile
    from tests.single_node import isa
    from tests.test_docs_model import MODEL, greedy, prompt_tokens

    del plugin  # compiled once, for the build
    made = bitcompile.build(MODEL, "opencl", out=tmp_path / "artifact")
    assert made.manifest["verification"]["summary"].startswith("25 of 25 operators bit-exact")
    assert made.manifest["target"]["isas"][0] == "opencl"
    prompt = prompt_tokens("The following example creates a table")
    cpu = greedy(embedded("x86"), prompt, 12)[0]
    tokens = {}
    for variant in (None, "opencl", "portable"):
        with isa(variant):
            tokens[variant] = greedy(made, prompt, 12)[0]
    assert tokens[None] == tokens["opencl"] == tokens["portable"] == cpu


def test_the_weights_are_those_of_the_cpu_once(tmp_path: Path) -> None:
    """Both halves read the CPU's tiles: nothing is doubled, and `inspect` says so."""
    ours = artifacts.write(tmp_path / "ours", target="opencl")
    cpu = artifacts.write(tmp_path / "cpu", target="x86")
    assert (ours.path / DATA).read_bytes() == (cpu.path / DATA).read_bytes()
    reports = [inspection.inspect(made.path) for made in (ours, cpu)]
    assert reports[0]["bytes"] == reports[1]["bytes"]
    text = inspection.format_report(reports[0])
    assert re.search(r"weights +one copy, layout i2_n16k16, read by opencl, avx512-vbmi, ", text)


@pytest.mark.parametrize(
    ("gpu", "host"),
    [("opencl", HOST), ("mali", "aarch64-linux-android"), ("adreno", "aarch64-linux-gnu")],
)
def test_its_artifact_says_what_the_host_needs(gpu: str, host: str, tmp_path: Path) -> None:
    made = artifacts.write(tmp_path / "out", target=gpu, host=host)
    assert made.manifest["target"]["host"].startswith(host)
    made.check_hashes()
    text = (made.path / "README.md").read_text()
    assert "Weights are ternary" in text
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert ('uses-native-library android:name="libOpenCL.so"' in text) == ("android" in host)
    assert "BITCOMPILE_OFFLOAD" in text
    program = lief.ELF.parse(str(made.path / "calibrate"))
    assert program is not None
    assert (made.path / "calibrate").stat().st_mode & 0o111
    alone = resolve(gpu, host, {"fallback": "none"})
    assert not any("calibrate" in section for section in alone.guide)


def test_bench_says_that_a_plugin_without_cpu_kernels_has_no_roofs(tmp_path: Path) -> None:
    tools.opencl_driver()
    made = artifacts.write(tmp_path / "out", target="opencl", choices={"fallback": "none"})
    with pytest.raises(ToolchainError, match=r"no roofs here: .*no CPU kernels to measure"):
        bench(made, prefill=8, decode=4, threads=1)


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
    alone: Path, faulty: Mapping[str, str]
) -> None:
    report, noise = run(alone, **faulty, FAKE_OPENCL="copies")
    assert (report["exact"], noise) == (True, "")
    report, noise = run(alone, **{**faulty, "BITCOMPILE_CACHE": "/dev/null"})
    assert (report["exact"], noise) == (True, "")


def test_without_a_chosen_cache_it_lies_with_the_user_or_the_plugin(
    alone: Path, tmp_path: Path
) -> None:
    """The first folder that can be written."""
    copy = tmp_path / "plugin" / alone.name
    copy.parent.mkdir()
    shutil.copyfile(alone, copy)
    places = {"BITCOMPILE_CACHE": "", "POCL_CACHE_DIR": str(tmp_path)}  # PoCL itself needs one
    home = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}
    report, _ = run(copy, **places, **home)
    assert report["exact"]
    assert len(list((tmp_path / "xdg" / "bitcompile").glob("opencl-*.bin"))) == 1
    report, _ = run(copy, **places, XDG_CACHE_HOME="/dev/null", HOME="/dev/null")
    assert report["exact"]
    assert len(list(copy.parent.glob("opencl-*.bin"))) == 1


FAULTS = {
    "small groups": r"work-groups of 16 items .* use another device",
    "embedded": r"has no full OpenCL profile, which the kernels need: use another device",
    "no compiler": r"has no compiler, which the kernels need: use another device",
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


@pytest.mark.parametrize("fault", ["wrong dot", "absent dot"])
def test_a_wrong_dot_product_is_not_used(
    fault: str, alone: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    """The driver says that it has one, which computes something else, or does not build."""
    places = {**faulty, "BITCOMPILE_CACHE": str(tmp_path), "FAKE_OPENCL": fault}
    report, noise = run(alone, **places, BITCOMPILE_VERBOSE="1")
    assert report["exact"], report
    assert "dot product: plain" in noise


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


@pytest.mark.parametrize(("choice", "asked"), [("none", False), ("prefill", True), ("all", True)])
def test_the_plugin_does_as_the_calibration_says(
    choice: str, asked: bool, plugin: Path, faulty: Mapping[str, str], tmp_path: Path
) -> None:
    """A device that fails tells whether it was asked."""
    copy = tmp_path / plugin.name
    shutil.copyfile(plugin, copy)
    copy.with_name(copy.name + ".offload").write_text(f"{choice}\n\n| a table | follows |\n")
    report, noise = run(copy, **faulty, FAKE_OPENCL="lost")
    assert (report["exact"], "take over" in noise) == (True, asked)
    # A token alone is the CPU's unless everything is the device's.
    report, noise = run(copy, **faulty, FAKE_OPENCL="lost", OPENCL_CASE_ROWS="1,8")
    assert (report["exact"], "take over" in noise) == (True, choice == "all")


def test_what_is_no_choice(plugin: Path, faulty: Mapping[str, str], tmp_path: Path) -> None:
    """The user's is refused; a file's is as none, and so is one that a variable overrules."""
    report, _ = run(plugin, BITCOMPILE_OFFLOAD="some")
    assert _matches("BITCOMPILE_OFFLOAD=some; choose one of: auto, none", str(report["error"]))
    copy = tmp_path / plugin.name
    shutil.copyfile(plugin, copy)
    for text, variable in (("some\n", ""), ("", ""), ("all\n", "prefill")):
        copy.with_name(copy.name + ".offload").write_text(text)
        places = {**faulty, "FAKE_OPENCL": "lost", "BITCOMPILE_OFFLOAD": variable}
        report, noise = run(copy, **places, OPENCL_CASE_ROWS="1")
        assert (report["exact"], noise) == (True, "")  # auto: prefill on a device with our memory


def test_a_device_asked_for_by_name_is_not_replaced(
    plugin: Path, faulty: Mapping[str, str]
) -> None:
    report, noise = run(plugin, **faulty, FAKE_OPENCL="lost", BITCOMPILE_ISA="opencl")
    assert _matches(FAULTS["lost"], str(report["error"]))
    assert noise == ""


def test_what_it_runs_on_is_told_when_asked(plugin: Path) -> None:
    report, noise = run(plugin, BITCOMPILE_VERBOSE="1")
    assert report["exact"]
    assert re.fullmatch(
        r"bitcompile: .*, driver .*, dot product: plain, memory: the host's, weights: in place"
        r"(, program from the cache)?\n",
        noise,
    )


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
