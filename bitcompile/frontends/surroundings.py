"""What a conversion asks of the process around it: its packages, and a quiet terminal."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

from bitcompile.errors import ToolchainError


def require_packages(*names: str) -> None:
    """Raise ToolchainError unless all of the modules ``names`` can be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ToolchainError(
                f'{error.name} is not installed: pip install "bitcompile[build]"'
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notes of torch and transformers off the terminal: what matters becomes our error."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
