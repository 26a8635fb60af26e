"""Front ends: what a model arrives as, to the portable form. :func:`load` chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile.errors import InputError, UsageError
from bitcompile.frontends import factory

if TYPE_CHECKING:
    from bitcompile.model import Imported

Progress = Callable[[str], None]


def load(
    model: Any,
    context: int | None = None,
    progress: Progress = lambda _: None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    i2s_order: str | None = None,
) -> Imported:
    """Convert ``model`` to the portable form.

    A torch module with ``example_inputs`` (see :func:`bitcompile.frontends.module.load`), a
    ``MODULE:FACTORY`` that makes both, a path to an ``.onnx`` or ``.gguf`` file, or a Hugging Face
    checkpoint: a directory or hub id. ``i2s_order``: the order of I2_S codes where a ``.gguf`` file
    cannot tell it. Raises UsageError for an option the model does not have, and what the front end
    raises.
    """
    if i2s_order is not None and not _is_gguf(model):
        raise UsageError("i2s_order belongs to .gguf files: leave it out")
    if factory.is_module(model):
        return _module(model, context, progress, example_inputs, dynamic_shapes)
    if not isinstance(model, str | Path):
        raise UsageError(
            f"the model is {type(model).__name__}: give a torch module, a checkpoint directory or "
            "hub id, an .onnx or .gguf file, or MODULE:FACTORY"
        )
    if example_inputs is not None or dynamic_shapes is not None:
        raise UsageError(
            "example_inputs and dynamic_shapes belong to torch modules: leave them out"
        )
    source = str(model)
    path = Path(source)
    if not path.exists() and factory.is_reference(source):
        progress("making the module")
        made = factory.make(source)
        return _module(made.module, context, progress, made.example_inputs, made.dynamic_shapes)
    if path.suffix in (".onnx", ".gguf") and not path.is_dir():
        return _file(path, context, progress, i2s_order)
    from bitcompile.frontends import huggingface

    return huggingface.load(source, context, progress)


def is_checkpoint(model: Any) -> bool:
    """Whether :func:`load` takes ``model`` for weights with a known architecture.

    Such a model's embedding and head are known, a module's or graph's are whatever it says.
    """
    if not isinstance(model, str | Path):
        return False
    path = Path(model)
    if path.suffix == ".onnx" and not path.is_dir():
        return False
    return path.exists() or not factory.is_reference(str(model))


def _module(
    module: Any, context: int | None, progress: Progress, example_inputs: Any, shapes: Any
) -> Imported:
    from bitcompile.frontends import module as front_end

    _refuse_context(context, "a torch module")
    if example_inputs is None:
        raise UsageError(
            "a torch module needs example_inputs: a tensor, or a tuple or dict of arguments"
        )
    return front_end.load(module, example_inputs, shapes, progress=progress)


def _is_gguf(model: Any) -> bool:
    return isinstance(model, str | Path) and Path(model).suffix == ".gguf"


def _file(path: Path, context: int | None, progress: Progress, i2s_order: str | None) -> Imported:
    if not path.is_file():
        raise InputError(f"no file {path}: check the name")
    if path.suffix == ".gguf":
        from bitcompile.frontends import gguf

        return gguf.load(str(path), context, progress, order=i2s_order)
    from bitcompile.frontends import foreign

    _refuse_context(context, "an .onnx file")
    return foreign.load(str(path), progress)


def _refuse_context(context: int | None, what: str) -> None:
    if context is not None:
        raise UsageError(f"{what} has no KV cache whose length could be chosen: leave context out")
