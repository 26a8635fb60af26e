"""Linking a plugin with zig alone, for any system: its C glue and TVM's objects become one file."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitcompile.custom_ops.csrc
from bitcompile.errors import ToolchainError

CSRC = Path(bitcompile.custom_ops.csrc.__path__[0])
GLUE_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-sanitize=all", "-Wall",
              "-Wextra", "-Werror", f"-I{CSRC}")  # fmt: skip

Link = Callable[[str, Sequence[Path], Sequence[Path], Path], None]
"""``(triple, objects, sources, out)``: compile the sources and link all into the file ``out``."""


@dataclass(frozen=True)
class System:
    """How an operating system's plugins are made."""

    llvm_triple: Callable[[str], str]
    """The name that LLVM has for a triple of ours (which is zig's)."""
    link: Link
    archive: Link | None = None
    """Makes the static library, for systems whose apps may want one."""
    program: Link | None = None
    """Makes a program, for systems whose artifacts may bring one."""


def zig(arguments: Sequence[str]) -> None:
    """Run ``zig``; raises ToolchainError with its first complaint."""
    command = [sys.executable, "-m", "ziglang", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
        raise ToolchainError(f"zig could not compile the plugin: {complaint.strip()}")


def link(
    triple: str,
    objects: Sequence[Path],
    sources: Sequence[Path],
    out: Path,
    flags: Sequence[str] = (),
) -> None:
    """A shared library for Linux.

    It stays loaded (``nodelete``): a driver that it opened has threads that outlive a session.
    """
    zig(
        ["cc", "-target", triple, *GLUE_FLAGS, "-shared", "-s"]
        + [f"-Wl,--version-script={CSRC / 'plugin.map'}", "-Wl,-z,now", "-Wl,-z,nodelete"]
        + [f"-Wl,-soname,{out.name}", *flags]
        + [str(path) for path in (*sources, *objects)]
        + ["-Wl,--as-needed", "-ldl", "-lpthread", "-o", str(out)]
    )


def _link_program(triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path) -> None:
    """A program for Linux."""
    files = [str(path) for path in (*sources, *objects)]
    flags = ("-Wl,--as-needed", "-ldl", "-lpthread", "-o", str(out))
    zig(["cc", "-target", triple, *GLUE_FLAGS, "-s", *files, *flags])


def _compiled(triple: str, sources: Sequence[Path], folder: Path, *flags: str) -> list[Path]:
    """Objects of C sources, in a new folder; one call each, for zig drops all but the first."""
    folder.mkdir()
    made = [folder / f"{source.stem}.o" for source in sources]
    for source, out in zip(sources, made, strict=True):
        zig(["cc", "-target", triple, *GLUE_FLAGS, *flags, "-c", str(source), "-o", str(out)])
    return made


BARE = ("-isystem", str(CSRC / "libc"), "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables", "-fno-unwind-tables")  # fmt: skip
"""Flags for systems whose C library zig does not know."""
BIONIC = {
    "libc.so": """calloc close fclose fgetc fopen fprintf fread free fwrite getauxval getenv getpid
        ioctl lseek madvise malloc memcmp memcpy memset mkdir mmap munmap open
        posix_memalign pread pthread_mutex_lock pthread_mutex_unlock remove rename
        sched_yield snprintf stderr strchr strcmp strlen strrchr strstr vsnprintf wcslen""",
    "libdl.so": "dladdr dlopen dlsym",
}
"""What plugins call of Android's C library; all are there from API level 23 on."""
BIONIC_PROGRAMS = {
    **BIONIC,
    "libc.so": BIONIC["libc.so"]
    + """ __libc_init clock_gettime exit fflush fputc fputs printf putchar puts
        pthread_cond_broadcast pthread_cond_wait pthread_create setenv stdout strncmp strtod
        strtoll""",
}
"""What programs call of it."""
START = CSRC / "libc" / "start.c"
ATOMICS = CSRC / "libc" / "atomics.c"
"""Of the compiler's library, which is not linked there."""
PAGE = 16384
"""Segment alignment: Android 15 has devices with pages of 16 KiB."""


def _link_android(triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path) -> None:
    """A shared library that needs Android's C library alone, linked against stand-ins for it."""
    kind = ["-shared", "-soname", out.name, f"--version-script={CSRC / 'plugin.map'}"]
    _link_bionic(triple, objects, sources, out, BIONIC, kind)


def _link_android_program(
    triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path
) -> None:
    """A program for Android."""
    kind = ["-pie", "--dynamic-linker=/system/bin/linker64"]
    _link_bionic(triple, objects, [*sources, START], out, BIONIC_PROGRAMS, kind)


def _link_bionic(
    triple: str,
    objects: Sequence[Path],
    sources: Sequence[Path],
    out: Path,
    symbols: Mapping[str, str],
    kind: Sequence[str],
) -> None:
    glue = _compiled(triple, [*sources, ATOMICS], out.with_suffix(".glue"), *BARE)
    folder = out.with_suffix(".libc")
    folder.mkdir()
    libc = [_stand_in(triple, folder, name, names.split()) for name, names in symbols.items()]
    zig(
        ["ld.lld", *kind, "-o", str(out), "-s", "--no-undefined"]
        + ["-z", "now", "-z", "nodelete", "-z", "relro", "-z", "text"]
        + ["-z", f"max-page-size={PAGE}", "--hash-style=both", "--build-id=sha1"]
        + [str(path) for path in (*glue, *objects, "--as-needed", *libc)]
    )


def _stand_in(triple: str, folder: Path, name: str, symbols: Sequence[str]) -> Path:
    """An empty system library: the linker reads its name and symbols, a device has the real one."""
    source, library = folder / f"{name}.c", folder / name
    source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in symbols))
    quiet = ("-fno-builtin", "-Wno-everything", "-fvisibility=default")
    objects = _compiled(triple, [source], folder / f"{name}.objects", *quiet)
    zig(["ld.lld", "-shared", "-soname", name, "-o", str(library), *map(str, objects)])
    return library


