"""ONNX files of other exporters to the portable form.

The file is checked, brought to opset 23, and its ternary layers, written as fake-quantised products
of standard operators, become ``bitcompile::BitLinear`` nodes. What is not recognised stays as it
is, with a reason; files that hold our own operators already keep them. Weights that stay are read
from the file's external data when the artifact is written.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from bitcompile.custom_ops import OPS
from bitcompile.errors import BitcompileError, InputError
from bitcompile.frontends.surroundings import require_packages
from bitcompile.model import Imported
from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET, VERSION
from bitcompile.packing import layout
from bitcompile.passing import Record, ternary_weights

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_OPSET = 17
"""Oldest ONNX opset that is read; the newest is the one we write."""
SMALL = 1 << 16
"""Bytes of external data that are read at once; larger tensors stay in their file."""
LARGEST_SIZE = (1 << 31) - 1
"""Size of a dimension: our kernels count in int32."""
LARGEST_INTEGER_SIZE = 1 << 20
"""The same of a value of integers: shape inference follows those of vectors one by one."""
VECTORS = {"bias": "N", "gamma": "K", "gamma_in": "K", "gamma_sub": "F"}
"""Inputs of our operators that are vectors, or rank-0 zeros, to the attribute of their length."""
Progress = Callable[[str], None]


def load(path: str, progress: Progress | None = None) -> Imported:
    """Convert the ``.onnx`` file ``path`` to portable ONNX; external data lies beside it.

    ``progress`` is called with a short text at the start of each phase. ``records`` of the result
    tell what was recognised and what was refused. Raises InputError for a file that is damaged, of
    an opset outside 17..23, or without any ternary layer; ToolchainError if the packages of
    ``bitcompile[build]`` are missing.
    """
    imported = read(path, progress)
    if not ternary_weights(imported.graph):
        (refusals,) = [record.refusals for record in imported.records]
        why = f" ({refusals[0].where}: {refusals[0].reason})" if refusals else ""
        raise InputError(
            f"{imported.source} has no ternary layer that could be recognised{why}: "
            "`bitcompile inspect` lists what was looked at"
        )
    return imported


def read(path: str, progress: Progress | None = None) -> Imported:
    """:func:`load`, also of a file without ternary layers."""
    report = progress or (lambda _: None)
    require_packages("onnx", "onnx_ir", "onnxscript")
    file = Path(path)
    report("reading the graph")
    model = _parse(file)
    _check_version(model, file.name)
    _check_tensors(model, file)
    _load_small(model)
    _drop_own_functions(model)
    report("checking the graph")
    convert(model, file.name)
    _check_own_nodes(model)
    report("recognising ternary layers")
    return Imported(model, file.name, records=(recognize(model, file.name),))


def recognize(model: ir.Model, name: str) -> Record:
    """Turn ternary layers of ``model`` into BitLinear nodes, in place; what was done and refused.

    Raises InputError if a constant of the model cannot be read.
    """
    from onnx_ir.passes import common

    from bitcompile.passes.fold_constants import FoldConstants
    from bitcompile.passes.recognize_bit_linear import RecognizeBitLinear

    with _refusing(name, "its constants"):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        FoldConstants().apply(model)
        record = RecognizeBitLinear().apply(model)
        common.RemoveUnusedNodesPass()(model)
    return record


@contextlib.contextmanager
def _refusing(name: str, what: str) -> Iterator[None]:
    """Turn whatever the ONNX packages raise, of which most have no common base, into InputError."""
    try:
        yield
    except BitcompileError:
        raise
    except (Exception, RecursionError) as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        text = " ".join(" ".join(lines[:3]).split())[:300]
        raise InputError(f"{name}: {what} cannot be used ({text}): export it again") from None


def _parse(file: Path) -> ir.Model:
    import onnx_ir as ir

    if not file.is_file():
        raise InputError(f"no file {file}: check the name")
    with _refusing(file.name, "the file"), notes("onnx_ir"):
        model = ir.load(file)
    if not model.graph.outputs:
        raise InputError(f"{file.name} holds no graph with outputs: it is not an ONNX model")
    return model


def _check_version(model: ir.Model, name: str) -> None:
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:  # another spelling of the default domain
        imports[""] = imports.pop("ai.onnx")
    version = imports.get("")
    if version is None or not OLDEST_OPSET <= version <= ONNX_OPSET:
        raise InputError(
            f"{name} is of ONNX opset {version}; supported are {OLDEST_OPSET} to {ONNX_OPSET}: "
            f"export it with opset_version={ONNX_OPSET}"
        )
    own = imports.get(DOMAIN, VERSION)
    if own != VERSION:
        raise InputError(f"{name} uses operators {DOMAIN} version {own}; this is version {VERSION}")


# --- tensors ------------------------------------------------------------------------------------


def _check_tensors(model: ir.Model, file: Path) -> None:
    """Raise InputError unless every tensor has the bytes its type and shape ask for."""
    with _refusing(file.name, "its tensors"):
        for tensor in _tensors(model):
            _check_tensor(tensor, file)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    import onnx_ir as ir

    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.graph.subgraphs()]
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.as_tensors()


def _check_tensor(tensor: ir.TensorProtocol, file: Path) -> None:
    import onnx_ir as ir

    wanted, dims = None, list(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        return
    if min(dims, default=0) >= 0:
        wanted = tensor.nbytes
    if isinstance(tensor, ir.ExternalTensor):
        held = _external_bytes(tensor, file, wanted)
    elif isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
        held = len(tensor.raw.raw_data)
    else:
        held = int(tensor.numpy().size and tensor.nbytes)  # raises if they do not agree
    if held != wanted:
        raise InputError(
            f"{file.name}: tensor {tensor.name!r} of shape {dims} holds {held} bytes, not "
            f"{wanted}: the file is damaged, export it again"
        )


def _external_bytes(tensor: ir.ExternalTensor, file: Path, wanted: int | None) -> int:
    """Bytes of an external tensor; raises InputError if its file does not hold them."""
    location = str(tensor.location)
    if any(path(location).is_absolute() for path in (PurePosixPath, PureWindowsPath)) or (
        ".." in PureWindowsPath(location).parts
    ):
        raise InputError(
            f"{file.name}: data of {tensor.name!r} is at {location!r}, outside the model's folder: "
            "export it again with its data beside it"
        )
    data = file.parent / location
    if not data.is_file():
        raise InputError(f"{file.name}: its data file {location!r} is missing: put it beside it")
    offset = tensor.offset or 0
    length = tensor.length if tensor.length is not None else wanted or 0
    if offset < 0 or length < 0 or offset + length > data.stat().st_size:
        raise InputError(f"{location} ends before {tensor.name!r}: copy the whole file again")
    return length


def _load_small(model: ir.Model) -> None:
    """Bring small tensors into memory: the ONNX checker looks for files it does not know of."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL:
            value.const_value = ir.Tensor(
                tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
            )


