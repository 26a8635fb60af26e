"""Some fuzz cases of every target, the cases that once found something, and the harness itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from bitcompile.errors import BitcompileError, InputError
from tests.fuzz.engine import CORPUS, Finding, Prepared, outcome
from tests.fuzz.targets import TARGETS
from tests.single_node import CHOSEN, plugin

CASES = 200
SECONDS = 6.0
"""Most time that the cases of one target take: a slow machine runs fewer of them."""


@pytest.fixture(scope="module", params=TARGETS)
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Prepared, Path]]:
    work = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(CHOSEN, str(plugin()))
        yield request.param, TARGETS[request.param].prepare(work), work


def test_drawn_cases_find_nothing(prepared: tuple[str, Prepared, Path]) -> None:
    _, target, work = prepared
    until, outcomes = time.monotonic() + SECONDS, set()
    for number in range(CASES):
        outcomes.add(outcome(target, target.draw(Random(number)), work))
        if time.monotonic() > until and number > 10:
            break
    assert len(outcomes) > 1  # some are refused


def test_old_findings_stay_repaired(prepared: tuple[str, Prepared, Path]) -> None:
    name, target, work = prepared
    for case in sorted((CORPUS / name).glob("*")):
        outcome(target, case.read_bytes(), work)


def test_cases_are_numbered(prepared: tuple[str, Prepared, Path]) -> None:
    _, target, _ = prepared
    assert target.draw(Random(5)) == target.draw(Random(5))
    assert len({target.draw(Random(number)) for number in range(50)}) > 25


def leave_a_file(_: bytes) -> None:
    import tempfile

    Path(tempfile.mkdtemp()).joinpath("x").touch()


def log(_: bytes) -> None:
    import logging

    logging.getLogger("somebody").warning("beside")


def fail(error: Exception) -> None:
    raise error


FINDINGS = {
    "traceback": lambda _: fail(KeyError("x")),
    "untyped": lambda _: fail(BitcompileError("internal")),
    "file": leave_a_file,
    "noise": log,
}


def test_names_in_damaged_files_keep_an_error_on_one_line() -> None:
    assert str(InputError("no \x00\n\x1c\u2028é: do")) == r"no \x00\n\x1c\u2028é: do"


@pytest.mark.parametrize("kind", FINDINGS)
def test_what_must_not_happen_is_found(kind: str, tmp_path: Path) -> None:
    target = Prepared(lambda _: b"", FINDINGS[kind])
    with pytest.raises(Finding):
        outcome(target, b"", tmp_path)
    assert outcome(Prepared(lambda _: b"", lambda _: None), b"", tmp_path) == "accepted"
    refusing = Prepared(lambda _: b"", lambda _: fail(InputError("a b: do c")))
    assert outcome(refusing, b"", tmp_path) == "b: do c"
