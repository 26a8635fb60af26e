"""The cost model of the ARM kernels: whose model it is, and what it says of the decode loop."""

from __future__ import annotations

import dataclasses

import pytest

from bitcompile.errors import ToolchainError
from tests.bench import arm_model
from tests.tools import require


@pytest.fixture(autouse=True)
def _llvm() -> None:
    try:
        arm_model.tool("llvm-mca")
    except ToolchainError:
        require("llvm-mca of LLVM 16 or newer", False)


def core(name: str) -> arm_model.Core:
    return next(c for c in arm_model.CORES if c.name.startswith(name))


@pytest.mark.parametrize("isa", ["neon", "dotprod", "i8mm"])
def test_the_decode_loop_is_one_activation_row_without_spills(isa: str) -> None:
    loop = arm_model.decode_loop(isa)
    assert loop.macs == loop.weights >= 256
    assert not any("[sp" in line for line in loop.body)


def test_decoding_keeps_an_a76_within_six_cycles_per_64_weights() -> None:
    assert arm_model.cycles_per_64_weights(core("Cortex-A76"), "dotprod") <= 6


def test_another_cores_model_is_refused() -> None:
    """LLVM has an A76 by name, with the scheduling model of the A57."""
    alias = dataclasses.replace(core("Cortex-A76"), model="cortex-a76")
    with pytest.raises(ToolchainError, match="no model of cortex-a76"):
        arm_model.cycles_per_64_weights(alias, "dotprod")
