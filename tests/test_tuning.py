"""Tuning: every schedule gives the same bits, the fastest is remembered, and builds read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitcompile import tuning
from bitcompile.errors import InputError, UsageError, VerificationError
from bitcompile.targets import machine, x86
from bitcompile.targets.tir import presets
from tests.tools import require

SMALL = (1 << 20) + 4096
"""Bytes of weights: a few matrices, with a last part that holds no whole one."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict]:
    """The schedules of this CPU's best variant, run once on two threads."""
    require("the build tools", x86.X86.can_build_here() is None)
    from bitcompile.targets.tir import space
    from bitcompile.targets.tir.x86 import ISAS

    # Prefetches cannot change a result; every other choice is compiled.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "PREFETCH", space.PREFETCH[-1:])
        return _measure(space, ISAS, tmp_path_factory.mktemp("space") / "space.so")


def _measure(space: ModuleType, isas: tuple[Any, ...], library: Path) -> tuple[list, dict]:
    flags = {flag.replace("_", "") for flag in machine.cpu_flags()}
    isa = next(isa for isa in isas if flags.issuperset(isa.features))
    calls = space.compile_space(isa, x86.TRIPLE, library)
    spec = {"library": str(library), "calls": calls, "threads": 2, "repeat": 1, "bytes": SMALL}
    return calls, tuning._in_child(spec, library.with_suffix(".json"))


def test_every_schedule_and_layout_gives_the_same_bits(measured: tuple[list, dict]) -> None:
    calls, results = measured
    for kind in ("gemv", "gemm"):
        digests = {c["symbol"]: results[c["symbol"]]["digest"] for c in calls if c["kind"] == kind}
        assert len(digests) > 4
        assert len(set(digests.values())) == 1, digests


def test_the_choice_is_one_of_the_points(measured: tuple[list, dict]) -> None:
    calls, results = measured
    chosen = tuning.choose(calls, results)
    for kind, point in chosen.items():
        assert point in [call["point"] for call in calls if call["kind"] == kind]
    assert len(tuning.rates(calls, results)) == len(calls)
    assert all(row["rate"] > 0 for row in tuning.rates(calls, results))


def _calls(seconds: dict[str, list[float]], digest: str = "a") -> tuple[list, dict]:
    calls, results = [], {}
    for kind in ("gemv", "gemm"):
        for i, (layout, values) in enumerate(seconds.items()):
            for j, value in enumerate(values):
                symbol = f"{kind}{i}{j}"
                calls.append(
                    {"symbol": symbol, "kind": kind, "layout": layout, "point": {"streams": j}}
                )
                results[symbol] = {"seconds": [value], "digest": digest, "work": 1.0}
    return calls, results


def test_a_schedule_must_win_over_all_layouts_and_by_more_than_noise() -> None:
    assert tuning.choose(*_calls({"i2": [1, 0.5, 0.9], "t5": [1, 2, 0.9]}))["gemv"]["streams"] == 2
    assert tuning.choose(*_calls({"i2": [1, 0.99], "t5": [1, 0.99]}))["gemm"]["streams"] == 0


def test_a_schedule_that_changes_results_is_refused() -> None:
    calls, results = _calls({"i2": [1, 0.5]})
    results["gemv01"]["digest"] = "b"
    with pytest.raises(VerificationError, match="schedules of gemv differ"):
        tuning.choose(calls, results)


def test_schedules_are_remembered_by_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "cache" / presets.NAME
    monkeypatch.setattr(presets, "cpu_model", lambda: "Maker-1-2")
    presets.remember(own, "Maker-1-2", "avx2", {"gemv": {"streams": 1}})
    presets.remember(own, "Maker-1-3", "avx2", {"gemv": {"streams": 2}})
    found = presets.for_this_cpu(own)
    assert found == {"avx2": {"gemv": {"streams": 1}}}
    family = {"avx2": {"gemv": {"streams": 4}}, "portable": {"gemv": {"streams": 2}}}
    shipped = {"Maker-1": family, "Maker-1-3": {"avx2": {"gemv": {"chains": 2}}}}
    (tmp_path / "shipped").write_text(json.dumps(shipped))
    monkeypatch.setattr(presets, "SHIPPED", tmp_path / "shipped")
    assert presets.for_this_cpu(own) == {**family, "avx2": {"gemv": {"streams": 1}}}
    monkeypatch.setattr(presets, "cpu_model", lambda: "Maker-1-3")
    assert presets.for_this_cpu(tmp_path / "none") == {**family, "avx2": {"gemv": {"chains": 2}}}
    own.write_text("[")
    with pytest.raises(InputError, match="delete it and tune again"):
        presets.for_this_cpu(own)
    own.write_text('{"Maker-1-2": 1}')
    with pytest.raises(InputError, match="delete it and tune again"):
        presets.for_this_cpu(own)


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    presets.prepare(tmp_path / "new" / presets.NAME)
    assert not (tmp_path / "new" / presets.NAME).exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another output"):
        presets.prepare(tmp_path / "file" / presets.NAME)


def test_presets_change_the_schedule_and_nothing_else() -> None:
    require("the build tools", x86.X86.can_build_here() is None)
    from bitcompile.targets.tir.x86 import AVX2, ISAS

    made = presets.tuned(ISAS, {"avx2": {"gemv": {"streams": 2}}})
    assert made[ISAS.index(AVX2)] == replace(AVX2, gemv=replace(AVX2.gemv, streams=2))
    assert [a for a in made if a.name != "avx2"] == [a for a in ISAS if a.name != "avx2"]
    with pytest.raises(InputError, match=r"presets of avx2: .*tune again"):
        presets.tuned(ISAS, {"avx2": {"gemv": {"speed": 1}}})


def test_every_shipped_preset_fits_a_variant() -> None:
    require("the build tools", x86.X86.can_build_here() is None)
    from bitcompile.targets.tir.x86 import ISAS

    names = {isa.name for isa in ISAS}
    for cpu, found in presets.read(presets.SHIPPED).items():
        assert found.keys() <= names, cpu
        presets.tuned(ISAS, found)