def _archive(*flags: str) -> Link:
    def make(triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path) -> None:
        """A static library that exports ``bitcompile_RegisterCustomOps``."""
        glue = _compiled(triple, sources, out.with_suffix(".static"), "-DBC_STATIC", *flags)
        zig(["ar", "rcs", str(out), *(str(path) for path in (*glue, *objects))])

    return make


def _link_macos(triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path) -> None:
    """A dylib, against zig's own list of what libSystem has."""
    for path in objects:
        hide_symbols(path)
    zig(
        ["cc", "-target", triple, *GLUE_FLAGS, "-dynamiclib", "-install_name", f"@rpath/{out.name}"]
        + [str(path) for path in (*sources, *objects)]
        + ["-o", str(out)]
    )


def _link_ios(triple: str, objects: Sequence[Path], sources: Sequence[Path], out: Path) -> None:
    """A static library in the plugin's place: zig has no libSystem of iOS to link a dylib with."""
    for path in objects:
        hide_symbols(path)
    _archive(*BARE)(triple, objects, sources, out)


MACHO_64, LC_SYMTAB = 0xFEEDFACF, 2
N_EXT, N_TYPE, N_SECT, N_PEXT = 0x01, 0x0E, 0x0E, 0x10


def hide_symbols(path: Path) -> None:
    """Make the functions of a Mach-O object private to the library it is linked into.

    TVM gives them default visibility, and zig's Mach-O linker takes no list of exports. Layout:
    Apple's mach-o/loader.h and nlist.h.
    """
    data = bytearray(path.read_bytes())
    magic, _, _, _, commands = struct.unpack_from("<5I", data)
    if magic != MACHO_64:
        raise ValueError(f"{path} is not a 64-bit Mach-O object")
    at = 32
    for _ in range(commands):
        kind, size = struct.unpack_from("<2I", data, at)
        if kind == LC_SYMTAB:
            table, count = struct.unpack_from("<2I", data, at + 8)
            for entry in range(table + 4, table + 16 * count, 16):  # n_type of each nlist_64
                if data[entry] & N_EXT and data[entry] & N_TYPE == N_SECT:
                    data[entry] |= N_PEXT
        at += size
    path.write_bytes(data)


def _gnu_triple(triple: str) -> str:
    """Without the version of the C library."""
    return triple.split(".")[0]


def _apple_triple(system: str) -> Callable[[str], str]:
    """``arm64-apple-macosx11.0`` for ``aarch64-macos.11.0``."""
    return lambda triple: f"arm64-apple-{system}{triple.partition('.')[2]}"


LINUX = System(_gnu_triple, link, _archive(), _link_program)
ANDROID = System(_gnu_triple, _link_android, _archive(*BARE), _link_android_program)
MACOS = System(_apple_triple("macosx"), _link_macos, _archive())
IOS = System(_apple_triple("ios"), _link_ios)