# --- the graph ----------------------------------------------------------------------------------


def _drop_own_functions(model: ir.Model) -> None:
    """Remove the functions of our own operators: a build attaches those of its layout."""
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]


def convert(model: ir.Model, name: str) -> None:
    """Check ``model`` and bring it, in place, to the opset and IR version that passes work on.

    Raises InputError, naming what blocks it, if the checker or the converter refuses the graph.
    """
    from onnx_ir.passes import common
    from onnxscript.version_converter import ConvertVersionPass

    model.graph.name = model.graph.name or "model"  # the checker insists on one
    with _refusing(name, "the graph"):
        common.TopologicalSortPass()(model)
        common.CheckerPass(full_check=True)(model)
    before = model.graph.opset_imports[""]
    what = f"conversion from opset {before} to {ONNX_OPSET}"
    with _refusing(name, what), notes("onnxscript.version_converter") as said:
        ConvertVersionPass(ONNX_OPSET, fallback=True)(model)
    blocked = [text for text in said if "fallback is enabled" not in text]
    if blocked or model.graph.opset_imports.get("") != ONNX_OPSET:
        reason = " ".join((blocked or ["the converter gives no reason"])[0].split())[:300]
        raise InputError(
            f"{name}: {what} fails ({reason}): export it with opset_version={ONNX_OPSET}"
        )
    model.ir_version = IR_VERSION
    _check_sizes(model, name)
    with _refusing(name, "shapes"), notes("onnx_ir"):
        common.ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)


def _check_sizes(model: ir.Model, name: str) -> None:
    """Raise InputError for a declared size that shape inference would never come through."""
    for graph in [model.graph, *model.graph.subgraphs()]:
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            integers = value.dtype is not None and value.dtype.name in ("INT32", "INT64")
            limit = LARGEST_INTEGER_SIZE if integers else LARGEST_SIZE
            sizes = [size for size in value.shape or () if isinstance(size, int)]
            if max(sizes, default=0) > limit:
                raise InputError(
                    f"{name}: {value.name!r} is declared of {max(sizes)} elements along one axis: "
                    "damaged, export it again"
                )


@contextlib.contextmanager
def notes(logger: str) -> Iterator[list[str]]:
    """What a package logs as a warning, kept off the terminal: it does not raise for all of it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger(logger)
    propagate = source.propagate
    source.addHandler(handler)
    source.propagate = False
    try:
        yield messages
    finally:
        source.removeHandler(handler)
        source.propagate = propagate


def _check_own_nodes(model: ir.Model) -> None:
    """Raise InputError if a node of our domain is not what its operator says."""
    for graph in model.graph.subgraphs():
        if any(node.domain == DOMAIN for node in graph):
            raise InputError(f"{DOMAIN} operators inside If, Loop or Scan are not supported")
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        op = OPS.get(node.op_type)
        if op is None:
            raise InputError(f"{node.name}: {DOMAIN} has no operator {node.op_type!r}")
        attributes = op.complete({name: a.value for name, a in node.attributes.items()})
        inputs = op.named(node.inputs)
        for name in VECTORS.keys() & inputs.keys():
            value, length = inputs[name], attributes[VECTORS[name]]
            tensor = value.const_value if value is not None else None
            if tensor is None or tensor.shape.numpy() == (length,):
                continue
            if tensor.shape.numpy() != () or tensor.numpy() != 0:
                raise InputError(
                    f"{node.name}: {name} {value.name!r} is {list(tensor.shape.numpy())}, neither "
                    f"[{length}] nor a zero that says it is absent: export it again"
                )
        for weight in op.weights:
            with _refusing(str(node.name), "its sizes"):
                N, K = weight.shape(attributes)
                stored, size = layout(str(attributes["layout"])), int(attributes["group_size"])
                shapes = stored.shape(N, K), stored.scale_shape(N, K, size)
            for name, shape in zip((weight.data, weight.scale), shapes, strict=True):
                value = inputs[name]
                tensor = value.const_value if value is not None else None
                if tensor is not None and tuple(tensor.shape.numpy()) != shape:
                    raise InputError(
                        f"{node.name}: {name} {value.name!r} is {list(tensor.shape.numpy())}; "
                        f"layout {stored.id} of [{N}, {K}] is {list(shape)}: export it again"
                    )
