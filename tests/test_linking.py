"""What zig links for other systems, read back by a reader of their formats."""

from __future__ import annotations

import importlib.machinery
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import lief
import pytest

from bitcompile import cli, companions, runtime, verification
from bitcompile.errors import ToolchainError
from bitcompile.packing import CPU_TILE
from bitcompile.targets import TARGETS, android, resolve, toolchain
from bitcompile.targets.arm import NAMES
from bitcompile.targets.tir import linking, plugin
from tests import artifacts
from tests.tools import program

CROSS = ("arm", "android", "macos", "ios", "mali", "adreno")


@cache
def library(target: str) -> Path:
    return resolve(target).compile()[0]


@cache  # the reader's views do not keep the file they look at
def elf(target: str) -> lief.ELF.Binary:
    binary = lief.ELF.parse(str(library(target)))
    assert binary is not None
    return binary


@pytest.mark.parametrize(
    ("target", "needed"),
    [("arm", ["libc.so.6"]), ("android", ["libc.so"]), ("mali", ["libc.so", "libdl.so"])],
)
def test_shared_library_for_linux_and_android(target: str, needed: list[str]) -> None:
    binary = elf(target)
    assert binary.header.machine_type == lief.ELF.ARCH.AARCH64
    assert list(binary.libraries) == needed
    tags = {entry.tag: entry for entry in binary.dynamic_entries}
    assert tags[lief.ELF.DynamicEntry.TAG.SONAME].name == "libbitcompile_ops.so"
    assert lief.ELF.DynamicEntry.TAG.TEXTREL not in tags
    assert {s.name for s in binary.exported_symbols} == {"RegisterCustomOps"}
    kinds = {segment.type: segment for segment in binary.segments}
    assert lief.ELF.Segment.TYPE.TLS not in kinds
    stack = kinds[lief.ELF.Segment.TYPE.GNU_STACK]
    assert not stack.has(lief.ELF.Segment.FLAGS.X)
    for segment in binary.segments:
        if segment.type == lief.ELF.Segment.TYPE.LOAD:
            assert segment.alignment % 16384 == 0
            assert (segment.virtual_address - segment.file_offset) % segment.alignment == 0
            writable = segment.has(lief.ELF.Segment.FLAGS.W)
            assert not (writable and segment.has(lief.ELF.Segment.FLAGS.X))


@pytest.mark.parametrize("target", ["android", "mali", "adreno"])
def test_android_library_asks_for_nothing_but_bionic(target: str) -> None:
    binary = elf(target)
    bionic = {name for names in linking.BIONIC.values() for name in names.split()}
    assert {s.name for s in binary.imported_symbols if s.name} <= bionic
    kinds = {segment.type for segment in binary.segments}
    assert lief.ELF.Segment.TYPE.GNU_RELRO in kinds
    assert lief.ELF.Segment.TYPE.GNU_EH_FRAME not in kinds
    assert not {".eh_frame", ".init_array", ".fini_array"} & {s.name for s in binary.sections}


def test_program_for_android() -> None:
    binary = lief.ELF.parse(str(library("mali").with_name("calibrate")))
    assert binary is not None
    assert binary.interpreter == "/system/bin/linker64"
    assert list(binary.libraries) == ["libc.so", "libdl.so"]
    bionic = {name for names in linking.BIONIC_PROGRAMS.values() for name in names.split()}
    assert {s.name for s in binary.imported_symbols if s.name} <= bionic
    assert binary.is_pie
    for segment in binary.segments:
        if segment.type == lief.ELF.Segment.TYPE.LOAD:
            assert segment.alignment % 16384 == 0


def test_glibc_of_2012_has_all_that_the_arm_library_needs() -> None:
    versions = {a.name for need in elf("arm").symbols_version_requirement
                for a in need.get_auxiliary_symbols()}  # fmt: skip
    assert versions == {"GLIBC_2.17"}


@cache
def _fat(path: Path) -> lief.MachO.FatBinary:
    fat = lief.MachO.parse(str(path))
    assert fat is not None
    assert fat.size == 1
    return fat


def macho(path: Path) -> lief.MachO.Binary:
    return _fat(path).at(0)


def test_dylib_for_macos() -> None:
    binary = macho(library("macos"))
    assert binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert binary.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert list(binary.build_version.minos)[:2] == [11, 0]
    needed = {lib.name for lib in binary.libraries} - {"@rpath/libbitcompile_ops.dylib"}
    assert needed == {"/usr/lib/libSystem.B.dylib"}
    functions = {s.name for s in binary.exported_symbols}
    assert functions - {"___dso_handle", "__mh_dylib_header"} == {"_RegisterCustomOps"}
    assert binary.has_code_signature  # Apple silicon loads nothing without one


