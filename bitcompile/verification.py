"""Does an artifact compute what its model means?

Every operator of domain ``bitcompile`` in the artifact is run alone, on the artifact's own mapped
weights, and compared with its NumPy reference; then the whole model is run with the plugin and
through its fallback functions.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitcompile import runtime
from bitcompile.artifact import MANIFEST, Artifact, Progress, silent
from bitcompile.companions import PROVIDERS
from bitcompile.custom_ops import OPS
from bitcompile.decoder import ELEMENTS
from bitcompile.errors import (
    BitcompileError,
    InputError,
    ToolchainError,
    UsageError,
    VerificationError,
)
from bitcompile.feeds import NoFeeds, candidates
from bitcompile.numerics import F32
from bitcompile.opset import DOMAIN, Attribute, OpDef
from bitcompile.packing import layout

if TYPE_CHECKING:
    import onnx_ir as ir

BATCHES = (9, 1)
"""Rows that an operator is run with: more than the largest decode batch (8), and a single one."""
GPU_BATCHES = (300, 9, 5, 1)
"""The same where a GPU has kernels for many tokens, for 16, for 8 and for one."""
CHUNK = 4096
"""Weight rows the reference unpacks at a time (float64 rows would fill the memory else)."""
FALLBACK_LIMIT = 2_000_000_000
"""Bytes above which the whole model is not run through its fallback functions."""
COSINE = 0.9999
"""Least cosine between the logits of the plugin and of the fallback functions."""
TOLERANCE = 1e-2
"""Allowed difference, in units of a row's RMS, where bits may differ.

Behind silu and gelu a quantised value may be one step off: each such step changes an output by
one weight scale, under 1 % of the RMS of any row that sums 64 or more products.
"""
FALLBACK_TOLERANCE = 1e-4
"""The same where a fallback function only sums in another order."""
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
TOKENS = 9
"""Tokens of the whole-model comparison: a prompt of all but one, then one decode step."""


Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class NodeReport:
    """One operator compared with its reference."""

    name: str
    op: str
    shape: tuple[int, int]
    """``(N, K)``: output and input features."""
    exact: bool
    """Every output bit equals the reference's, so every int32 accumulator does."""
    max_difference: float
    """Largest difference, in units of its row's RMS."""


@dataclass(frozen=True)
class Report:
    """The outcome of a verification that found no fault."""

    nodes: tuple[NodeReport, ...]
    plugin: bool
    """Whether the plugin ran; else its operators' functions did, for an artifact of elsewhere."""
    isa: str | None
    """The kernel variant asked for through BITCOMPILE_ISA, None for the machine's best."""
    cosine: float | None
    """Plugin against fallback functions on the whole model, None if that was skipped."""
    skipped: str | None
    """Why it was skipped."""
    seconds: float

    @property
    def summary(self) -> str:
        """One line."""
        exact = sum(node.exact for node in self.nodes)
        count = f"{exact} of {len(self.nodes)}"
        if not self.plugin:
            return f"without the plugin: functions of {count} operators bit-exact"
        whole = f"cosine {self.cosine:.7f}" if self.cosine is not None else f"{self.skipped}"
        return f"{count} operators bit-exact; whole model: {whole}"

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {**asdict(self), "summary": self.summary}


def verify(
    artifact: Artifact, progress: Progress = silent, *, isa: str | None = None, plugin: bool = True
) -> Report:
    """Compare every operator and the whole model; see the module.

    ``isa`` picks a kernel variant. ``plugin=False`` puts the fallback functions in the plugin's
    place, for an artifact whose plugin is for another machine. Raises VerificationError naming the
    operator and its first wrong element, InputError or ToolchainError if the artifact is damaged
    or cannot run here.
    """
    start = time.monotonic()
    if isa is not None and isa not in (runs := variants(artifact)):
        raise UsageError(
            f"the plugin has no variant {isa!r} that this machine runs; "
            f"choose one of: {', '.join(runs) or 'none'}"
        )
    artifact.check_hashes(progress)
    model = _open(artifact)
    progress("checking constants")
    _check_constants(model)
    with _isa(isa):
        runtime.session_options(artifact.path, plugin=plugin)  # fails early and clearly
        if plugin:
            runtime.providers(artifact)
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in OPS]
        reports = []
        for i, node in enumerate(nodes):
            progress(f"verifying operator {i + 1}/{len(nodes)} {node.name or node.op_type}")
            reports.append(_check_node(artifact, model, node, plugin))
        skipped = None if plugin else "not compared, the plugin was not used"
        skipped = skipped or _too_big(artifact)
        cosine = None
        if skipped is None:
            progress("verifying the whole model")
            result = _compare_whole(artifact)
            cosine, skipped = (None, result) if isinstance(result, str) else (result, None)
    seconds = round(time.monotonic() - start, 3)
    return Report(tuple(reports), plugin, isa, cosine, skipped, seconds)


