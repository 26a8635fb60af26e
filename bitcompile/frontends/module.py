"""Any torch module with ternary layers to the portable form.

The layers :func:`bitcompile.nn.reader` knows become ``bitcompile::BitLinear`` nodes, an inner norm
an ``RMSNormalization`` before them; torch exports the rest. All of it is float32. Imported only
when a module is converted: torch takes seconds to import.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitcompile.custom_ops.bit_linear import BIT_LINEAR
from bitcompile.errors import BitcompileError, InputError, UsageError
from bitcompile.frontends.surroundings import quiet, require_packages
from bitcompile.model import Imported
from bitcompile.nn import TernaryWeights, reader
from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET, Attribute
from bitcompile.packing import PackedTernary

Progress = Callable[[str], None]
BATCH = "batch"
"""Name of a first dimension that nobody named."""
FIRST = torch.export.Dim.AUTO
"""Dynamic unless the module fixes it."""


class BitLinearNode(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A ternary layer that exports as one node; ``called`` gathers the names of those that do."""

    def __init__(
        self, name: str, weights: TernaryWeights, absent: nn.Buffer, called: set[str]
    ) -> None:
        super().__init__()
        packed = PackedTernary.pack(
            _integers(weights.weight), _floats(weights.scale), group_size=weights.group_size
        )
        self.N, self.K = packed.shape
        self.attributes: dict[str, Attribute] = {
            "layout": packed.layout.id,
            "group_size": packed.group_size,
        }
        self.weight = nn.Buffer(torch.from_numpy(packed.data))
        self.weight_scale = nn.Buffer(torch.from_numpy(packed.scale))
        self.bias = absent if weights.bias is None else _vector("bias", weights.bias, self.N)
        self.absent = absent
        self.gamma = None if weights.gamma is None else _vector("gamma", weights.gamma, self.K)
        self.eps = float(weights.eps)
        self._name, self._called = name, called

    def forward(self, x: torch.Tensor) -> Any:
        """``[..., K]`` to float32 ``[..., N]``: a node while exporting, else zeros."""
        if int(x.shape[-1]) != self.K:  # int: torch then fixes this dimension
            raise ValueError(f"{self._name} takes [..., {self.K}], not {list(x.shape)}")
        self._called.add(self._name)
        x = x.float()
        if self.gamma is not None:
            x = _rms_norm(x, self.gamma, self.eps)
        inputs = (x, self.weight, self.weight_scale, self.bias, self.absent)
        return BIT_LINEAR.symbolic(*inputs, K=self.K, N=self.N, **self.attributes)


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> Any:
    attributes: dict[str, Any] = {"axis": -1, "epsilon": eps, "stash_type": 1}
    return torch.onnx.ops.symbolic(
        "RMSNormalization", (x, gamma), attributes, dtype=torch.float32, shape=x.shape
    )


