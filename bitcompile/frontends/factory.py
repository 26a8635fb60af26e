"""``MODULE:FACTORY``: a torch module that a function of the user makes.

``MODULE`` is an importable name (the working directory counts) or a path to a ``.py`` file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitcompile.errors import BitcompileError, InputError

_FORM = re.compile(r"(?P<module>[\w.]+|.+\.py):(?P<factory>[A-Za-z_]\w*)")
EXPECTED = "(module, example_inputs) or (module, example_inputs, dynamic_shapes)"


@dataclass(frozen=True)
class Made:
    """What a factory returned."""

    module: Any
    example_inputs: Any
    dynamic_shapes: Any = None


def is_reference(model: str) -> bool:
    """Whether ``model`` has the form ``MODULE:FACTORY``."""
    return _FORM.fullmatch(model) is not None


def make(reference: str) -> Made:
    """Import MODULE and call FACTORY; raises InputError if that does not give a torch module."""
    match = _FORM.fullmatch(reference)
    if match is None:
        raise InputError(f"{reference!r} is not of the form MODULE:FACTORY")
    factory = _factory(match["module"], match["factory"])
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InputError(f"{reference} failed: {_line(error)}") from error
    parts = made if isinstance(made, tuple | list) else (made,)
    if len(parts) not in (2, 3) or not is_module(parts[0]):
        given = ", ".join(type(part).__name__ for part in parts)
        raise InputError(f"{reference} returned ({given}): it must return {EXPECTED}")
    return Made(*parts)


def is_module(value: Any) -> bool:
    """Whether ``value`` is a torch module, without importing torch: there is none before that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _factory(module: str, name: str) -> Any:
    try:
        imported = _import_file(Path(module)) if module.endswith(".py") else _import(module)
    except BitcompileError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InputError(
            f"cannot import {module}: {_line(error)}; it must import in this environment"
        ) from error
    factory = getattr(imported, name, None)
    if factory is None:
        raise InputError(f"{module} has no {name!r}: give MODULE:FACTORY, a function in it")
    if is_module(factory) or not callable(factory):
        raise InputError(
            f"{module}:{name} is {type(factory).__name__}, not a function: "
            f"let a function without arguments return {EXPECTED}"
        )
    return factory


def _import(module: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    return importlib.import_module(module)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"no file {path}: give MODULE:FACTORY, an importable module or a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
