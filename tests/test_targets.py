"""The table of targets, and the cache of compiled plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitcompile.errors import ToolchainError, UsageError
from bitcompile.targets import TARGETS, resolve
from bitcompile.targets.tir import plugin
from bitcompile.targets.x86 import X86


def test_targets_are_found_by_name() -> None:
    assert resolve("x86") is X86
    assert resolve("native").can_run_here() is None
    assert all(name == target.name for name, target in TARGETS.items())
    with pytest.raises(UsageError, match="unknown target 'z80'; choose one of native, x86"):
        resolve("z80")
    with pytest.raises(UsageError, match="builds for host x86_64-linux-gnu"):
        resolve("x86", "aarch64-linux-gnu")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with a compiler that only counts."""
    monkeypatch.setenv("BITCOMPILE_CACHE", str(tmp_path / "cache"))

    def compile(
        isas: object, triple: str, layouts: object, cpu: Path, path: Path, *_: object
    ) -> None:
        path.parent.mkdir(exist_ok=True)
        count = tmp_path / "count"
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        path.write_bytes(b"library")
        digest = plugin.hashlib.sha256(b"library").hexdigest()
        plugin._hash_file(path).write_text(digest)

    monkeypatch.setattr(plugin, "_compile", compile)
    return tmp_path


def test_a_plugin_is_compiled_once(cached: Path) -> None:
    first, second = X86.compile()[0], X86.compile()[0]
    assert first == second
    assert (cached / "count").read_text() == "x"


def test_a_damaged_cache_entry_is_compiled_again(cached: Path) -> None:
    library = X86.compile()[0]
    library.write_bytes(b"lib")
    assert X86.compile()[0].read_bytes() == b"library"
    assert (cached / "count").read_text() == "xx"


def test_a_changed_source_is_another_plugin(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = X86.compile()[0]
    monkeypatch.setattr(plugin, "TIR", cached)
    assert X86.compile()[0] != before


def test_an_unusable_cache_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ToolchainError, match="set BITCOMPILE_CACHE"):
        X86.compile()


def test_a_full_disk_is_found_before_compiling(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(ToolchainError, match="no space left"):
        X86.compile()
    assert not (cached / "count").exists()