def _open(artifact: Artifact) -> ir.Model:
    try:
        import onnx_ir as ir
    except ImportError:
        raise ToolchainError(
            'verifying needs the onnx packages: pip install "bitcompile[build]"'
        ) from None
    try:
        model = ir.load(artifact.model)
    except Exception as error:  # protobuf's errors have no public base
        raise InputError(
            f"{artifact.model} is not a readable ONNX model: build the artifact again"
        ) from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _resolved(artifact, value.const_value)
    return model


def _resolved(artifact: Artifact, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """``tensor`` with the real location of its data, which may be linked, as in hub caches.

    Raises InputError for data that is not the artifact's, or where onnxruntime would not read it.
    """
    import onnx_ir as ir

    if str(tensor.location) not in artifact.manifest["files"]:
        raise InputError(
            f"{artifact.model} has weights in {str(tensor.location)!r}, which {MANIFEST} does not "
            "list: build the artifact again"
        )
    linked = artifact.path / tensor.location
    real = linked.resolve()
    homes = (artifact.path.resolve(), artifact.model.resolve().parent)
    if not any(real.is_relative_to(home) for home in homes):
        raise InputError(
            f"{linked} is a link to another folder, which onnxruntime does not follow: copy the "
            "file, or make a hard link"
        )
    return ir.ExternalTensor(
        real.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=real.parent,
    )


def _array(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The values of a tensor, mapped if they are external: onnx_ir refuses files with two names.

    Raises InputError if the file is shorter than the tensor.
    """
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    try:
        return np.memmap(
            tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy())
        )
    except (ValueError, OSError) as error:
        raise InputError(
            f"{tensor.path} does not hold {tensor.name!r} ({runtime.one_line(error)}): "
            "build the artifact again"
        ) from error


def _check_constants(model: ir.Model) -> None:
    """Raises InputError at the first constant that poisons results: NaN anywhere, Inf in ours.

    Both would compare as equal below. Other operators may read an infinity, as attention masks do.
    """
    for node in model.graph:
        op = OPS.get(node.op_type) if node.domain == DOMAIN else None
        names = [i.name for i in op.inputs] if op else [v.name if v else "" for v in node.inputs]
        for name, value in zip(names, node.inputs, strict=False):
            tensor = value.const_value if value is not None else None
            if tensor is None or tensor.dtype.name not in FLOATS or not tensor.size:
                continue
            array = _array(tensor)
            with np.errstate(invalid="ignore"):
                ends = float(array.min()), float(array.max())  # hand on NaN, and need no copy
            if not np.isfinite(ends).all() and (op or np.isnan(ends).any()):
                raise InputError(
                    f"{name!r} of {_title(node)} holds values that are not finite: the model it "
                    "was built from is damaged"
                )


_ISA_LOCK = threading.RLock()
"""The environment is the whole process's: one verification at a time."""


@contextmanager
def _isa(isa: str | None) -> Iterator[None]:
    """BITCOMPILE_ISA set to ``isa`` for a while: a plugin reads it when it is registered."""
    with _ISA_LOCK:
        before = os.environ.get("BITCOMPILE_ISA")
        if isa is not None:
            os.environ["BITCOMPILE_ISA"] = isa
        try:
            yield
        finally:
            if isa is not None:
                os.environ.pop("BITCOMPILE_ISA", None)
                if before is not None:
                    os.environ["BITCOMPILE_ISA"] = before


# --- one operator -------------------------------------------------------------------------------


def _check_node(artifact: Artifact, model: ir.Model, node: ir.Node, plugin: bool) -> NodeReport:
    op = OPS[node.op_type]
    attributes = op.complete({name: a.value for name, a in node.attributes.items()})
    narrow = artifact.activations if plugin else "float32"  # functions take any type
    on_gpu = plugin and artifact.manifest["target"]["device"] in PROVIDERS
    # A head has one kernel there, and its reference is slow.
    batches = GPU_BATCHES if on_gpu and op.name != "HeadLinear" else BATCHES
    constants = {
        name: _array(value.const_value)
        for name, value in op.named(node.inputs).items()
        if value is not None and value.const_value is not None
    }
    try:
        feeds = {
            i.name: (_residual if i.name == "residual" else _activations)(attributes, sum(batches))
            for i in op.inputs
            if i.name not in constants
        }
        feeds = {name: _rounded(x, narrow) for name, x in feeds.items()}
        expected = _reference(op, {**constants, **feeds}, attributes)
    except (InputError, ValueError) as error:
        raise VerificationError(
            f"{_title(node)} does not fit this bitcompile's {op.name} "
            f"({runtime.one_line(error)}): build the artifact again"
        ) from error
    if op.name != "HeadLinear":  # whose logits are float32 whatever comes in
        expected = _rounded(expected, narrow)
    session = _node_session(artifact, model, node, op, plugin)
    try:
        ends = np.cumsum(batches)
        measured = np.concatenate(
            [
                _run(session, feeds, slice(end - rows, end))
                for rows, end in zip(batches, ends, strict=True)
            ]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise VerificationError(
            f"{_title(node)} does not run: {runtime.one_line(error)}"
        ) from error
    return _compare(node, attributes, measured, expected, plugin, narrow)


def _rounded(x: F32, activations: str) -> F32:
    """``x`` rounded to the type that activations have."""
    import ml_dtypes  # noqa: F401 gives numpy its bfloat16

    with np.errstate(over="ignore", invalid="ignore"):  # beyond float16 lies infinity
        return x.astype(np.dtype(activations)).astype(np.float32)


def _activations(attributes: Mapping[str, Attribute], rows: int) -> F32:
    """Float32 ``[rows, K]``: random rows of several magnitudes, one of NaN, one of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, int(attributes["K"]))).astype(np.float32)
    x *= np.float32(10.0) ** rng.integers(-3, 4, (rows, 1)).astype(np.float32)
    x[2] = np.nan
    x[5] = 0
    return x


def _residual(attributes: Mapping[str, Attribute], rows: int) -> F32:
    """Float32 ``[rows, N]``: every third row zero.

    In those rows equal bits mean equal int32 accumulators: neighbouring ones differ by more than
    the rounding of their product with the scale.
    """
    rng = np.random.default_rng(1)
    residual = rng.standard_normal((rows, int(attributes["N"]))).astype(np.float32)
    residual[::3] = 0
    return residual


def _reference(op: OpDef, inputs: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> F32:
    """The reference of a node; linear ones a block of weight rows at a time."""
    rows = int(attributes["N"])
    if op.name == "BitGLU" or rows <= CHUNK:
        return np.asarray(op.reference(inputs, attributes), np.float32)
    parts = []
    for begin in range(0, rows, CHUNK):
        end = min(begin + CHUNK, rows)
        part = {name: _rows(name, value, attributes, begin, end) for name, value in inputs.items()}
        parts.append(op.reference(part, {**attributes, "N": end - begin}))
    return np.concatenate(parts, axis=-1)


def _rows(name: str, value: Any, attributes: Mapping[str, Attribute], begin: int, end: int) -> Any:
    """What output features ``begin`` to ``end`` (multiples of any tile) need of one input."""
    if name in ("x", "gamma") or value.ndim == 0:
        return value
    if name == "residual":
        return value[..., begin:end]
    # Scales of groups lie in tiles like the weights; w_scale of rows, bias, table and scale do not.
    tiled = name == "w" or (name == "w_scale" and attributes["group_size"])
    tile = layout(str(attributes["layout"])).tile_n if tiled else 1
    return value[begin // tile : -(-end // tile)]


def _node_session(
    artifact: Artifact, model: ir.Model, node: ir.Node, op: OpDef, plugin: bool
) -> Any:
    """A session of ``node`` alone that maps the artifact's data file."""
    import onnx_ir as ir

    options = runtime.session_options(artifact.path, plugin=plugin)
    chosen = runtime.providers(artifact) if plugin else [runtime.CPU]
    values = (value.const_value for value in node.inputs if value is not None)
    folders = (str(t.base_dir) for t in values if isinstance(t, ir.ExternalTensor))
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        next(folders, str(artifact.path.absolute())),
    )
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    activations = artifact.activations if plugin else "float32"
    proto = _node_model(model, node, op, activations, with_functions=not plugin)
    try:
        return runtime.open_session(proto, options, chosen)
    except runtime.OnnxruntimeError as error:
        raise VerificationError(f"{_title(node)} does not load: {error}") from error


def _node_model(
    model: ir.Model, node: ir.Node, op: OpDef, activations: str, with_functions: bool
) -> bytes:
    """A serialised model of ``node``: its constants as stored, its other inputs as inputs.

    Inputs and output are float32, and cast to and from ``activations``: NumPy has no bfloat16.
    """
    import onnx_ir as ir

    inputs, initializers, values = [], [], []
    narrow, wide = ir.DataType.from_numpy(np.dtype(activations)), ir.DataType.FLOAT
    nodes: list[ir.Node] = []

    def cast(value: ir.Value, to: ir.DataType) -> ir.Value:
        nodes.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))]))
        return nodes[-1].outputs[0]

    for declared, value in zip(op.inputs, node.inputs, strict=True):
        assert value is not None  # the operators have a fixed arity
        if value.const_value is None:
            new = ir.val(declared.name, wide, ["rows", None])
            inputs.append(new)
            new = cast(new, narrow)
        else:
            new = ir.val(str(value.name), const_value=value.const_value)
            initializers.append(new)
        values.append(new)
    nodes.append(ir.Node(node.domain, node.op_type, values, list(node.attributes.values())))
    output = cast(nodes[-1].outputs[0], wide)
    output.name = "y"
    output.type, output.shape = (
        ir.TensorType(wide),
        ir.Shape(["rows", node.attributes["N"].as_int()]),
    )
    unique = list({value.name: value for value in initializers}.values())
    graph = ir.Graph(
        inputs,
        [output],
        nodes=nodes,
        initializers=unique,
        opset_imports=dict(model.graph.opset_imports),
        name="node",
    )
    functions = list(model.functions.values()) if with_functions else []
    whole = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    return bytes(ir.to_proto(whole).SerializeToString())