def _floats(value: Any) -> npt.NDArray[np.float32]:
    """A torch tensor, array or number as a float32 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float32)


def _integers(value: Any) -> npt.NDArray[np.int8]:
    """Whole numbers of any type as int8; raises InputError for other values."""
    floats = _floats(value)
    if not (np.isfinite(floats) & (np.abs(floats) <= 1)).all() or (floats % 1).any():
        raise InputError("weight is not ternary: it holds values other than -1, 0 and 1")
    return floats.astype(np.int8)


def _vector(what: str, value: Any, size: int) -> nn.Buffer:
    floats = _floats(value)
    if floats.shape != (size,):
        raise InputError(f"{what} is {list(floats.shape)}, not [{size}]")
    if not np.isfinite(floats).all():
        raise InputError(f"{what} holds NaN or Inf")
    return nn.Buffer(torch.from_numpy(np.ascontiguousarray(floats)))


# --- example inputs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> Example:
        """One tensor, a sequence of positional or a mapping of keyword arguments."""
        if isinstance(inputs, torch.Tensor):
            return cls((inputs,))
        if isinstance(inputs, Mapping) and inputs:
            return cls(kwargs=dict(inputs))
        if isinstance(inputs, Sequence) and inputs and not isinstance(inputs, str):
            return cls(tuple(inputs))
        raise UsageError(
            f"example_inputs is {type(inputs).__name__}: give a tensor, a tuple of positional or "
            "a dict of keyword arguments"
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Example:
        """The same with each tensor changed."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, self.kwargs))
        return Example(args, kwargs)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor in it."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if _is_tensor(v)]

    def call(self, module: nn.Module) -> Any:
        """What ``module`` gives for it."""
        return module(*self.args, **self.kwargs)

    def first_dimensions(self) -> Any:
        """Dynamic shapes that leave each tensor's first dimension open."""

        def shape(value: Any) -> Any:
            return {0: FIRST} if _is_tensor(value) and value.ndim else None

        args, kwargs = pytree.tree_map(shape, (self.args, self.kwargs))
        return kwargs if self.kwargs else args


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, without history, and float32 if it is of a float type."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _widened(example: Example, module: nn.Module) -> Example:
    """The example twice as long where every first dimension is 1, which torch takes for fixed.

    Only if the module runs on it: then the ones were a batch.
    """
    tensors = [tensor for tensor in example.tensors() if tensor.ndim]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return example
    wide = example.map(lambda t: torch.cat([t, t]) if t.ndim else t)
    try:
        wide.call(module)
    except Exception:  # whatever a module raises on inputs that are not its own
        return example
    return wide


# --- the walk -----------------------------------------------------------------------------------


