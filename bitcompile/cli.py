"""The command line: click on top of the library, nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from bitcompile import __version__
from bitcompile.artifact import Artifact, Progress
from bitcompile.companions import missing_tokenizer
from bitcompile.errors import BitcompileError, InputError, UsageError
from bitcompile.frontends.gguf_ternary import I2S_ORDERS
from bitcompile.generate import Sampling, TextModel, run_tensors
from bitcompile.inspection import aligned, format_report, inspect
from bitcompile.pipeline import BuildOptions
from bitcompile.pipeline import export as export_model
from bitcompile.pipeline import run as run_build
from bitcompile.runtime import host_mismatch

INTERNAL = 5
"""Exit code of an error nobody foresaw."""

Command = Callable[..., Any]


# --- errors and progress ------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 good, else the error's code and one line on stderr."""
    # A terminated build cleans up like an interrupted one.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with cli.make_context("bitcompile", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as finished:  # --help and --version
        sys.exit(finished.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left, and so do we
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        _fail(error, debug="--debug" in arguments)
    sys.exit(0)


def _fail(error: Exception, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BitcompileError):
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    text = " ".join(str(error).split())
    hint = "" if debug else "; run again with --debug and report it"
    click.echo(f"internal error: {type(error).__name__}: {text}{hint}", err=True)
    sys.exit(INTERNAL)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A callback that shows the current phase and its time on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    line = _StatusLine()
    line.start()
    try:
        yield line.show
    finally:
        line.stop()


class _StatusLine(threading.Thread):
    """One line on stderr, drawn again ten times a second."""

    FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stream = sys.stderr  # an exporter may redirect it for a while
        self._text = ""
        self._since = time.monotonic()
        self._done = threading.Event()

    def show(self, text: str) -> None:
        """Begin a phase."""
        self._text, self._since = text, time.monotonic()

    def run(self) -> None:
        """Draw until :meth:`stop`."""
        frame = 0
        while not self._done.wait(0.1):
            seconds = time.monotonic() - self._since
            mark = self.FRAMES[frame % len(self.FRAMES)]
            self._stream.write(f"\r\033[K{mark} {self._text} ({seconds:.0f} s)")
            self._stream.flush()
            frame += 1

    def stop(self) -> None:
        """Clear the line."""
        self._done.set()
        self.join()
        self._stream.write("\r\033[K")
        self._stream.flush()


# --- options ------------------------------------------------------------------------------------

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_debug = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
)
MOST_THREADS = 1024
"""More are a mistake, and onnxruntime cannot be interrupted while it starts them."""


def _threads(default: str) -> Callable[[Command], Command]:
    count = click.IntRange(min=1, max=MOST_THREADS)
    return click.option("--threads", type=count, help=f"Threads [default: {default}].")


_artifact = click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))


def _options_of(configuration: type) -> Callable[[Command], Command]:
    """One click option for each field of a frozen dataclass: name, type, default and help."""

    def decorate(command: Command) -> Command:
        kinds = typing.get_type_hints(configuration)
        for option in reversed(dataclasses.fields(configuration)):
            command = _option(option, kinds[option.name])(command)
        return command

    return decorate


def _option(option: dataclasses.Field[Any], kind: Any) -> Callable[[Command], Command]:
    name, default = option.name.replace("_", "-"), option.default
    help = option.metadata["help"]
    if kind is bool:
        flag = f"--no-{name}" if default else f"--{name}"
        help = f"Do not {help[0].lower()}{help[1:]}" if default else help
        return click.option(
            flag, option.name, is_flag=True, flag_value=not default, default=default, help=help
        )
    choices = option.metadata.get("choices")
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if choices:
        kind = click.Choice(choices)
    elif kind is Path:
        kind = click.Path(path_type=Path)
    return click.option(
        f"--{name}",
        option.name,
        type=kind,
        default=default,
        help=help,
        show_default=default is not None,
    )


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


# --- commands -----------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bitcompile")
@_debug
def cli() -> None:
    """Compile ternary (BitNet) models into exact, fast ONNX Runtime artifacts."""


