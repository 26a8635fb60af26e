"""Is an artifact exact on a phone, and what do its operators cost there?

    bitcompile build MODEL -o OUT --target mali        # or adreno, opencl, android
    python -m tests.device.phone OUT > report.md

Needs ``adb`` and a phone that it sees, with USB debugging on. Everything goes to a folder of its
own in ``/data/local/tmp`` and runs in adb's shell; nothing is installed, and the folder is removed
at the end. The report is Markdown, to be pasted as it is: it names the phone's model and system,
never its serial number. Exit code 1: a value differs from the reference.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitcompile import calibration
from bitcompile.artifact import Artifact
from bitcompile.errors import BitcompileError, ToolchainError, UsageError
from bitcompile.targets.tir.linking import ANDROID, LINUX
from tests.device import conformance_program, vectors

FOLDER = "/data/local/tmp/bitcompile"
PROPERTIES = {
    "phone": ("ro.product.manufacturer", "ro.product.model"),
    "chip": ("ro.soc.manufacturer", "ro.soc.model", "ro.board.platform"),
    "system": ("ro.build.version.release", "ro.build.version.security_patch"),
}
"""What the report says of a phone, and the Android properties that hold it."""


@dataclass(frozen=True)
class Phone:
    """A device behind ``adb``."""

    adb: str
    serial: str | None

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``adb``; raises ToolchainError if it is not there."""
        which = ["-s", self.serial] if self.serial else []
        try:
            return subprocess.run(
                [self.adb, *which, *arguments], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ToolchainError(f"cannot run {self.adb}: {error.strerror}") from None

    def must(self, *arguments: str) -> str:
        """Its output; raises ToolchainError with its complaint if it fails."""
        done = self.call(*arguments)
        if done.returncode:
            complaint = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise ToolchainError(f"adb {arguments[0]} failed: {complaint[-1]}")
        return done.stdout

    def describe(self) -> list[str]:
        """Lines about the phone."""
        lines = []
        for what, names in PROPERTIES.items():
            values = [self.must("shell", f"getprop {name}").strip() for name in names]
            lines.append(f"- {what}: {' '.join(value for value in values if value) or 'unknown'}")
        return lines


def collect(artifact: Artifact, folder: Path) -> None:
    """Everything that runs on the phone, in ``folder``."""
    host = str(artifact.manifest["target"]["host"])
    system = ANDROID if "android" in host else LINUX
    conformance_program(system, host, folder / "conformance")
    vectors.write(folder / "vectors.bin")
    for name in (artifact.manifest["library"], calibration.PROGRAM, calibration.FILE):
        if (artifact.path / name).exists():
            (folder / name).write_bytes((artifact.path / name).read_bytes())


def conformance(phone: Phone, artifact: Artifact) -> tuple[str, int]:
    """The table of the variants, and the exit code."""
    isas = [shlex.quote(isa) for isa in artifact.manifest["target"]["isas"]]
    library = shlex.quote(str(artifact.manifest["library"]))
    words = f"./conformance ./{library} vectors.bin {' '.join(isas)}"
    done = phone.call("shell", f"cd {FOLDER} && BITCOMPILE_VERBOSE=1 BITCOMPILE_CACHE=. {words}")
    notes = "".join(f"- {line}\n" for line in done.stderr.splitlines())
    return f"{done.stdout}\n{notes}", done.returncode


def calibrate(phone: Phone, options: Sequence[str]) -> str:
    """The table of costs; needs an artifact with a calibrator."""
    words = " ".join(shlex.quote(option) for option in options)
    return phone.must("shell", f"cd {FOLDER} && BITCOMPILE_CACHE=. ./calibrate {words} .")


def report(phone: Phone, artifact: Artifact, options: Sequence[str]) -> int:
    """Print the report; returns the exit code."""
    target = artifact.manifest["target"]
    print(f"### bitcompile {artifact.manifest['bitcompile']} for {target['name']}\n")
    print("\n".join(phone.describe()), "\n\nGolden vectors, every bit compared:\n", sep="")
    phone.must("shell", f"rm -rf {FOLDER} && mkdir -p {FOLDER}")
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            collect(artifact, folder)
            files = sorted(str(path) for path in folder.iterdir())
            phone.must("push", *files, f"{FOLDER}/")
        phone.must("shell", f"cd {FOLDER} && chmod 755 *")
        table, code = conformance(phone, artifact)
        print(table)
        if code == 0 and (artifact.path / calibration.PROGRAM).exists():
            source = artifact.manifest["source"]
            print(f"The operators of {source}, weights of their sizes:\n")
            print(calibrate(phone, options))
    finally:
        phone.call("shell", f"rm -rf {FOLDER}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--adb", default="adb", help="the program")
    parser.add_argument("--serial", help="the phone, if there are several")
    parser.add_argument("--threads", default="4", help="threads of the CPU's kernels")
    parser.add_argument("--prompt", default="256", help="tokens of the prompt")
    parser.add_argument("--seconds", default="0.2", help="seconds of a measurement")
    chosen = parser.parse_args(arguments)
    options = ["-t", chosen.threads, "-p", chosen.prompt, "-s", chosen.seconds]
    try:
        artifact = Artifact.open(chosen.artifact)
        if not str(artifact.manifest["library"]).endswith(".so"):
            raise UsageError(f"{chosen.artifact} has no shared library to push: use another target")
        return report(Phone(chosen.adb, chosen.serial), artifact, options)
    except BitcompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
