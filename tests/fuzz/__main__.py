"""The command line: ``python -m tests.fuzz --target gguf --cases 100000``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.engine import campaign, outcome, search
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Exit code: 0 without findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="run this one case")
    parser.add_argument("--work", type=Path, help="where cases of findings are kept")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.target, options.cases, options.seed, options.worker)
    work = options.work or Path(tempfile.mkdtemp(prefix="bitcompile-fuzz-"))
    if options.replay:
        prepared = TARGETS[options.target].prepare(work)
        print(outcome(prepared, options.replay.read_bytes(), work))
        return 0
    findings = 0
    for name in TARGETS if options.target == "all" else [options.target]:
        start = time.monotonic()
        found = campaign(name, options.cases, options.seed, work)
        print(f"{name}: {options.cases} cases, {found} findings, {time.monotonic() - start:.0f} s")
        findings += found
    return min(findings, 1)


def worker(name: str, cases: int, seed: int, folder: Path) -> int:
    """One process of a campaign."""
    result = search(TARGETS[name], cases, seed, folder)
    total, kinds = sum(result.outcomes.values()), len(result.outcomes)
    common = ", ".join(f"{count} {text!r}" for text, count in result.outcomes.most_common(4))
    print(f"{name} seed {seed}: {total} cases, {kinds} outcomes: {common}", flush=True)
    for finding in result.findings:
        print(finding, flush=True)
    return min(len(result.findings), 1)


if __name__ == "__main__":
    sys.exit(main())