@cli.command()
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@_options_of(BuildOptions)
@_json
@_debug
def build(model: str, out: Path, as_json: bool, **choices: Any) -> None:
    """Compile MODEL into an artifact.

    MODEL is a Hugging Face checkpoint folder or hub id, an .onnx or .gguf file, or MODULE:FACTORY,
    a function that returns (module, example_inputs[, dynamic_shapes]) of torch.
    """
    options = BuildOptions(**choices)
    before = _source_bytes(model)
    start = time.monotonic()
    with _progress() as progress:
        made = run_build(model, out, options, progress)
    seconds = round(time.monotonic() - start, 1)
    after = sum(entry["bytes"] for entry in made.manifest["files"].values())
    if as_json:
        _print_json(
            {
                "artifact": str(out),
                "seconds": seconds,
                "source_bytes": before,
                "artifact_bytes": after,
                **made.manifest,
            }
        )
        return
    _print_built(made, before, after, seconds)


def _source_bytes(model: str) -> int | None:
    """Size of a local checkpoint's weights, or of a file."""
    path = Path(model)
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
    return sum(file.stat().st_size for file in files) or None


def _print_built(made: Artifact, before: int | None, after: int, seconds: float) -> None:
    report = made.manifest["inspection"]
    verified = made.manifest["verification"]
    elsewhere = host_mismatch(made.manifest["target"]["host"])
    smaller = report["compression"]["vs_fp32"]
    rows = [
        ["artifact", f"{made.path} ({made.manifest['target']['name']}, {seconds} s)"],
        ["size", f"{after / 1e6:,.1f} MB"],
        ["as float32", f"{4 * report['parameters']['total'] / 1e6:,.1f} MB"],
        ["verified", verified["summary"] if verified else "no"],
    ]
    if before is not None:
        rows.insert(1, ["checkpoint", f"{before / 1e6:,.1f} MB"])
    if smaller is not None:
        rows.insert(
            -1,
            [
                "ternary",
                f"{report['bytes']['ternary'] / 1e6:,.1f} MB, "
                f"{smaller:.1f} times smaller than float32",
            ],
        )
    if elsewhere:
        rows.append(["not here", f"the plugin did not run: {elsewhere}"])
    elif made.manifest["language"] is not None:
        rows.append(_how_to_try(made))
    load = "" if elsewhere else f'bitcompile.load("{made.path}"), or '
    rows.append(["use", f"{load}see {made.path / 'README.md'}"])
    click.echo("\n".join(aligned(rows)))


def _how_to_try(made: Artifact) -> list[str]:
    """A row of what was built: how to run it, or what onnxruntime-genai lacks for that."""
    if missing := missing_tokenizer(made.manifest["language"]["tokenizer_files"]):
        names = " and ".join(missing)
        return ["no text", f"`bitcompile run` needs {names}: add to the model and build again"]
    return ["try", f'bitcompile run {made.path} --prompt "Once upon a time"']


@cli.command()
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="The .onnx file to write."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of the KV cache [default: 4096 or the model's limit].",
)
@click.option(
    "--i2s-order",
    type=click.Choice(tuple(I2S_ORDERS)),
    help="Order of I2_S codes, where a .gguf file cannot tell it.",
)
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@_debug
def export(model: str, out: Path, context: int | None, i2s_order: str | None, force: bool) -> None:
    """Write MODEL as one portable .onnx file, which runs in plain onnxruntime.

    MODEL is MODULE:FACTORY, a function that returns (module, example_inputs[, dynamic_shapes]) of
    torch, or anything that `bitcompile build` takes.
    """
    with _progress() as progress:
        written = export_model(
            model, out, context=context, i2s_order=i2s_order, force=force, progress=progress
        )
    rows = [
        ["model", f"{written} ({written.stat().st_size / 1e6:,.1f} MB)"],
        ["use", f"onnxruntime.InferenceSession({str(written)!r})"],
        ["compile", f"bitcompile build {written} -o OUT"],
    ]
    click.echo("\n".join(aligned(rows)))


