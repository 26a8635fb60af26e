"""Every kernel variant against golden vectors and a random sweep, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from bitcompile.packing import CPU_TILE, PackedTernary
from tests import kernels
from tests.golden import make
from tests.kernels import NATIVE, Machine, emulated

A53, A76, MAX = "cortex-a53", "cortex-a76", "max"
VARIANTS = {
    "portable": NATIVE,
    "avx2": NATIVE,
    "avx-vnni": NATIVE,
    "avx512-vnni": NATIVE,
    "avx512-vbmi": NATIVE,
    "neon": emulated(A53),
    "dotprod": emulated(A76),
    "i8mm": emulated(MAX),
}
"""Variant to the least CPU at hand that runs it."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[Machine, str]:
    machine, isa = VARIANTS[request.param], request.param
    if machine.picks(isa) != isa:
        assert machine is NATIVE, machine.picks(isa)
        pytest.skip(f"this CPU has no {isa}")
    return machine, isa


def test_the_reference_still_gives_the_golden_vectors() -> None:
    golden = make.load()
    assert make.FILE.stat().st_size < 1_000_000
    for name, (_, _, _, group_size) in make.LINEAR.items():
        a = golden[name]
        packed = PackedTernary.pack(a["weight"], a["scale"], CPU_TILE, group_size)
        np.testing.assert_array_equal(packed.data, a["packed"])
        _same(a, kernels.linear_reference(a, group_size, make.EPS))
    _same(golden["gates"], kernels.glu_reference(golden["gates"]["both"]))
    for name, (_, _, _, bits) in make.HEADS.items():
        a = golden[name]
        _same(a, kernels.head_reference(a["x"], a["codes"], a["table_scale"], bits))


def _same(golden: kernels.Arrays, made: kernels.Arrays) -> None:
    for name, value in made.items():
        np.testing.assert_array_equal(golden[name], value, err_msg=name)


def test_golden_vectors(variant: tuple[Machine, str]) -> None:
    """Quantised values, accumulators and floats of every operator; no float needs a tolerance."""
    golden = make.load()
    cases = [
        kernels.linear_case(golden[name], group_size, make.EPS, variant[0].tiles)
        for name, (_, _, _, group_size) in make.LINEAR.items()
    ]
    kernels.check(*variant, [*cases, kernels.glu_case(golden["gates"])])
    for name, (_, _, _, bits) in make.HEADS.items():
        kernels.check_head(*variant, golden[name], bits)


def test_random_shapes_with_tails(variant: tuple[Machine, str]) -> None:
    assert kernels.check(*variant, list(kernels.sweep(1, 30, variant[0].tiles))) > 100_000


@pytest.mark.parametrize("block", [128, 384])
@pytest.mark.parametrize("bits", [8, 4])
def test_heads_of_any_number_of_rows(variant: tuple[Machine, str], bits: int, block: int) -> None:
    """Every way to divide activation rows and table rows into register tiles."""
    rng = np.random.default_rng(bits)
    for M in range(1, 10):
        a = kernels.head_inputs(rng, 18 + M % 2, 500, M, bits, block)
        kernels.check_head(*variant, a, bits)


@pytest.mark.parametrize(("cpu", "isa"), [(A53, "neon"), (A76, "dotprod"), (MAX, "i8mm")])
def test_the_best_variant_of_a_cpu_is_picked(cpu: str, isa: str) -> None:
    assert emulated(cpu).picks() == isa


@pytest.mark.parametrize(
    ("cpu", "isa", "runs"),
    [(A53, "dotprod", "neon"), (A53, "i8mm", "neon"), (A76, "i8mm", "dotprod, neon"),
     (MAX, "avx2", "i8mm, dotprod, neon")],
)  # fmt: skip
def test_a_variant_that_the_cpu_lacks_is_refused(cpu: str, isa: str, runs: str) -> None:
    reason = emulated(cpu).picks(isa)
    assert reason == (
        f"bitcompile: BITCOMPILE_ISA={isa} is not a variant that this plugin has and this CPU "
        f"runs; choose one of: {runs}"
    )


def test_older_variants_run_on_newer_cpus() -> None:
    cases = list(kernels.sweep(seed=2, count=4))
    for isa in ("neon", "dotprod"):
        assert kernels.check(emulated(MAX), isa, cases)
