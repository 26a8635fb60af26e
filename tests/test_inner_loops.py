"""The loops where x86 kernels spend their time, as LLVM wrote them: sums stay in registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitcompile.targets.tir.gemm import gemm
from bitcompile.targets.tir.gemv import gemv
from bitcompile.targets.tir.head import head
from bitcompile.targets.tir.isa import Isa
from bitcompile.targets.tir.objects import compile_object
from bitcompile.targets.tir.x86 import AVX512_VBMI, AVX512_VNNI, AVX_VNNI

DOT = re.compile(r"\t(\{vex\}\t)?vpdpbusd")
ON_STACK = re.compile(r"\t(\{vex\}\t)?v\w+.*\(%rsp\)")


def loops(function: Any, isa: Isa, folder: Path) -> list[list[str]]:
    """The innermost loops with products, as lines of assembly."""
    text = compile_object({"f": function}, isa.target, folder / "f.o").inspect_source("s")
    lines = [x for x in text.splitlines() if re.match(r"\.LBB|\t[\w{]", x)]
    label = {x.rstrip(":"): i for i, x in enumerate(lines) if x.startswith(".LBB")}
    found = []
    for i, line in enumerate(lines):
        jump = re.match(r"\tj\w+\t(\.LBB\S+)", line)
        first = label[jump[1]] if jump else i
        body = lines[first:i]
        # A loop around another has its label, or its jump, inside.
        if any(map(DOT.match, body)) and not any(x.startswith("\tj") for x in body):
            found.append(body)
    return found


@pytest.mark.parametrize(
    ("isa", "make", "products"),
    [
        (AVX512_VNNI, lambda isa: gemm(isa, "f"), 24),
        (AVX512_VBMI, lambda isa: gemm(isa, "f", False, "t5"), 24),
        (AVX_VNNI, lambda isa: gemm(isa, "f"), 12),
        (AVX512_VNNI, lambda isa: gemv(isa, "f"), 16),
        (AVX512_VBMI, lambda isa: gemv(isa, "f", False, "t5"), 20),
        (AVX512_VNNI, lambda isa: head(isa, "f", 8), 16),
        (AVX512_VNNI, lambda isa: head(isa, "f", 4), 32),
        (AVX_VNNI, lambda isa: head(isa, "f", 8), 8),
    ],
    ids=lambda value: value.name if isinstance(value, Isa) else None,
)
def test_no_vector_is_spilled(
    isa: Isa, make: Callable[[Isa], Any], products: int, tmp_path: Path
) -> None:
    """``products``: of the largest register tile, times the loop's unrolling."""
    widest = max(loops(make(isa), isa, tmp_path), key=lambda x: sum(map(bool, map(DOT.match, x))))
    count = sum(map(bool, map(DOT.match, widest)))
    assert count % products == 0, widest
    assert not [line for line in widest if ON_STACK.match(line)]