@cli.command()
@_artifact
@click.option("--prompt", help="Text to continue.")
@click.option("--chat", is_flag=True, help="Talk with the model; end with Ctrl-D.")
@click.option(
    "--input", "source", type=click.Path(path_type=Path), help="Arrays for the inputs (.npz)."
)
@click.option(
    "--output", "destination", type=click.Path(path_type=Path), help="Where the outputs go (.npz)."
)
@click.option(
    "-n", "--tokens", default=Sampling.tokens, show_default=True, help="Most tokens of an answer."
)
@click.option("--temperature", default=Sampling.temperature, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=Sampling.top_p, show_default=True, help="Probability mass kept.")
@click.option(
    "--top-k", default=Sampling.top_k, show_default=True, help="Candidates kept, 0 for all."
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--check/--no-check", default=True, help="Check the files' SHA-256 first.")
@_threads("the runtime's choice")
@_debug
def run(
    artifact: Path,
    prompt: str | None,
    chat: bool,
    source: Path | None,
    destination: Path | None,
    check: bool,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Run ARTIFACT: continue a text, chat, or compute arrays."""
    modes = [prompt is not None, chat, source is not None]
    if sum(modes) != 1:
        raise UsageError("give one of --prompt, --chat and --input")
    if (source is None) != (destination is None):
        raise UsageError("--input and --output belong together")
    choices = Sampling(**sampling)
    opened = Artifact.open(artifact)
    with _progress() as progress:
        if check:
            opened.check_hashes(progress)
        else:
            opened.check_sizes()
    if source is not None and destination is not None:
        shapes = run_tensors(opened, source, destination, threads)
        click.echo("\n".join(aligned([[k, str(list(v))] for k, v in shapes.items()])), err=True)
        return
    model = TextModel(opened, threads)
    if prompt is not None:
        _stream(model.stream(prompt, choices))
        if model.full:
            click.echo(f"(the context of {model.context} tokens is full)", err=True)
    else:
        _chat(model, choices)


def _stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


def _chat(model: TextModel, sampling: Sampling) -> None:
    """Read messages from stdin until it ends; a full context ends the talk with an error."""
    conversation = model.chat(sampling)
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            click.echo("> ", nl=False)
            sys.stdout.flush()
        message = sys.stdin.readline()
        if not message:
            return
        if not message.strip():
            continue
        _stream(conversation.say(message.rstrip("\n")))
        if conversation.full:
            raise InputError(
                f"the context of {model.context} tokens is full: start again, "
                "or build with a larger --context"
            )


@cli.command()
@_artifact
@click.option("--isa", help="Kernel variant, or `all` this machine can run.")
@click.option("--fallback", is_flag=True, help="Verify the fallback functions, not the plugin.")
@_json
@_debug
def verify(artifact: Path, isa: str | None, fallback: bool, as_json: bool) -> None:
    """Check that ARTIFACT is undamaged and computes what its model means."""
    from bitcompile import verification

    if fallback and isa is not None:
        raise UsageError("--isa names a variant of the plugin, which --fallback leaves out")
    opened = Artifact.open(artifact)
    isas = verification.variants(opened) if isa == "all" else [isa]
    with _progress() as progress:
        reports = [
            verification.verify(opened, progress, isa=name, plugin=not fallback) for name in isas
        ]
    if as_json:
        dicts = [report.to_dict() for report in reports]
        _print_json(dicts[0] if isa != "all" else dicts)
        return
    for report in reports:
        rows = [["operator", "N", "K", "largest difference"]]
        rows += [
            [n.name or n.op, *map(str, n.shape), "none" if n.exact else f"{n.max_difference:.1e}"]
            for n in report.nodes
        ]
        click.echo("\n".join(aligned(rows, right=True)))
        variant = f"{report.isa}: " if report.isa else ""
        click.echo(f"good: {variant}{report.summary} ({report.seconds:.1f} s)")


@cli.command()
@_artifact
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option(
    "--decode",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens generated after it.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Repeats; medians count.",
)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    help="Tokens in the KV cache when decoding begins [default: the prompt's].",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences decoded together; all their tokens count.",
)
@click.option("--ops", is_flag=True, help="Also time each kind of operator.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the result into a .png or .svg file (needs matplotlib).",
)
@_threads("every CPU this process may use")
@_json
@_debug
def bench(
    artifact: Path,
    prefill: int,
    decode: int,
    repeat: int,
    context: int | None,
    batch: int,
    ops: bool,
    plot: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure tokens per second, bytes per token and the share of the machine's roof."""
    from bitcompile import bench_plot
    from bitcompile.bench import bench as measure

    if plot is not None:
        bench_plot.check(plot)
    opened = Artifact.open(artifact)
    opened.check_sizes()
    with _progress() as progress:
        result = measure(opened, prefill, decode, threads, repeat, progress, context, batch, ops)
    if plot is not None:
        bench_plot.plot(result, plot)
    if as_json:
        _print_json(result)
        return
    operators = result.pop("operators", [])
    click.echo("\n".join(aligned([[k.replace("_", " "), _number(v)] for k, v in result.items()])))
    if operators:
        click.echo("\n" + "\n".join(aligned(_operator_table(operators), right=True)))
    if not result["trustworthy"]:
        click.echo(
            "this machine was too noisy: its read roof changed by "
            f"{result['read_roof_spread']:.0%} between repeats; run it again alone",
            err=True,
        )


def _operator_table(operators: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["operator", "nodes", "ms a step", "MB", "GB/s", "of the roof"]]
    for row in operators:
        rate = row["bytes"] / row["seconds"] / 1e9 if row["seconds"] > 0 else 0.0
        reads = [f"{row['bytes'] / 1e6:.1f}", f"{rate:.1f}", f"{row['roof_share']:.0%}"]
        known = reads if row["bytes"] else ["", "", ""]
        rows.append([row["op"], str(row["nodes"]), f"{1e3 * row['seconds']:.3f}", *known])
    return rows


@cli.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Presets file to add to [default: the one in the cache folder, which builds read].",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Repeats; medians count.",
)
@_threads("every CPU this process may use")
@_json
@_debug
def tune(out: Path | None, repeat: int, threads: int | None, as_json: bool) -> None:
    """Find the fastest kernel schedules for this CPU; later builds use them."""
    from bitcompile.tuning import tune as search

    with _progress() as progress:
        result = search(out, threads, repeat, progress)
    if as_json:
        _print_json(result)
        return
    for kind in ("gemv", "gemm"):
        chosen = ", ".join(f"{name} {value}" for name, value in result[kind].items())
        click.echo(f"{kind}  {chosen}")
    click.echo(f"remembered for {result['isa']} on {result['cpu']}")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_number, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@cli.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@_json
@_debug
def inspect_command(path: Path, as_json: bool) -> None:
    """Show operators, bytes by kind and shapes of an artifact, .onnx file or checkpoint."""
    report = inspect(path)
    if as_json:
        _print_json(report)
    else:
        click.echo(format_report(report))


@cli.command()
@_json
@_debug
def targets(as_json: bool) -> None:
    """List every target and what this machine can do with it."""
    from bitcompile.targets import TARGETS

    table = [_target_row(name, target) for name, target in TARGETS.items()]
    if as_json:
        _print_json(table)
        return
    rows = [["target", "device", "host", "variants", "build here", "run here", "emits"]]
    rows += [
        [
            t["name"],
            t["device"],
            t["host"],
            ",".join(t["isas"]),
            _yes(t["cannot_build"]),
            _yes(t["cannot_run"]),
            t["emits"],
        ]
        for t in table
    ]
    click.echo("\n".join(aligned(rows)))


def _target_row(name: str, target: Any) -> Mapping[str, Any]:
    cannot_build, cannot_run = target.can_build_here(), target.can_run_here()
    return {
        "name": name,
        "device": target.device,
        "host": target.host,
        "isas": list(target.isas),
        "layouts": list(target.layouts),
        "library": target.library,
        "emits": target.emits,
        "can_build": cannot_build is None,
        "can_run": cannot_run is None,
        "cannot_build": cannot_build,
        "cannot_run": cannot_run,
    }


def _yes(missing: str | None) -> str:
    return "yes" if missing is None else f"no: {missing}"


if __name__ == "__main__":
    main()