def _run(session: Any, feeds: Mapping[str, F32], rows: slice) -> F32:
    return np.asarray(session.run(None, {k: v[rows] for k, v in feeds.items()})[0], np.float32)


def _compare(
    node: ir.Node,
    attributes: Mapping[str, Attribute],
    measured: F32,
    expected: F32,
    plugin: bool,
    activations: str,
) -> NodeReport:
    """Raises VerificationError at the first element outside the operator's tolerance."""
    if measured.shape != expected.shape:
        raise VerificationError(
            f"{_title(node)} gives shape {measured.shape} instead of {expected.shape}"
        )
    different = _different(measured, expected)
    exact = not different.any()
    difference = _row_difference(measured, expected)
    limit: Any = 0.0
    if plugin and _approximate(attributes):
        limit = TOLERANCE + _step(expected, activations)
    elif not plugin:
        limit = TOLERANCE if node.op_type == "BitGLU" else FALLBACK_TOLERANCE
    wrong = different & ~(difference <= limit)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise VerificationError(
            f"{_title(node)} is wrong: element [{row}, {column}] is {measured[row, column]!r}, "
            f"its reference {expected[row, column]!r}; {int(wrong.sum())} of {wrong.size} differ"
        )
    shape = (int(attributes["N"]), int(attributes["K"]))
    largest = float(np.nan_to_num(difference).max())
    return NodeReport(str(node.name), node.op_type, shape, exact, largest)


