"""The runner: records, dumps, and what it does not let a pass do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from bitcompile.errors import BitcompileError, ToolchainError, UsageError
from bitcompile.opset import DOMAIN
from bitcompile.passing import Pass, Record, Refusal, listing, run, ternary_weights
from tests.graphs import Build


def model() -> ir.Model:
    b = Build()
    y = b.linear(b.input("x", ["b", 50]), 33, "lin")
    return b.model(b.op("Neg", y, name="y"))


def broken(change: Callable[[ir.Model], None]) -> Pass:
    class Broken(Pass):
        name = "broken"

        def apply(self, model: ir.Model) -> Record:
            change(model)
            return Record(self.name, 1, (Refusal("here", "there was 1"),))

    return Broken()


def _rename(m: ir.Model) -> None:
    m.graph.outputs[0].name = "other"


def _lose(m: ir.Model) -> None:
    m.graph[0].attributes["N"] = ir.AttrInt64("N", 32)


def _dangle(m: ir.Model) -> None:
    m.graph[1].replace_input_with(0, ir.Value(name="nowhere"))


def _reorder(m: ir.Model) -> None:
    last = m.graph[1]
    m.graph.remove(last)
    m.graph.insert_before(m.graph[0], last)


def _forget(m: ir.Model) -> None:
    m.graph.remove(m.graph[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "pass broken changed .*outputs=.*'y'.*'other'"),
        (_lose, "pass broken changed .*ternary=1650.*ternary=1600"),
        (_dangle, "pass broken left 'nowhere' of node 'n_y' without an earlier producer"),
        (_reorder, "pass broken left 'lin_y' of node 'n_y' without an earlier producer"),
        (_forget, "pass broken left output 'y' without a producer"),
    ],
)
def test_a_pass_that_breaks_the_graph(change: Callable[[ir.Model], None], message: str) -> None:
    with pytest.raises(BitcompileError, match=message):
        run(model(), [broken(change)])


def test_records_and_dumps(tmp_path: Path) -> None:
    m = model()
    nothing = broken(lambda m: None)
    records = run(m, [nothing, nothing], tmp_path / "dump")
    assert [record.refusals[0].reason for record in records] == ["there was 1"] * 2
    run(m, [nothing], tmp_path / "dump", first=3)
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == ["00-start.txt", "01-broken.txt", "02-broken.txt", "03-broken.txt"]
    assert (tmp_path / "dump" / "03-broken.txt").read_text() == listing(m)


def test_dumps_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"cannot write .*file"):
        run(model(), [], tmp_path / "file")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ToolchainError, match="no space left"):
        run(model(), [], tmp_path / "dump")


def test_ternary_weights_of_every_operator() -> None:
    b = Build()
    x = b.input("x", ["b", 5])
    for op in ("BitLinear", "NormBitLinear", "BitGLU"):
        b.op(op, x, name=op, domain=DOMAIN, N=3, K=5, F=7, F2=14)
    assert ternary_weights(b.model()) == 15 + 15 + (2 * 7 * 5 + 3 * 7)


def test_importing_the_runner_is_cheap() -> None:
    code = "import sys, bitcompile.passing; print(sorted({'onnx', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
