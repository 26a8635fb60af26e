"""Every error a user can meet: typed, one line, naming the remedy; each owns its exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a used-up quota and a limit on the size of files."""


class BitcompileError(Exception):
    """Base of all errors raised on purpose.

    ``str(error)`` is one line that names what is wrong and what to do about it. Control characters,
    as names in damaged files have them, are escaped.
    """

    exit_code = 5

    def __str__(self) -> str:
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__()
        )


class VerificationError(BitcompileError):
    """An artifact does not compute what its model computes."""

    exit_code = 1


class UsageError(BitcompileError):
    """Arguments that do not fit together, or an output that is in the way."""

    exit_code = 2


class InputError(BitcompileError):
    """A model, checkpoint, artifact or tensor file that cannot be used."""

    exit_code = 3


class ToolchainError(BitcompileError):
    """A package, compiler, target or CPU feature that is not available here."""

    exit_code = 4


def no_space(path: Path) -> ToolchainError:
    """The error of an output ``path`` that does not fit."""
    return ToolchainError(f"no space left for {path}: free some, or choose another output")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError of the block a ToolchainError (no space) or UsageError about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(path) from None
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; choose another output"
        ) from error