def _different(measured: F32, expected: F32) -> npt.NDArray[np.bool_]:
    """Where two arrays differ in value; NaN equals NaN, and -0 equals 0."""
    both_nan = np.isnan(measured) & np.isnan(expected)
    return np.asarray((measured != expected) & ~both_nan)


def _row_difference(measured: F32, expected: F32) -> npt.NDArray[np.float64]:
    """|measured - expected| in units of the RMS of the expected row; NaN where either is."""
    wide = expected.astype(np.float64)
    rms = np.sqrt((wide * wide).mean(axis=-1, keepdims=True))
    difference: npt.NDArray[np.float64] = np.abs(measured - wide) / np.maximum(rms, 1e-30)
    return difference


def _step(expected: F32, activations: str) -> npt.NDArray[np.float64]:
    """What one step of the activations' type makes of an element, in the same units."""
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[activations]
    return _row_difference(expected * np.float32(1 + eps), expected)


def _approximate(attributes: Mapping[str, Attribute]) -> bool:
    """Whether an activation with an exponential lies before a quantisation."""
    return attributes.get("activation", "relu2") != "relu2"


def _title(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else str(node.op_type)


# --- the whole model ----------------------------------------------------------------------------


def _too_big(artifact: Artifact) -> str | None:
    """Why the whole model is not run through its fallback functions, None if it is.

    They unpack a two-bit weight to a byte and a table to floats.
    """
    inspection = artifact.manifest["inspection"]
    parameters = inspection["parameters"]
    need = parameters["ternary"] + 4 * parameters["head"] + inspection["bytes"]["other"]
    if need <= FALLBACK_LIMIT:
        return None
    return f"not compared, the fallback functions would unpack {need / 1e9:.1f} GB"


def _compare_whole(artifact: Artifact) -> float | str:
    """Least cosine of any output row, plugin against functions, or why nothing was compared.

    Raises VerificationError if they differ, or if the model runs through its functions alone.
    """
    try:
        slow, feeds = _by_functions(artifact)
    except NoFeeds as reason:
        return f"not compared, {reason}"
    fast = _evaluate(artifact, feeds)
    if not fast:
        return "not compared, it has no float32 output"
    cosine = min(_cosine(a, b) for a, b in zip(fast, slow, strict=True))
    if not cosine >= COSINE:
        raise VerificationError(
            f"the whole model differs from its fallback functions: cosine {cosine:.6f} "
            f"< {COSINE}; report it with the model's name"
        )
    return cosine


def _by_functions(artifact: Artifact) -> tuple[list[F32], Feeds | None]:
    """Results through the fallback functions, and the inputs they belong to.

    Raises NoFeeds if the model runs on none of the inputs that can be made up for it.
    """
    if artifact.manifest["language"] is not None:
        return _evaluate(artifact, None, plugin=False), None
    session = runtime.load(artifact.path, plugin=False)
    last = "it has no inputs"
    for feeds in candidates(session):
        try:
            return _outputs(session, feeds), feeds
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            last = runtime.one_line(error)
    raise NoFeeds(f"it does not run on made-up inputs ({last[:200]})")


def _cosine(a: F32, b: F32) -> float:
    """Least cosine between the last-axis rows of ``a`` and ``b``; 1 where both are zero."""
    x = a.astype(np.float64).reshape(-1, a.shape[-1])
    y = b.astype(np.float64).reshape(-1, b.shape[-1])
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    same = (x == y).all(axis=-1)
    return float(np.where(same, 1.0, (x * y).sum(axis=-1) / np.where(norms > 0, norms, 1)).min())


def _evaluate(artifact: Artifact, feeds: Feeds | None, plugin: bool = True) -> list[F32]:
    """Float outputs of a run on ``feeds``; of a language model (None) its logits at two steps."""
    session = runtime.load(artifact.path, plugin=plugin)
    try:
        if feeds is not None:
            return _outputs(session, feeds)
        return _logits(session, artifact.manifest["language"]["vocab_size"])
    except BitcompileError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise VerificationError(
            f"the whole model does not run: {runtime.one_line(error)}"
        ) from error


def _outputs(session: Any, feeds: Feeds) -> list[F32]:
    return [y for y in session.run(None, feeds) if y.dtype == np.float32 and y.ndim]


def _logits(session: Any, vocabulary: int) -> list[F32]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS)).astype(np.int64)
    caches = empty_caches(session)
    prompt = step(session, tokens[:, :-1], caches)
    return [prompt, step(session, tokens[:, -1:], caches)]