def members(archive: Path, folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "ziglang", "ar", "x", str(archive.absolute())]
    subprocess.run(command, cwd=folder, check=True)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("target", "platform"),
    [("ios", lief.MachO.BuildVersion.PLATFORMS.IOS),
     ("macos", lief.MachO.BuildVersion.PLATFORMS.MACOS)],
)  # fmt: skip
def test_static_library_for_apple(
    target: str, platform: lief.MachO.BuildVersion.PLATFORMS, tmp_path: Path
) -> None:
    visible = set()
    objects = members(plugin.static_library(library(target)), tmp_path)
    assert {f"{isa}.o" for isa in NAMES} < {path.name for path in objects}
    for path in objects:
        binary = macho(path)
        assert binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
        assert binary.build_version.platform == platform
        for symbol in binary.symbols:
            external = symbol.raw_type & linking.N_EXT and not symbol.raw_type & linking.N_PEXT
            if external and symbol.raw_type & linking.N_TYPE == linking.N_SECT:
                visible.add(symbol.name)
    assert "_bitcompile_RegisterCustomOps" in visible
    assert "_RegisterCustomOps" not in visible
    assert all(name.startswith(("_bc_", "_bitcompile_")) for name in visible)


HOST = """
#include <stdio.h>
#include "bitcompile.h"
static const void *none(unsigned version) { (void)version; return 0; }
struct OrtApiBase { const void *(*get)(unsigned); const char *(*version)(void); } base = {none, 0};
int main(void) { return puts(bitcompile_RegisterCustomOps(0, &base) ? "refused" : "linked") < 0; }
"""


@pytest.mark.parametrize("target", ["arm", "android"])
def test_static_library_links_into_a_program(target: str, tmp_path: Path) -> None:
    """musl stands in for the systems' C libraries; a runtime too old to report is left alone."""
    source, made = tmp_path / "host.c", tmp_path / "host"
    source.write_text(HOST)
    archive = str(plugin.static_library(library(target)))
    linking.zig(["cc", "-target", "aarch64-linux-musl", f"-I{linking.CSRC}", str(source), archive,
                 "-o", str(made)])  # fmt: skip
    done = subprocess.run([program("qemu-aarch64"), str(made)], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout == "linked\n"


def test_nothing_but_zig_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any program in PATH; one variant, to be quick."""
    from bitcompile.targets.tir.arm import NEON

    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for system, triple in ((linking.LINUX, "aarch64-linux-gnu.2.17"),
                           (linking.ANDROID, android.TRIPLE)):  # fmt: skip
        out = tmp_path / triple / "lib.so"
        plugin._compile([NEON], triple, [CPU_TILE.id], linking.CSRC / "cpu_arm.c", out, system)
        assert lief.ELF.parse(str(out)) is not None


def test_a_missing_linker_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name == "ziglang" else importlib.machinery.ModuleSpec(name, None)

    monkeypatch.setattr(toolchain, "find_spec", absent)
    for target in CROSS:
        assert TARGETS[target].can_build_here() == (
            'missing ziglang: pip install "bitcompile[build]"'
        )


def test_what_zig_complains_about_is_passed_on(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int f(void) { return undeclared; }")
    with pytest.raises(ToolchainError, match=r"could not compile the plugin: .*undeclared"):
        linking.link("aarch64-linux-gnu.2.17", [], [source], tmp_path / "bad.so")


_GPU = {"libbitcompile_ops.so", "libbitcompile_ops.a", "include/bitcompile.h", "calibrate",
        "calibrate.txt"}  # fmt: skip
EMBEDDED = {
    "arm": ({"libbitcompile_ops.so"}, ("python", "genai", "c")),
    "android": ({"libbitcompile_ops.so", "libbitcompile_ops.a", "include/bitcompile.h"},
                ("android", "c_static")),
    "macos": ({"libbitcompile_ops.dylib", "libbitcompile_ops.a", "include/bitcompile.h"},
              ("python", "genai", "c", "c_static")),
    "ios": ({"libbitcompile_ops.a", "include/bitcompile.h"}, ("swift", "c_static")),
    "mali": (_GPU, ("android", "c_static", "opencl_android", "calibrate_android")),
    "adreno": (_GPU, ("android", "c_static", "opencl_android", "calibrate_android")),
}  # fmt: skip


@pytest.mark.parametrize("target", CROSS)
def test_artifact_for_another_machine(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files and README are its target's; here it verifies by its functions and never loads."""
    made = artifacts.write(tmp_path / "out", target=target)
    made.check_hashes()
    files, sections = EMBEDDED[target]
    assert files == {
        name for name in made.manifest["files"] if re.search("bitcompile|include|calibrate", name)
    }
    text = (made.path / "README.md").read_text()
    headings = [companions.SECTIONS[name].splitlines()[0] for name in sections]
    assert re.findall("^## .*", text, re.MULTILINE) == [*headings, "## Files"]
    assert verification.verify(made, plugin=False).nodes
    host = resolve(target).host
    if runtime.host_mismatch(host) is None:
        return
    for command in (
        ["run", "--prompt", "x"],
        ["verify"],
        ["bench", "--prefill", "8", "--decode", "4"],
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main([command[0], str(made.path), *command[1:]])
        assert exit.value.code == 4
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"is for {host}, this machine is" in line