def load(
    module: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Convert ``module`` as it is in evaluation mode to portable ONNX; it is left as it was.

    ``example_inputs``: a tensor, a tuple of positional or a dict of keyword arguments.
    ``dynamic_shapes``: as ``torch.export.export`` takes them; by default the first dimension of
    each tensor is dynamic, where the module allows it. ``name`` is for the manifest, by default
    the class's. Inputs are named after the parameters of ``forward``, outputs after the keys of a
    returned dict, else ``output`` or ``output_0``, ``output_1``, .... Raises InputError if there is
    no ternary layer, one cannot be read, or torch cannot export the module; UsageError for example
    inputs it does not take; ToolchainError if onnxscript is missing.
    """
    require_packages("onnxscript")
    report = progress or (lambda _: None)
    title = name or type(module).__name__
    with quiet(), torch.no_grad():
        report("reading ternary layers")
        called: set[str] = set()
        layers = _read(module, called)
        if not layers:
            raise InputError(
                f"{title} has no ternary layer: replace its linear layers with "
                "bitcompile.nn.quantize_ and train it, or register their class with "
                "bitcompile.nn.register"
            )
        clone = _clone(module)
        example = Example.of(example_inputs).map(_plain)
        clone = _swap(clone, layers)
        outputs = _output_names(_first_call(clone, example, title))
        if dynamic_shapes is None:
            example = _widened(example, clone)
        called.clear()
        report("exporting graph")
        graph = _export(clone, example, dynamic_shapes, outputs, title)
    _check(graph, set(layers), called, title)
    return Imported(graph=graph, source=title)


def _read(module: nn.Module, called: set[str]) -> dict[str, BitLinearNode]:
    """The node of every ternary layer, by the first name of the layer."""
    absent = nn.Buffer(torch.zeros(()))
    found = {}
    for name, layer in module.named_modules():
        read = reader(layer)
        if read is None:
            continue
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise InputError(f"layer {_title(name)} has hooks, which no graph can run: remove them")
        try:
            found[name] = BitLinearNode(name, read(layer), absent, called)
        except Exception as error:  # the reader may be the user's
            reason = _first_line(error)
            raise InputError(f"layer {_title(name)} cannot be read: {reason}") from error
    return found


def _title(name: str) -> str:
    return name or "(the module itself)"


def _clone(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares their float32 CPU tensors, in evaluation mode."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        plain = _plain(parameter)
        same = plain.data_ptr() == parameter.data_ptr() and plain.dtype == parameter.dtype
        memo[id(parameter)] = parameter if same else nn.Parameter(plain, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _plain(buffer)
    try:
        clone: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:  # a module may hold anything
        raise InputError(
            f"{type(module).__name__} cannot be copied ({_first_line(error)}): remove what is "
            "no part of the model from it"
        ) from error
    return clone.eval()


def _swap(module: nn.Module, layers: Mapping[str, BitLinearNode]) -> nn.Module:
    """Put the nodes into ``module``, under every name a layer has."""
    nodes = {module.get_submodule(name): node.eval() for name, node in layers.items()}
    if module in nodes:
        return nodes[module]
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if layer in nodes:
            module.set_submodule(name, nodes[layer])
    return module


def _first_call(module: nn.Module, example: Example, title: str) -> Any:
    try:
        return example.call(module)
    except Exception as error:  # whatever a module raises
        raise UsageError(
            f"{title} does not take the example inputs: {_first_line(error)}"
        ) from error


def _output_names(result: Any) -> list[str]:
    """One name for each tensor of a result, in torch's order."""
    leaves = pytree.tree_leaves_with_path(result)
    tensors = [(path, leaf) for path, leaf in leaves if _is_tensor(leaf)]
    if not tensors:
        raise InputError("the module returns no tensor: nothing to compile")
    names = []
    for number, (path, _) in enumerate(tensors):
        key = getattr(path[0], "key", getattr(path[0], "name", None)) if len(path) == 1 else None
        default = f"output_{number}" if len(tensors) > 1 else "output"
        names.append(key if isinstance(key, str) else default)
    return names


def _export(
    module: nn.Module, example: Example, dynamic_shapes: Any, outputs: list[str], title: str
) -> ir.Model:
    shapes = example.first_dimensions() if dynamic_shapes is None else dynamic_shapes
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where torch prints what it cannot export
            program = torch.onnx.export(
                module,
                example.args,
                kwargs=example.kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                output_names=outputs,
                opset_version=ONNX_OPSET,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds
        raise InputError(f"torch cannot export {title}: {_root(error)}") from error
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    ranges = program.exported_program.range_constraints.items()
    fixed = {str(symbol): str(r.lower) for symbol, r in ranges if r.lower == r.upper}
    _rename_dimensions(model, fixed)
    if dynamic_shapes is None:
        _rename_dimensions(model, _first_names(model))
    return model


def _first_names(model: ir.Model) -> dict[str, str]:
    """torch's symbols in front of the inputs, such as ``s77``, to ``batch``, ``batch_2``, ...."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, ir.SymbolicDim) and first.value is not None:
            new = BATCH if not names else f"{BATCH}_{len(names) + 1}"
            names.setdefault(str(first.value), new)
    return names


def _rename_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace symbols in the shape of every value; a number makes a fixed dimension."""
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in _values(model.graph):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and value.shape:
                new = pattern.sub(lambda found: names[found[1]], str(dim.value))
                value.shape[axis] = int(new) if new.isdigit() else new


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _check(model: ir.Model, layers: set[str], called: set[str], title: str) -> None:
    """Every layer was called, and nodes of our domain are in the main graph alone.

    Equal layers may share a weight or be one node: the exporter joins equal constants.
    """
    idle = sorted(layers - called)
    if idle:
        raise InputError(
            f"layer {_title(idle[0])} is not called for these inputs: remove it, or let the module "
            "around it call it instead of reading its weight"
        )
    ours = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain == DOMAIN]
    if not ours:
        raise InputError(f"no output of {title} depends on a ternary layer: nothing to compile")
    if any(node.graph is not model.graph for node in ours):
        raise InputError(
            "a ternary layer is inside control flow (torch.cond, scan or a loop), where it "
            "cannot be compiled: move it out"
        )


# --- words --------------------------------------------------------------------------------------


def _root(error: BaseException) -> str:
    """What was wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return line if isinstance(error, BitcompileError) else f"{type(error).__name__}: {line}"
