"""Every error a user can meet: typed, one line, naming the remedy; each owns its exit code."""

from __future__ import annotations


class BitcompileError(Exception):
    """Base of all errors raised on purpose.

    ``str(error)`` is one line that names what is wrong and what to do about it.
    """

    exit_code = 5


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
