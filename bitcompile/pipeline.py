"""The build: a model becomes an artifact, one line a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcompile import artifact as artifacts
from bitcompile import inspection, passing, verification
from bitcompile.artifact import Artifact, Progress, silent
from bitcompile.errors import ToolchainError, UsageError

if TYPE_CHECKING:
    from bitcompile.target import Target


@dataclass(frozen=True)
class BuildOptions:
    """Every choice of a build; the command line's options are these fields."""

    target: str = field(default="native", metadata={"help": "Target, see `bitcompile targets`."})
    host: str | None = field(
        default=None, metadata={"help": "Triple of the machine that will load the plugin."}
    )
    head: str = field(
        default="q8",
        metadata={
            "choices": passing.HEADS,
            "help": "Embedding and head table: 8 or 4 bits a weight, or floats.",
        },
    )
    logits: str = field(
        default="last",
        metadata={
            "choices": passing.LOGITS,
            "help": "Logits of the last position only, or of all.",
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
    verify: bool = field(
        default=True, metadata={"help": "Verify the artifact if this machine can run it."}
    )
    dump: Path | None = field(
        default=None, metadata={"help": "Folder for the graph after each pass, as text."}
    )
    force: bool = field(default=False, metadata={"help": "Replace an artifact that exists."})

    def __post_init__(self) -> None:
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices and value not in choices:
                raise UsageError(f"{option.name} must be one of {', '.join(choices)}, not {value}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"context must be 1 or more, not {self.context}")

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: the choices that shape the artifact."""
        return {k: v for k, v in asdict(self).items() if k not in ("verify", "dump", "force")}


def build(
    model: str | Path,
    target: str = "native",
    *,
    out: str | Path,
    host: str | None = None,
    head: str = "q8",
    logits: str = "last",
    layout: str = "auto",
    context: int | None = None,
    verify: bool = True,
    dump: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Compile ``model``, a Hugging Face checkpoint folder or hub id, into the folder ``out``.

    The options are those of :class:`BuildOptions`; ``progress`` is called with the name of each
    phase. Either a whole, verified artifact is written or nothing. Raises UsageError, InputError,
    ToolchainError or VerificationError (see :mod:`bitcompile.errors`).
    """
    folder = None if dump is None else Path(dump)
    options = BuildOptions(target, host, head, logits, layout, context, verify, folder, force)
    return run(str(model), Path(out), options, progress)


def run(model: str, out: Path, options: BuildOptions, progress: Progress = silent) -> Artifact:
    """:func:`build` with its choices in one value."""
    from bitcompile.targets import resolve

    artifacts.check_output(out, options.force)
    target = resolve(options.target, options.host)
    _require_toolchain(target)

    # These need the build extra, which the line above has asked for.
    from bitcompile.frontends import huggingface
    from bitcompile.lower import lower
    from bitcompile.passes import finishing, pipeline

    imported = huggingface.load(model, options.context, progress)
    graph = imported.graph
    progress("rewriting the graph")
    steps = pipeline(passing.Options(options.head, options.logits))
    records = passing.run(graph, steps, options.dump)
    progress(f"compiling for {target.name}")
    lowered = lower(graph, target, options.layout)
    records += passing.run(lowered.graph, finishing(), options.dump, first=len(steps) + 1)
    with artifacts.staged(out, options.force) as folder:
        made = artifacts.write(
            folder,
            imported,
            lowered,
            options=options.recorded(),
            passes=_report(records),
            inspection=inspection.inspect_graph(lowered.graph),
            progress=progress,
        )
        if options.verify and target.can_run_here() is None:
            made.with_verification(verification.verify(made, progress).to_dict())
    return Artifact.open(out)


def _require_toolchain(target: Target) -> None:
    missing = target.can_build_here()
    if missing is not None:
        raise ToolchainError(f"cannot build for {target.name} here: {missing}")


def _report(records: Iterable[passing.Record]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]
