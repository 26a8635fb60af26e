"""The CUDA kernels of one row, on this CPU: ``emulated_cuda.cc``.

The plugin's own launch functions choose kernels, grids and shared memory. ``python -m
tests.cuda_emulation FOLDER`` compares with the reference, where :func:`build` filled FOLDER and
LD_LIBRARY_PATH names it.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from bitcompile import numerics
from bitcompile.packing import CUDA_TILE, PackedTernary
from tests.gpu.jobs import GATES, NO_GATE, LinearJob

LIBRARY, KERNELS_TEXT = "bitcompile_cuda.so", "kernels.inc"
TYPES = {1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16}
"""By ONNX's number."""
EPS = 1e-5
NAMES = r"bc_(rows|any_rows|(?:fused|gemv)\w+)"
C_TYPES = {"uint8": "uchar", "uint32": "uint", "int32": "int", "float32": "float"}


def build(folder: Path) -> None:
    """Compile the stand-in for the driver with the kernels' text, and the launch functions."""
    from bitcompile.targets.tir.cuda.compiler import IMAGES
    from bitcompile.targets.tir.cuda.device import PRELUDE, source
    from bitcompile.targets.tir.cuda.kernels import ARGUMENTS, KERNELS
    from tests.gpu.carry import link_launcher

    kernels = [kernel for kernel in KERNELS if re.fullmatch(NAMES, kernel.name)]
    text = source({kernel.name: kernel.generate(kernel.name) for kernel in kernels})
    text = text.removeprefix(PRELUDE.read_text("utf-8"))
    text = re.sub(r"extern __shared__ \S+ uchar (\w+)\[\];", r"uchar *\1 = dynamic_memory();", text)
    shared = r"__shared__ (alignas\(\d+\)) (\w+) (\w+)(\[\d+\]);"
    text = re.sub(shared, r"\1 static \2 \3\4; spoil(\3, sizeof \3);", text)
    assert "__shared__" not in text
    entries = []
    for kernel in kernels:
        kind = next(kind for kind in ("rows", "fused", "gemv") if kind in kernel.name)
        parameters = ARGUMENTS[kind]
        values = ", ".join(f"*({_c_type(c)} *)a[{i}]" for i, (_, c) in enumerate(parameters))
        entries.append(f'{{"{kernel.name}", [](void **a) {{ {kernel.name}({values}); }}}},')
    lines = [text, "static const Entry entries[] = {", *entries, "};"]
    (folder / KERNELS_TEXT).write_text("\n".join(lines) + "\n")
    hopper = next(image for image in IMAGES if image.arch == "90a")
    link_launcher(folder / LIBRARY, {hopper: b"none"})
    compile_emulator(folder)


def compile_emulator(folder: Path) -> None:
    """The stand-in for the driver, with the kernels' text that lies in ``folder``."""
    from bitcompile.targets.tir.linking import zig

    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-sanitize=all"]
    emulator = str(Path(__file__).with_name("emulated_cuda.cc"))
    zig(["c++", *options, f"-I{folder}", emulator, "-o", str(folder / "libcuda.so.1")])


def _c_type(kind: str) -> str:
    return C_TYPES[kind.rstrip("*")] + " *" * kind.count("*")


class Launcher:
    """The launch functions over the emulated GPU."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / LIBRARY))
        self.library.bc_cuda_gpu.restype = ctypes.c_void_p
        self.library.bc_cuda_linear_scratch.restype = ctypes.c_int64
        assert not self.library.bc_cuda_open()
        self.gpu = ctypes.c_void_p(self.library.bc_cuda_gpu(ctypes.byref(ctypes.c_char_p())))

    def linear(self, job: LinearJob) -> np.ndarray:
        """Run a job; returns its scratch memory."""
        size = self.library.bc_cuda_linear_scratch(self.gpu, ctypes.byref(job))
        scratch = np.full(max(1, size), 0x5A, np.uint8)
        at = ctypes.c_void_p(scratch.ctypes.data)
        assert not self.library.bc_cuda_linear(self.gpu, None, ctypes.byref(job), at)
        return scratch


class Case:
    """Random arrays of one row, and the job over them."""

    def __init__(self, N: int, K: int, type_x: int, type_y: int, **choices: float) -> None:
        self.what = f"{N}x{K} {type_x=} {type_y=} {choices}"
        self.N, self.K, self.rng = N, K, np.random.default_rng((N, K, type_x, type_y))
        self.gate_in = int(choices.pop("gate_in", NO_GATE))
        self.gate_out = int(choices.pop("gate_out", NO_GATE))
        self.norm, self.extras = choices.pop("norm", 1), choices.pop("extras", 1)
        x = self._floats(1, K * (1 if self.gate_in < 0 else 2))
        x *= np.float32(choices.pop("factor", 1))
        if "odd" in choices:
            x[0, self.rng.integers(K)] = choices.pop("odd")
        self.x, self.y = x.astype(TYPES[type_x]), np.full((1, N), np.nan, TYPES[type_y])
        rows = N if self.gate_out < 0 else 2 * N
        self.weight = self.rng.integers(-1, 2, (rows, K)).astype(np.int8)
        self.scale = self._floats(rows, 1)
        packed = PackedTernary.pack(self.weight, self.scale, CUDA_TILE)
        self.gamma, self.bias = self._floats(K), self._floats(N)
        self.residual = self._floats(1, N).astype(TYPES[type_y])
        self.data, self.w_scale = np.ascontiguousarray(packed.data), packed.scale.copy()
        self.job = LinearJob(
            x=self.x.ctypes.data, w=self.data.ctypes.data, w_scale=self.w_scale.ctypes.data,
            gamma=self.gamma.ctypes.data if self.norm else None,
            bias=self.bias.ctypes.data if self.extras else None,
            residual=self.residual.ctypes.data if self.extras else None,
            y=self.y.ctypes.data, M=1, N=N, K=K, type_x=type_x, type_y=type_y, eps=EPS,
            gate_in=self.gate_in, gate_out=self.gate_out,
            **{name: int(value) for name, value in {"early": 1, **choices}.items()},
        )  # fmt: skip

    def _floats(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def normed(self) -> np.ndarray:
        """What is quantised."""
        x = self.x.astype(np.float32)
        if self.gate_in >= 0:
            x = numerics.ACTIVATIONS[GATES[self.gate_in]](x[:, : self.K]) * x[:, self.K :]
        return numerics.rms_norm(x, self.gamma, EPS) if self.norm else x

    def product(self) -> np.ndarray:
        """The reference's row."""
        y = numerics.ternary_matmul(self.normed(), self.weight, self.scale)
        if self.gate_out >= 0:
            y = numerics.ACTIVATIONS[GATES[self.gate_out]](y[:, : self.N]) * y[:, self.N :]
        if self.extras:
            y = (y + self.bias) + self.residual.astype(np.float32)
        return y.astype(np.float32).astype(self.y.dtype)