def empty_caches(session: Any) -> dict[str, Any]:
    """The key and value inputs of a decoder session before the first token, batch 1, as OrtValues.

    NumPy has no bfloat16.
    """
    import onnxruntime

    return {
        i.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            (1, i.shape[1], 0, i.shape[3]), ELEMENTS[i.type]
        )
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }


def step(session: Any, tokens: npt.NDArray[np.int64], caches: dict[str, Any]) -> F32:
    """Feed ``tokens`` int64 ``[1, S]``: logits ``[1, S or 1, V]``; ``caches`` move on in place."""
    import onnxruntime

    past = next(iter(caches.values())).shape()[2] if caches else 0
    arrays = {"input_ids": tokens}
    names = {i.name for i in session.get_inputs()}
    if "attention_mask" in names:
        arrays["attention_mask"] = np.ones((1, past + tokens.shape[1]), np.int64)
    held = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()}
    outputs = [o.name for o in session.get_outputs()]
    ran = session.run_with_ort_values(outputs, {**held, **caches})
    results = dict(zip(outputs, ran, strict=True))
    for name in caches:
        caches[name] = results[name.replace("past_key_values.", "present.")]
    return np.asarray(results["logits"].numpy(), np.float32)


def _require_variants(artifact: Artifact) -> None:
    device = artifact.manifest["target"]["device"]
    if device in PROVIDERS:
        raise UsageError(
            f"a plugin for {device} takes the code of the GPU it finds: leave out --isa"
        )


def variants(artifact: Artifact) -> list[str]:
    """The kernel variants of the artifact's plugin that this machine can run, best first.

    Raises UsageError for the plugin of a GPU.
    """
    _require_variants(artifact)
    found = []
    for isa in artifact.manifest["target"]["isas"]:
        with _isa(isa):
            try:
                runtime.session_options(artifact.path)
            except ToolchainError:
                continue
        found.append(isa)
    return found
