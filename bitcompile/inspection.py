"""What a model consists of: operators, bytes by kind, compression.

One report for three sources: an artifact (from its manifest alone), an ``.onnx`` file and a Hugging
Face checkpoint. The keys are the same; what a source does not tell is None or empty.
"""

from __future__ import annotations

import json
import math
import operator
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile.artifact import MANIFEST, Artifact
from bitcompile.custom_ops import OPS
from bitcompile.errors import InputError, ToolchainError
from bitcompile.opset import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

KINDS = ("ternary", "head", "other")
"""Ternary weights with their scales; the embedding and head tables with theirs; the rest."""


@dataclass
class Weights:
    """Bytes and parameters of one kind."""

    bytes: int = 0
    parameters: int = 0
    """Weights of the model they stand for: two-bit codes count one each, scales and caches none."""

    def add(self, bytes: int, parameters: int = 0) -> None:
        """Count one tensor."""
        self.bytes += bytes
        self.parameters += parameters


def inspect(path: str | Path) -> dict[str, Any]:
    """The report of an artifact, an ``.onnx`` file or a checkpoint folder.

    Keys: ``kind, source, ops {name: count}, nodes_per_layer, bytes {ternary, head, other, total},
    parameters {...}, bits_per_ternary_weight, compression {vs_fp32, vs_bf16}`` (of the ternary
    weights, scales included), ``compression_total`` (of everything), ``inputs, outputs, weights
    {name: shape}``; of an artifact also ``target, layout, passes, files``; of an .onnx file also
    ``recognition {recognised, unfused [{node, reason}], refused}``: the ternary layers that `build`
    would find in it. Raises InputError if ``path`` is none of the three, or lacks files.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _inspect_artifact(Artifact.open(path))
    if (path / "config.json").is_file():
        return _inspect_checkpoint(path)
    if path.is_file() and path.suffix == ".onnx":
        return _inspect_onnx(path)
    raise InputError(f"{path} is no artifact, .onnx file or checkpoint folder: nothing to inspect")


def _inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    artifact.check_sizes()
    manifest = artifact.manifest
    return {
        "kind": "artifact",
        "source": manifest["source"],
        **manifest["inspection"],
        "target": manifest["target"],
        "layout": manifest["layout"],
        "options": manifest["options"],
        "passes": manifest["passes"],
        "verification": manifest["verification"],
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
    }


def _inspect_onnx(path: Path) -> dict[str, Any]:
    model = _load_onnx(path)
    try:
        report = {"kind": "onnx", "source": path.name, **inspect_graph(model)}
    except Exception as error:  # tensors are read here, and a damaged one raises anything
        raise InputError(f"{path} is damaged ({_first_line(error)}): export it again") from None
    return {**report, "recognition": _recognition(path)}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _recognition(path: Path) -> dict[str, Any]:
    """What `build` would recognise as ternary layers, what not, or why it refuses the file."""
    from bitcompile.frontends import foreign

    try:
        (record,) = foreign.read(str(path)).records
    except InputError as error:
        return {"recognised": 0, "unfused": [], "refused": str(error)}
    unfused = [{"node": refusal.where, "reason": refusal.reason} for refusal in record.refusals]
    return {"recognised": record.count, "unfused": unfused, "refused": None}


def _load_onnx(path: Path) -> ir.Model:
    try:
        import onnx_ir as ir
    except ImportError:
        raise ToolchainError(
            'inspecting an .onnx file needs the onnx packages: pip install "bitcompile[build]"'
        ) from None
    from bitcompile.frontends.foreign import notes

    try:
        with notes("onnx_ir"):
            return ir.load(path)
    except Exception as error:  # protobuf's errors have no public base
        raise InputError(f"{path} is not a readable ONNX model: {_first_line(error)}") from error


# --- graphs -------------------------------------------------------------------------------------


def inspect_graph(model: ir.Model) -> dict[str, Any]:
    """The report of a graph, without ``kind`` and ``source`` (see :func:`inspect`)."""
    graph = model.graph
    weights = _classify(graph)
    return {
        "ops": dict(sorted(Counter(_op_name(node) for node in graph).items())),
        "nodes_per_layer": nodes_per_layer(graph),
        **_summary(weights),
        "inputs": {str(value.name): _shape(value) for value in graph.inputs},
        "outputs": {str(value.name): _shape(value) for value in graph.outputs},
        "weights": {
            name: [str(value.dtype), *_shape(value)]
            for name, value in graph.initializers.items()
            if value.const_value is not None and value.const_value.size > 1
        },
    }


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _shape(value: ir.Value) -> list[int | str | None]:
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        return []
    return [dim if isinstance(dim, int) else getattr(dim, "value", str(dim)) for dim in shape]


def nodes_per_layer(graph: ir.Graph) -> int | None:
    """Nodes of one decoder layer, None if there are not two layers.

    Between one attention and the next lies exactly one layer's worth of nodes: those the later
    attention depends on and the earlier one does not, of which the largest such set counts.
    """
    attention = [n for n in graph if n.op_type in ("GroupQueryAttention", "MultiHeadAttention")]
    if len(attention) < 2:
        return None
    seen: set[ir.Node] = set()
    sizes = []
    for node in attention:
        new = _ancestors(node, seen)
        sizes.append(len(new))
        seen |= new
    return max(sizes[1:])


def _ancestors(node: ir.Node, seen: set[ir.Node]) -> set[ir.Node]:
    """``node`` and what it depends on, without ``seen`` (which is closed under dependence)."""
    found: set[ir.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current in found:
            continue
        found.add(current)
        stack.extend(p for v in current.inputs if v is not None and (p := v.producer()))
    return found


def _classify(graph: ir.Graph) -> dict[str, Weights]:
    """Every initializer under its kind; a tensor read by several nodes counts once."""
    totals = {kind: Weights() for kind in KINDS}
    counted: set[str] = set()

    def count(kind: str, value: ir.Value | None, parameters: int) -> None:
        if value is None or value.const_value is None or str(value.name) in counted:
            return
        counted.add(str(value.name))
        totals[kind].add(value.const_value.nbytes, parameters)

    for node in graph:
        for value, parameters in _ternary_inputs(node):
            count("ternary", value, parameters)
    for value, parameters in _table_inputs(graph):
        count("head", value, parameters)
    caches = {v for node in graph if node.op_type == "GroupQueryAttention" for v in node.inputs}
    for value in graph.initializers.values():
        is_parameter = value not in caches and str(value.dtype) in ("FLOAT", "FLOAT16", "BFLOAT16")
        size = _size(value)
        count("other", value, size if is_parameter and size > 1 else 0)
    return totals


def _ternary_inputs(node: ir.Node) -> Iterator[tuple[ir.Value | None, int]]:
    """(packed weight or scale, parameters) of one of our nodes."""
    if node.domain != DOMAIN or node.op_type not in OPS:
        return
    op = OPS[node.op_type]
    inputs = op.named(node.inputs)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    for weight in op.weights:
        rows, columns = weight.shape(attributes)
        yield inputs[weight.data], rows * columns
        yield inputs[weight.scale], 0


def _table_inputs(graph: ir.Graph) -> Iterator[tuple[ir.Value | None, int]]:
    """(table or scale, parameters) of embedding lookups and of the head."""
    for node in graph:
        if node.op_type == "HeadLinear":
            rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
            yield node.inputs[1], rows * columns
            yield node.inputs[2], 0
    for node in graph:
        if node.op_type == "GatherBlockQuantized":
            bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
            table = node.inputs[0]
            if table is not None and table.const_value is not None:
                yield table, table.const_value.nbytes * 8 // bits
            for value in node.inputs[2:]:
                yield value, 0
        elif node.op_type == "Gather" and _is_table(node.inputs[0]):
            yield node.inputs[0], _size(node.inputs[0])
    for output in graph.outputs:
        for value in _final_matrix(output):
            yield value, _size(value)


def _size(value: ir.Value | None) -> int:
    return value.const_value.size if value is not None and value.const_value is not None else 0


def _is_table(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and len(value.const_value.shape) == 2
        and str(value.dtype) in ("FLOAT", "FLOAT16", "BFLOAT16")
    )


_PASS_THROUGH = ("Cast", "Reshape", "Transpose", "Identity", "Slice")


def _final_matrix(output: ir.Value) -> Iterable[ir.Value]:
    """Float tables multiplied to give ``output``, through casts and transposes."""
    node = _skip_views(output).producer()
    if node is None or node.op_type not in ("MatMul", "FusedMatMul", "Gemm"):
        return []
    sources = [_skip_views(value) for value in node.inputs[:2] if value is not None]
    return [value for value in sources if _is_table(value)]


def _skip_views(value: ir.Value) -> ir.Value:
    """The value that ``value`` is a cast, reshaped, transposed or cut form of."""
    while (node := value.producer()) is not None and node.op_type in _PASS_THROUGH:
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


# --- checkpoints --------------------------------------------------------------------------------


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    from bitcompile.frontends.checkpoint import CONFIG, read_json

    config = read_json(folder / CONFIG)
    tensors = _checkpoint_tensors(folder)
    totals = {kind: Weights() for kind in KINDS}
    quantization = config.get("quantization_config")
    # Online checkpoints hold float matrices that become ternary when they are loaded.
    masters = (
        isinstance(quantization, dict)
        and quantization.get("quant_method") == "bitnet"
        and not any(dtype == "U8" for dtype, _, _ in tensors.values())
    )
    architectures = config.get("architectures")
    for name, (dtype, shape, size) in tensors.items():
        kind = _checkpoint_kind(name, dtype, shape, masters)
        scale = name.endswith("weight_scale")
        per_element = 4 if dtype == "U8" and kind == "ternary" else 1
        totals[kind].add(size, 0 if scale else math.prod(shape) * per_element)
    return {
        "kind": "checkpoint",
        "source": folder.resolve().name,
        "architecture": architectures[0]
        if isinstance(architectures, list) and architectures
        else None,
        "layers": config.get("num_hidden_layers"),
        "ops": {},
        "nodes_per_layer": None,
        **_summary(totals),
        "inputs": {},
        "outputs": {},
        "weights": {name: [dtype, *shape] for name, (dtype, shape, _) in tensors.items()},
    }


def _checkpoint_kind(name: str, dtype: str, shape: Sequence[int], masters: bool) -> str:
    if name.startswith("lm_head") or "embed_tokens" in name:
        return "head"
    if name.endswith("weight_scale") or dtype == "U8":
        return "ternary"
    return "ternary" if masters and len(shape) == 2 else "other"


def _checkpoint_tensors(folder: Path) -> dict[str, tuple[str, list[int], int]]:
    """Tensor name to (dtype, shape, bytes), from the headers of the safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors file: nothing to inspect")
    tensors = {}
    for file in files:
        header = _safetensors_header(file)
        header.pop("__metadata__", None)
        try:
            for name, entry in header.items():
                begin, end = (operator.index(offset) for offset in entry["data_offsets"])
                shape = [operator.index(size) for size in entry["shape"]]
                tensors[name] = (str(entry["dtype"]), shape, end - begin)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file} has a damaged header: download it again") from None
    return tensors