def alike(got: np.ndarray, expected: np.ndarray) -> bool:
    """Whether all bits are equal; all NaNs are alike."""
    a, b = got.astype(np.float32), expected.astype(np.float32)
    same = (a == b) & (np.signbit(a) == np.signbit(b))
    return bool((same | (np.isnan(a) & np.isnan(b))).all())


ODD = ({"factor": 0}, {"factor": 3e4}, {"factor": 1e-6}, {"odd": np.nan}, {"odd": -np.inf})


def fused_cases() -> list[Case]:
    """One kernel a product: every way, tails, blocks at the edge, pieces fetched early and late."""
    made = []
    lengths = (4, 128, 132, 300, 1028, 2560, 3072, 3076, 6912, 8192)
    for i, (K, type_x) in enumerate(itertools.product(lengths, TYPES)):
        type_y = list(TYPES)[i // 3 % 3]
        made.append(Case(37, K, type_x, type_y, norm=i % 4 > 0, extras=i % 3 > 0))
        made.append(Case(48, K, type_x, 1, gate_out=i % 4, extras=0))
    for step, gate in itertools.product((2, 3, 4, 8), (NO_GATE, 0)):
        made.append(Case(208, 520, 10, 10, step=step, gate_out=gate, extras=0))
        made.append(Case(208, 4300, 1, 10, step=step, gate_out=gate, extras=0))
    made += [Case(33, 260, type_x, 10, **odd) for type_x in TYPES for odd in ODD]
    return made


def row_cases() -> list[Case]:
    """With ``split``: norm and quantisation in a kernel of their own, then the product of the row.

    Its warps have one unit of columns or up to four, the last of them fewer.
    """
    made = []
    lengths = (1, 3, 100, 301, 2049, 2560, 3073, 4100, 6145, 6912, 8192, 8195, 8196, 9217, 12288)
    for i, K in enumerate(lengths):
        for early, gate in ((0, NO_GATE), (1, NO_GATE), (i % 2, i % 4)):
            type_x, type_y = 1 if gate >= 0 else list(TYPES)[i % 3], list(TYPES)[i // 3 % 3]
            choices = {"gate_in": gate, "split": 1, "extras": i % 2 == early, "early": early}
            made.append(Case(20 - 4 * early, K, type_x, type_y, **choices))
    made += [Case(16, K, 1, 1, split=1, extras=0, **odd) for K in (256, 259) for odd in ODD]
    return made


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong, and how many cases there were; 1 if any is."""
    launcher, wrong = Launcher(Path(arguments[0])), []
    np.seterr(all="ignore")
    fused, rows = fused_cases(), row_cases()
    for case in fused:
        launcher.linear(case.job)
        if not alike(case.y, case.product()):
            wrong.append(case.what)
    for case in rows:
        q, s = numerics.quantize_activations(case.normed())
        scratch = launcher.linear(case.job)
        units = -(-case.K // 128)
        got, after = scratch[: units * 128].view(np.int8), scratch[units * 1024 :]
        got_s, total = after[:4].view(np.float32), after[256:260].view(np.int32)
        padded = np.pad(q[0], (0, units * 128 - case.K))
        if not (np.array_equal(got, padded) and alike(got_s, s[0]) and total[0] == q.sum()):
            wrong.append(f"row of {case.what}")
        if not alike(case.y, case.product()):
            wrong.append(case.what)
    print("\n".join([*wrong, f"{len(fused)} products and {len(rows)} rows"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
