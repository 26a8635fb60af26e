"""ONNX Runtime's own AArch64 library under emulation: the artifact as it runs on a device.

The C example, cross-compiled, opens the artifact for ``arm`` with the library of onnxruntime's
AArch64 wheel under ``qemu-aarch64``, and is compared with the same on x86. The kernels compute the
same bits on both; attention is ONNX Runtime's, whose sums differ in the last bits, so that now and
then an activation falls on the other side of a rounding edge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitcompile.artifact import Artifact
from bitcompile.targets import TARGETS
from tests import embedding
from tests.embedding import COUNT, REFERENCE, STRICT, X86, Answer, C, prompt, zig
from tests.tools import embedding_kit, onnxruntime_headers, program

ARM = "aarch64-linux-gnu.2.28"
LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")
SOURCES = (C / "generate.c", C / "bitcompile_model.c")
COSINE = 0.9995
"""Of logits, which the edges above move: 0.99990 was measured for one of the texts."""
CPUS = ("cortex-a53", "cortex-a76", "max")
"""NEON only, with dotprod, with i8mm."""
TEXTS = list(REFERENCE)
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd0c
CPU revision\t: 1

"""

Emulate = Callable[[str, str], Answer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the emulated process sees as ``/``: Debian's AArch64 libraries and one core.

    ONNX Runtime reads what the machine is from /proc and /sys, and crashes on those of an x86 host.
    """
    folder = tmp_path_factory.mktemp("root")
    (folder / "proc").mkdir()
    (folder / "proc" / "cpuinfo").write_text(CPUINFO)
    cpu = folder / "sys" / "devices" / "system" / "cpu"
    (cpu / "cpu0" / "topology").mkdir(parents=True)
    for name in ("kernel_max", "possible", "present", "online"):
        (cpu / name).write_text("0\n")
    (cpu / "cpu0" / "topology" / "physical_package_id").write_text("0\n")
    if not LIBRARIES.is_dir():
        program("libc6-arm64-cross")
    (folder / "lib").symlink_to(LIBRARIES)
    return folder


@pytest.fixture(scope="module")
def host(root: Path) -> Path:
    """The C example for AArch64."""
    out, library = root / "generate", embedding_kit("aarch64")
    flags = (f"-I{onnxruntime_headers()}", f"-L{library}", "-lonnxruntime")
    zig(*STRICT, "-target", ARM, *SOURCES, *flags, "-o", out)
    return out


def emulator(cpu: str, root: Path, *folders: Path) -> list[str | Path]:
    """The command that runs a program on ``cpu``, with libraries in ``folders``."""
    path = ":".join(map(str, (embedding_kit("aarch64"), *folders)))
    return [program("qemu-aarch64"), "-cpu", cpu, "-E", f"LD_LIBRARY_PATH={path}", "-L", root]


@pytest.fixture(scope="module")
def x86(
    embedded: Callable[[str], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Answer]:
    """The answer to a text on this machine."""
    folder = embedding.desktop_onnxruntime(tmp_path_factory.mktemp("x86"))
    out = folder / "generate"
    flags = (f"-I{onnxruntime_headers()}", f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}")
    zig(*STRICT, "-target", X86, *SOURCES, *flags, "-o", out)
    artifact = embedded("x86").path
    return lambda text: embedding.generate([out], artifact, prompt(text), folder)


@pytest.fixture(scope="module")
def emulated(
    host: Path, root: Path, embedded: Callable[[str], Artifact]
) -> Callable[[str, str], Answer]:
    """The answer to a text on an emulated CPU."""
    artifact = embedded("arm").path

    def run(cpu: str, text: str) -> Answer:
        return embedding.generate([*emulator(cpu, root), host], artifact, prompt(text), root)

    return run


@pytest.mark.parametrize("text", TEXTS)
def test_answers_equal_those_of_x86(
    emulated: Emulate, x86: Callable[[str], Answer], text: str
) -> None:
    here, there = x86(text), emulated("max", text)
    assert len(here.tokens) == COUNT
    assert embedding.agreed(here, there) == COUNT
    same = [a == b for a, b in zip(here.tokens, there.tokens, strict=True)]
    steps = min([*(i + 1 for i, equal in enumerate(same) if not equal), COUNT])
    assert embedding.cosine(here.logits[:steps], there.logits[:steps]) >= COSINE


def test_every_kind_of_cpu_gives_the_same_bits(emulated: Emulate) -> None:
    first, *others = (emulated(cpu, TEXTS[0]) for cpu in CPUS)
    for other in others:
        assert other.tokens == first.tokens
        np.testing.assert_array_equal(other.logits, first.logits)


def test_the_static_library_and_the_android_plugin_give_the_same_bits(
    emulated: Emulate, root: Path, host: Path, embedded: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """Both are for Android; what they need of its libc.so is in Linux's libc.so.6 as well."""
    plugin, _ = TARGETS["android"].compile()
    embeds = TARGETS["android"].embeds(plugin)
    archive = embeds["libbitcompile_ops.a"]
    static, library = tmp_path / "generate", embedding_kit("aarch64")
    flags = (f"-I{onnxruntime_headers()}", f"-I{embeds['include/bitcompile.h'].parent}")
    linked = (archive, f"-L{library}", "-lonnxruntime", "-DBITCOMPILE_STATIC")
    zig(*STRICT, "-target", ARM, *SOURCES, *flags, *linked, "-o", static)
    (tmp_path / "empty.c").touch()
    shared = ("-shared", "-nostdlib", "-Wl,-soname,libc.so", tmp_path / "empty.c")
    zig("-target", ARM, *shared, "-o", tmp_path / "libc.so")
    expected, artifact = emulated("max", TEXTS[0]), embedded("arm").path
    for command in ([static], [host, "-p", plugin]):
        run, options = [*emulator("max", root, tmp_path), command[0]], command[1:]
        answer = embedding.generate(run, artifact, prompt(TEXTS[0]), tmp_path, *options, count=4)
        assert answer.tokens == expected.tokens[:4]
        np.testing.assert_array_equal(answer.logits, expected.logits[:4])