def _safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header: an 8-byte little-endian length, then that many bytes."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= file.stat().st_size - 8:
            raise InputError(f"{file} is truncated or not a safetensors file: download it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise InputError(f"{file} has a damaged header: download it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{file} has a damaged header: download it again")
    return header


# --- summary and text ---------------------------------------------------------------------------


def _summary(weights: Mapping[str, Weights]) -> dict[str, Any]:
    sizes = {kind: weights[kind].bytes for kind in KINDS}
    parameters = {kind: weights[kind].parameters for kind in KINDS}
    total, count = sum(sizes.values()), sum(parameters.values())
    ternary = weights["ternary"]
    bits = 8 * ternary.bytes / ternary.parameters if ternary.parameters else None
    return {
        "bytes": {**sizes, "total": total},
        "parameters": {**parameters, "total": count},
        "bits_per_ternary_weight": bits,
        "compression": _ratios(bits),
        "compression_total": _ratios(8 * total / count if count else None),
    }


def _ratios(bits: float | None) -> dict[str, float | None]:
    """How many times smaller than 32- and 16-bit floats a weight of ``bits`` is."""
    return {
        "vs_fp32": 32 / bits if bits else None,
        "vs_bf16": 16 / bits if bits else None,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as aligned text."""
    lines = list(_headline(report))
    lines += ["", *_bytes_table(report)]
    if report["ops"]:
        lines += ["", "operators"]
        lines += aligned([[f"  {name}", str(count)] for name, count in report["ops"].items()])
    lines += _recognition_lines(report.get("recognition"))
    if report.get("passes"):
        lines += ["", "passes"]
        lines += aligned([_pass_row(entry) for entry in report["passes"]])
    for title in ("inputs", "outputs"):
        if report[title]:
            shapes = [[f"  {k}", _shape_text(v)] for k, v in _abridged(report[title]).items()]
            lines += ["", title, *aligned(shapes)]
    return "\n".join(lines)


def _headline(report: Mapping[str, Any]) -> Iterator[str]:
    rows = [["source", f"{report['source']} ({report['kind']})"]]
    if report.get("architecture"):
        rows.append(["architecture", f"{report['architecture']}, {report['layers']} layers"])
    if "target" in report:
        target = report["target"]
        rows.append(["target", f"{target['name']} on {target['host']}"])
        readers = ", ".join(target["isas"])
        rows.append(["weights", f"one copy, layout {report['layout']}, read by {readers}"])
        verified = report["verification"]
        rows.append(["verified", verified["summary"] if verified else "no"])
    if report["nodes_per_layer"] is not None:
        rows.append(["nodes per layer", str(report["nodes_per_layer"])])
    yield from aligned(rows)


def _bytes_table(report: Mapping[str, Any]) -> list[str]:
    rows = [["weights", "bytes", "parameters", "bits each", "vs fp32", "vs bf16"]]
    for kind in (*KINDS, "total"):
        size, count = report["bytes"][kind], report["parameters"][kind]
        bits = 8 * size / count if count else None
        ratio = _ratios(bits)
        numbers = [bits, ratio["vs_fp32"], ratio["vs_bf16"]]
        rows.append(
            [kind, f"{size:,}", f"{count:,}", *("-" if n is None else f"{n:.2f}" for n in numbers)]
        )
    return aligned(rows, right=True)


def _recognition_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Nothing for a model whose operators are ternary already."""
    if found is None or not any(found.values()):
        return []
    if found["refused"]:
        return ["", "ternary layers", f"  cannot be compiled: {found['refused']}"]
    rows = [[f"  {entry['node']}", f"left: {entry['reason']}"] for entry in found["unfused"]]
    return ["", f"ternary layers: {found['recognised']} recognised", *aligned(rows)]


def _pass_row(entry: Mapping[str, Any]) -> list[str]:
    rest = {k: v for k, v in entry.items() if k != "name" and v}
    return [f"  {entry.get('name', '?')}", ", ".join(f"{k}: {_brief(v)}" for k, v in rest.items())]


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({value[0]})" if value else "0"
    return str(value)


def _abridged(shapes: Mapping[str, Any], limit: int = 6) -> dict[str, Any]:
    """The first entries, and how many were left out."""
    if len(shapes) <= limit:
        return dict(shapes)
    first = dict(list(shapes.items())[: limit - 1])
    return {**first, f"... {len(shapes) - limit + 1} more": []}


def _shape_text(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else ""


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Rows of cells as lines with aligned columns; ``right`` aligns all but the first right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
