"""The build: a model becomes an artifact, one line a step. :func:`export` stops half-way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile import artifact as artifacts
from bitcompile import inspection, passing, verification
from bitcompile.artifact import Artifact, Progress, silent
from bitcompile.errors import ToolchainError, UsageError, writing
from bitcompile.frontends.gguf_ternary import I2S_ORDERS

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from bitcompile.target import Target


@dataclass(frozen=True)
class BuildOptions:
    """Every choice of a build; the command line's options are these fields."""

    target: str = field(default="native", metadata={"help": "Target, see `bitcompile targets`."})
    host: str | None = field(
        default=None, metadata={"help": "Triple of the machine that will load the plugin."}
    )
    head: str | None = field(
        default=None,
        metadata={
            "choices": passing.HEADS,
            "help": "Embedding and head table: 8 or 4 bits a weight, or floats "
            "[default: q8, on GPUs float; float for torch modules and .onnx files].",
        },
    )
    logits: str | None = field(
        default=None,
        metadata={
            "choices": passing.LOGITS,
            "help": "Logits of the last position only, or of all "
            "[default: last; all for torch modules and .onnx files].",
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "i2", "t5"),
            "help": "How ternary weights lie in memory; auto is the target's choice.",
        },
    )
    context: int | None = field(
        default=None,
        metadata={"help": "Tokens of the KV cache [default: 4096 or the model's limit]."},
    )
    offload: str | None = field(
        default=None,
        metadata={
            "help": "Work of an OpenCL device: prefill, all, none or auto, which is all for one "
            "with memory of its own, else prefill [default: auto]."
        },
    )
    fallback: str | None = field(
        default=None,
        metadata={
            "help": "What takes over where a GPU target finds no usable device: cpu or none "
            "[default: cpu]."
        },
    )
    activations: str | None = field(
        default=None,
        metadata={
            "help": "What passes between operators of a language model on CUDA: float16 or "
            "bfloat16, which has float32's range and fewer digits [default: float16]."
        },
    )
    i2s_order: str | None = field(
        default=None,
        metadata={
            "choices": tuple(I2S_ORDERS),
            "help": "Order of I2_S codes, where a .gguf file cannot tell it.",
        },
    )
    verify: bool = field(
        default=True,
        metadata={"help": "Verify the artifact (for another machine: without its plugin)."},
    )
    dump: Path | None = field(
        default=None, metadata={"help": "Folder for the graph after each pass, as text."}
    )
    force: bool = field(default=False, metadata={"help": "Replace an artifact that exists."})

    def __post_init__(self) -> None:
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices and value not in (*choices, option.default):
                raise UsageError(f"{option.name} must be one of {', '.join(choices)}, not {value}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"context must be 1 or more, not {self.context}")

    def resolved(self, checkpoint: bool, target: Target) -> BuildOptions:
        """With every choice made: checkpoints are made smaller, other graphs keep their meaning."""
        defaults = (target.heads[0], "last") if checkpoint else ("float", "all")
        if self.activations is not None and not checkpoint:
            raise UsageError(
                "activations are chosen for checkpoints; modules and .onnx files keep their types: "
                "leave out --activations"
            )
        head = self.head or defaults[0]
        if head not in target.heads:
            raise UsageError(
                f"target {target.name} has no kernels for head {head}; "
                f"choose one of {', '.join(target.heads)}"
            )
        return replace(self, head=head, logits=self.logits or defaults[1])

    @property
    def of_target(self) -> dict[str, str]:
        """The choices made that only some targets have."""
        given = {
            "offload": self.offload, "fallback": self.fallback, "activations": self.activations,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: the choices that shape the artifact."""
        return {k: v for k, v in asdict(self).items() if k not in ("verify", "dump", "force")}


def build(
    model: str | Path | torch.nn.Module,
    target: str = "native",
    *,
    out: str | Path,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    host: str | None = None,
    head: str | None = None,
    logits: str | None = None,
    layout: str = "auto",
    context: int | None = None,
    offload: str | None = None,
    fallback: str | None = None,
    activations: str | None = None,
    i2s_order: str | None = None,
    verify: bool = True,
    dump: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Compile ``model`` into the folder ``out``.

    ``model``: a Hugging Face checkpoint folder or hub id, an ``.onnx`` or ``.gguf`` file,
    ``MODULE:FACTORY``, or a torch module with ``example_inputs`` (a tensor, or a tuple or dict of
    arguments) and, if not only first dimensions are dynamic, ``dynamic_shapes`` as
    ``torch.export.export`` takes them. The other options are those of :class:`BuildOptions`;
    ``progress`` is called with the name of each phase. Either a whole, verified artifact is
    written or nothing. Raises UsageError, InputError, ToolchainError or VerificationError (see
    :mod:`bitcompile.errors`).
    """
    folder = None if dump is None else Path(dump)
    options = BuildOptions(
        target,
        host,
        head,
        logits,
        layout,
        context,
        offload,
        fallback,
        activations,
        i2s_order,
        verify,
        folder,
        force,
    )
    return run(model, Path(out), options, progress, example_inputs, dynamic_shapes)


def run(
    model: str | Path | torch.nn.Module,
    out: Path,
    options: BuildOptions,
    progress: Progress = silent,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> Artifact:
    """:func:`build` with its choices in one value."""
    from bitcompile.targets import resolve

    artifacts.check_output(out, options.force)
    target = resolve(options.target, options.host, options.of_target)
    _require_toolchain(target)

    # These need the build extra, which the line above has asked for.
    from bitcompile.frontends.surroundings import quiet

    with quiet():
        return _run(model, out, options, target, progress, example_inputs, dynamic_shapes)


def _run(
    model: str | Path | torch.nn.Module,
    out: Path,
    options: BuildOptions,
    target: Target,
    progress: Progress,
    example_inputs: Any,
    dynamic_shapes: Any,
) -> Artifact:
    from bitcompile import frontends
    from bitcompile.lower import lower
    from bitcompile.passes import finishing, pipeline

    asked = options.head
    options = options.resolved(frontends.is_checkpoint(model), target)
    imported = frontends.load(
        model,
        options.context,
        progress,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        i2s_order=options.i2s_order,
    )
    graph = imported.graph
    progress("rewriting the graph")
    steps = pipeline(passing.Options(str(options.head), str(options.logits)))
    records = imported.records + passing.run(graph, steps, options.dump)
    if asked in ("q8", "q4"):
        _require_head(records, asked)
    progress(f"compiling for {target.name}")
    lowered = lower(graph, target, options.layout)
    # Attention asks for narrow activations; other models keep the types of their inputs.
    activations = target.activations if imported.language is not None else "float32"
    after = finishing(activations)
    records += passing.run(lowered.graph, after, options.dump, first=len(steps) + 1)
    with artifacts.staged(out, options.force) as folder:
        made = artifacts.write(
            folder,
            imported,
            lowered,
            options=replace(options, activations=activations).recorded(),
            passes=_report(records),
            inspection=inspection.inspect_graph(lowered.graph),
            progress=progress,
        )
        if options.verify:
            # For another machine, the functions in the model stand in for the plugin.
            plugin = target.can_run_here() is None
            report = verification.verify(made, progress, plugin=plugin)
            made.with_verification(report.to_dict())
    return Artifact.open(out)


def _require_head(records: Sequence[passing.Record], asked: str) -> None:
    """Raises UsageError if a head was asked for and the model has no table that could be one."""
    made = next(record for record in records if record.name == "quantize-head")
    if not made.count:
        why = f": {made.refusals[0].reason}" if made.refusals else ""
        raise UsageError(
            f"the model has no embedding or head for --head {asked}{why}; leave out --head"
        )


def export(
    model: str | Path | torch.nn.Module,
    out: str | Path,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    context: int | None = None,
    i2s_order: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write ``model`` (as :func:`build` takes it) in portable form to the file ``out``.

    The file runs in plain onnxruntime through the functions it carries, and :func:`build` takes
    it for any target. Models above :data:`INLINE_LIMIT` bytes get a second file, ``out`` with
    ``.data`` after it. Raises UsageError, InputError or ToolchainError; then nothing is written.
    """
    out = Path(out)
    _check_file(out, force)
    try:
        import onnx_ir  # noqa: F401
    except ImportError:
        raise ToolchainError('exporting needs pip install "bitcompile[build]"') from None
    from bitcompile import frontends
    from bitcompile.frontends.surroundings import quiet
    from bitcompile.passes import finishing

    with quiet():
        imported = frontends.load(
            model,
            context,
            progress,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            i2s_order=i2s_order,
        )
        passing.run(imported.graph, finishing())
        progress("writing the model")
        _save(imported.graph, out)
    return out


INLINE_LIMIT = 1 << 30
"""Bytes of weights that fit into one ONNX file (protobuf takes less than 2 GiB)."""


def _check_file(out: Path, force: bool) -> None:
    if out.suffix != ".onnx":
        raise UsageError(f"{out} does not end in .onnx: choose such a name")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.absolute().parent} is not a folder: make it first")
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists: add --force to replace it, or choose another output")


def _save(graph: ir.Model, out: Path) -> None:
    """Write beside ``out`` and rename, so that no half file is left."""
    import onnx_ir as ir

    tensors = (value.const_value for value in graph.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    data = f"{out.name}.data" if size > INLINE_LIMIT else None
    with (
        writing(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder,
    ):
        ir.save(graph, Path(folder) / out.name, external_data=data)
        for name in (data, out.name):
            if name is not None:
                (Path(folder) / name).replace(out.with_name(name))


def _require_toolchain(target: Target) -> None:
    missing = target.can_build_here()
    if missing is not None:
        raise ToolchainError(f"cannot build for {target.name} here: {missing}")


def _report(records: Iterable[passing.Record]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]
