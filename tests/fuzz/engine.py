"""Running cases: what counts as a finding, and how a search is split over processes.

A finding is anything but success or one line of a typed error with an exit code of its own: a
traceback, a crash, a hang, output of native code, a file left behind.
"""

from __future__ import annotations

import collections
import faulthandler
import logging
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bitcompile.errors import BitcompileError

HANG_S = 60
"""Seconds after which a case is a hang."""
CHUNK = 25_000
"""Cases of a process: what native code leaks or corrupts ends with it."""
LAST = "last-case"
CORPUS = Path(__file__).parent / "corpus"


class Stopped(BitcompileError):  # noqa: N818 nothing went wrong
    """Raised by a target where everything that reads input is done."""


class Finding(Exception):  # noqa: N818 it is the result, not an error of ours
    """What must not happen."""


@dataclass(frozen=True)
class Prepared:
    """A target with its valid inputs made."""

    draw: Callable[[Random], bytes]
    """Draw a case."""
    check: Callable[[bytes], None]
    """Feed one case; raises BitcompileError if it is refused."""


@dataclass(frozen=True)
class Target:
    """One kind of input. ``prepare`` gets a folder to keep valid inputs in."""

    name: str
    prepare: Callable[[Path], Prepared]


@contextmanager
def listening() -> Iterator[list[str]]:
    """What packages log in the block: a terminal would show it beside our line."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)


def outcome(prepared: Prepared, case: bytes, work: Path) -> str:
    """``accepted``, or the first words of a refusal; raises Finding."""
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        with listening() as said:
            result = _fed(prepared, case)
    finally:
        faulthandler.cancel_dump_traceback_later()
        tempfile.tempdir = None
    if said:
        raise Finding(f"a line beside the error: {said[0]}")
    left = sorted(path.name for path in temporary.iterdir())
    if left:
        shutil.rmtree(temporary)
        raise Finding(f"files left behind: {left}")
    return result


def _fed(prepared: Prepared, case: bytes) -> str:
    try:
        prepared.check(case)
    except Stopped:
        return "accepted"
    except BitcompileError as error:
        text = str(error)
        if error.exit_code == BitcompileError.exit_code or len(text.splitlines()) != 1:
            raise Finding(
                f"{type(error).__name__}, not one line of a typed error: {text!r}"
            ) from error
        return " ".join(text.split()[-3:])
    except Exception as error:
        raise Finding(f"traceback: {type(error).__name__}: {error}") from error
    return "accepted"


@dataclass
class Result:
    """What a search met."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)


def search(target: Target, cases: int, start: int, work: Path) -> Result:
    """Run cases ``start`` to ``start + cases``; those of findings are kept in ``work``.

    The case at work is in :data:`LAST` there, for when the process dies of it.
    """
    work.mkdir(parents=True, exist_ok=True)
    prepared = target.prepare(work)
    result = Result()
    for number in range(start, start + cases):
        case = prepared.draw(Random(number))
        (work / LAST).write_bytes(case)
        try:
            result.outcomes[outcome(prepared, case, work)] += 1
        except Finding as finding:
            (work / f"{number}.case").write_bytes(case)
            result.findings.append(_described(number, finding))
    (work / LAST).unlink()
    return result


def _described(number: int, finding: Finding) -> str:
    """The finding and where it comes from."""
    frames = traceback.extract_tb((finding.__cause__ or finding).__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"case {number}: {finding} ({places})"


def campaign(target: str, cases: int, start: int, work: Path) -> int:
    """Search in processes of :data:`CHUNK` cases; the number of findings, kept in ``work``."""
    findings = 0
    for first in range(start, start + cases, CHUNK):
        count = min(CHUNK, start + cases - first)
        folder = work / f"{target}-{first}"
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--target", target]
        command += ["--cases", str(count), "--seed", str(first), "--worker", str(folder)]
        done = subprocess.run(command, check=False)
        if (folder / LAST).exists():  # it died
            print(f"{target}: exit {done.returncode}", flush=True)
            (folder / LAST).rename(folder / "crash.case")
        for case in sorted(folder.glob("*.case")):
            findings += 1
            print(f"{target}: kept {shutil.copy(case, work / f'{target}-{case.name}')}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return findings
