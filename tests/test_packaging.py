from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), "."]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_claims_one_name_and_holds_every_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"bitcompile"}
    packaged = {n for n in names if n.endswith((".py", ".c", ".h", ".cc", ".map"))}
    folders = {"bitcompile": "bitcompile"}
    folders |= {name: f"bitcompile/{name}" for name in ("passes", "targets", "custom_ops")}
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in folders.items()
        for suffix in ("py", "c", "h", "cc", "map")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    }
    assert packaged == expected
    assert "bitcompile/py.typed" in names


def test_the_wheel_leaves_models_and_tests_out(wheel: Path) -> None:
    assert wheel.stat().st_size < 1 << 20
