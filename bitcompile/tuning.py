"""The best schedule for the machine at hand, found by timing every one of a small space.

:func:`tune` compiles the space and times it in a child process, so that a crash or a throttled
thread of one candidate ends there; :func:`measure` is what the child runs (``python -m
bitcompile.tuning SPEC``). Only numpy is needed there.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile.artifact import Progress, silent
from bitcompile.errors import ToolchainError, VerificationError
from bitcompile.packing import layout

COLUMNS = 2560
"""Of every matrix that is multiplied."""
BLOCK_ROWS = 256
"""Rows of random weights, repeated to fill the memory."""
PREFILL_ROWS, PREFILL_TOKENS = 1024, 192
DOT_STEPS = 100_000
BYTES = 640 << 20
"""Weights that decode candidates read: more than any cache keeps."""
Call = Mapping[str, Any]


GAIN = 0.02
"""A schedule must be faster than the present one by this to take its place."""


def tune(
    out: Path | None = None,
    threads: int | None = None,
    repeat: int = 7,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time every schedule of this CPU's best kernel variant and remember the fastest in ``out``.

    ``out``: a presets file (None: the one in the cache folder, which builds read); ``threads``:
    that decode together (None: every CPU this process may use). Returns ``cpu``, ``isa``, the
    chosen ``gemv`` and ``gemm``, and ``candidates``: ``kind``, ``layout``, ``point`` and ``rate``
    (bytes or multiply-accumulates a second) of each, the machine's roofs (kinds ``read`` and
    ``dot``) among them. Raises ToolchainError without the build tools or for a machine that is no
    x86-64 Linux, InputError or UsageError, before anything is measured, for a file that cannot be
    read or written, VerificationError if a schedule changes a result.
    """
    from bitcompile.targets import resolve

    target = resolve("x86")
    missing = target.can_run_here() or target.can_build_here()
    if missing is not None:
        raise ToolchainError(f"cannot tune here: {missing}")
    from bitcompile.targets.machine import cpu_flags, cpu_model
    from bitcompile.targets.tir import presets
    from bitcompile.targets.tir.plugin import cache_dir
    from bitcompile.targets.tir.space import compile_space
    from bitcompile.targets.tir.x86 import ISAS

    out = out or cache_dir() / presets.NAME
    presets.prepare(out)
    flags = {flag.replace("_", "") for flag in cpu_flags()}
    isa = next(isa for isa in ISAS if flags.issuperset(isa.features))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "space.so"
        progress(f"compiling the space of {isa.name}")
        calls = compile_space(isa, target.host, library)
        progress(f"measuring {len(calls)} kernels")
        spec = {"library": str(library), "calls": calls, "repeat": repeat, "bytes": BYTES}
        spec["threads"] = threads or len(os.sched_getaffinity(0))
        results = _in_child(spec, Path(folder) / "spec.json")
    chosen = choose(calls, results)
    presets.remember(out, cpu_model(), isa.name, chosen)
    return {"cpu": cpu_model(), "isa": isa.name, **chosen, "candidates": rates(calls, results)}


def _in_child(spec: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    path.write_text(json.dumps(spec), "utf-8")
    command = [sys.executable, "-m", "bitcompile.tuning", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise ToolchainError(f"measuring failed ({reason}): free memory and tune again")
    return dict(json.loads(done.stdout))


def choose(calls: Sequence[Call], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fastest point of each kind over all layouts; the first (present) one unless beaten.

    Raises VerificationError if two points of a kind gave different results.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for kind in ("gemv", "gemm"):
        mine = [call for call in calls if call["kind"] == kind]
        if len({results[call["symbol"]]["digest"] for call in mine}) > 1:
            raise VerificationError(f"schedules of {kind} differ in their results: report this")
        scores: dict[str, float] = {}
        first: dict[str, float] = {}
        for call in mine:
            point = json.dumps(call["point"], sort_keys=True)
            seconds = statistics.median(results[call["symbol"]]["seconds"])
            relative = seconds / first.setdefault(call["layout"], seconds)
            scores[point] = scores.get(point, 0.0) + relative
        present = next(iter(scores))
        best = min(scores, key=scores.__getitem__)
        kept = best if scores[best] < scores[present] * (1 - GAIN) else present
        chosen[kind] = json.loads(kept)
    return chosen


def rates(calls: Sequence[Call], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each call's ``kind``, ``layout``, ``point`` and median ``rate``."""
    rows = []
    for call in calls:
        found = results[call["symbol"]]
        rate = found["work"] / statistics.median(found["seconds"])
        row = {"kind": call["kind"], "layout": call.get("layout"), "point": call.get("point")}
        rows.append({**row, "rate": rate})
    return rows


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and a digest of the outputs of every call of ``spec``.

    ``spec``: ``library`` (path), ``calls`` (of ``space.compile_space``), ``threads``, ``repeat``,
    ``bytes`` (of weights that decode reads, more than any cache). Repeats are interleaved. Returns
    ``{symbol: {"seconds": [...], "digest": text, "work": bytes or multiply-accumulates}}``.
    """
    library = ctypes.CDLL(str(spec["library"]))
    memory = _Memory(int(spec["bytes"]))
    results: dict[str, Any] = {}
    families: dict[tuple[str, str], list[Call]] = {}
    for call in spec["calls"]:
        families.setdefault((call["kind"], call.get("layout", "")), []).append(call)
    for (kind, _), calls in families.items():
        prepared = {c["symbol"]: _PREPARE[kind](library, c, spec, memory) for c in calls}
        for symbol, (run, work, digest) in prepared.items():
            run()
            results[symbol] = {"seconds": [], "work": work, "digest": digest()}
        for _ in range(spec["repeat"]):
            for symbol, (run, _, _) in prepared.items():
                began = time.perf_counter()
                run()
                results[symbol]["seconds"].append(time.perf_counter() - began)
    return results


class _Memory:
    """Weights in small pages, as a model file is mapped."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self._held = ""

    def weights(self, id: str) -> int:
        """Fill with random weights of a layout; the number of 16-row tiles that fit.

        Costs nothing where they are there already: timed calls ask for them too.
        """
        tile = layout(id)
        size = BLOCK_ROWS // tile.tile_n * -(-COLUMNS // tile.tile_k) * tile.tile_bytes
        count = len(self.bytes) // size
        if self._held != id:
            codes = np.random.default_rng(0).integers(0, 3, (BLOCK_ROWS, COLUMNS))
            block = tile.encode(codes.astype(np.uint8)).ravel()
            self.bytes[: count * size].reshape(count, size)[:] = block
            self._held = id
        return count * BLOCK_ROWS // tile.tile_n


Prepared = tuple[Callable[[], None], float, Callable[[], str]]


def _pointer(array: np.ndarray[Any, Any], offset: int = 0) -> ctypes.c_void_p:
    """Its address, ``offset`` bytes on; keeps the array alive."""
    return array.reshape(-1).view(np.uint8)[offset:].ctypes.data_as(ctypes.c_void_p)


def _in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run every task on a thread of its own; ctypes releases the interpreter's lock."""
    others = [threading.Thread(target=task) for task in tasks[1:]]
    for thread in others:
        thread.start()
    tasks[0]()
    for thread in others:
        thread.join()


def _activations(M: int, Kp: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Quantised rows, their sums and scales, as the row kernels leave them; 16 rows more."""
    rng = np.random.default_rng(1)
    q = np.zeros((M + 16, Kp), np.int8)
    q[:M, :COLUMNS] = rng.integers(-127, 128, (M, COLUMNS))
    sums = q.sum(axis=1, dtype=np.int32)
    return q, sums, np.linspace(1, 2, M + 16, dtype=np.float32)


def _product(
    function: Any, operands: Sequence[Any], sizes: Sequence[int], *rest: Any
) -> Callable[[], None]:
    """A call of a kernel; its arguments are made before it is timed."""
    w, q, sums, s, scale, y = operands
    rows, ldy, tiles, M, KB = (ctypes.c_int32(v) for v in sizes)
    none, no = ctypes.c_void_p(0), ctypes.c_int32(0)
    arguments = (w, q, sums, s, scale, none, none, y, rows, ldy, no, no, tiles, M, KB, *rest)
    return partial(function, *arguments)


def _gemv(library: Any, call: Call, spec: Mapping[str, Any], memory: _Memory) -> Prepared:
    function, tile = library[call["symbol"]], layout(call["layout"])
    tiles, threads = memory.weights(tile.id), int(spec["threads"])
    KB = -(-COLUMNS // tile.tile_k)
    q, sums, s = _activations(1, KB * tile.tile_k)
    share, N = tiles // threads, tiles * tile.tile_n
    scale, y = np.full(N, 0.02, np.float32), np.zeros(N, np.float32)

    def part(i: int) -> Callable[[], None]:
        first = i * share
        n, row_bytes = first * tile.tile_n, KB * tile.tile_bytes
        operands = [_pointer(memory.bytes, first * row_bytes)]
        operands += [_pointer(v) for v in (q, sums, s)]
        operands += [_pointer(v, n * 4) for v in (scale, y)]
        sizes = [share * tile.tile_n, N, share, 1, KB]
        return _product(function, operands, sizes)

    tasks = [part(i) for i in range(threads)]

    def run() -> None:
        memory.weights(tile.id)
        _in_threads(tasks)

    return run, float(share * threads * KB * tile.tile_bytes), lambda: _digest(y[:BLOCK_ROWS])


def _gemm(library: Any, call: Call, spec: Mapping[str, Any], memory: _Memory) -> Prepared:
    function, tile, point = library[call["symbol"]], layout(call["layout"]), call["point"]
    memory.weights(tile.id)
    KB, M = -(-COLUMNS // tile.tile_k), PREFILL_TOKENS
    q, sums, s = _activations(M, KB * tile.tile_k)
    blocks = -(-M // point["rows"])
    panel = np.zeros(call["panel"] + 64, np.uint8)
    kept = np.zeros(call["partial"] * blocks + 16, np.int32)
    scale = np.full(PREFILL_ROWS, 0.02, np.float32)
    y = np.zeros((M, PREFILL_ROWS), np.float32)
    panel_at = _pointer(panel, -panel.ctypes.data % 64)
    kept_at = _pointer(kept, -kept.ctypes.data % 64)
    steps = []
    for first in range(0, PREFILL_ROWS // tile.tile_n, point["tiles"]):
        n = first * tile.tile_n
        operands = [_pointer(memory.bytes, first * KB * tile.tile_bytes)]
        operands += [_pointer(v) for v in (q, sums, s)]
        operands += [_pointer(scale, n * 4), _pointer(y, n * 4)]
        count = min(point["tiles"], PREFILL_ROWS // tile.tile_n - first)
        sizes = [PREFILL_ROWS - n, PREFILL_ROWS, count, M, KB]
        steps.append(_product(function, operands, sizes, panel_at, kept_at))

    def run() -> None:
        for step in steps:
            step()

    return run, float(PREFILL_ROWS * COLUMNS * M), lambda: _digest(y)


def _read(library: Any, call: Call, spec: Mapping[str, Any], memory: _Memory) -> Prepared:
    function, threads = library[call["symbol"]], int(spec["threads"])
    memory.weights("i2_n16k16")
    share = len(memory.bytes) // threads // 4096 * 4096
    outs = np.zeros((threads, 64), np.uint8)

    def part(i: int) -> Callable[[], None]:
        at, out = _pointer(memory.bytes, i * share), _pointer(outs, i * 64)
        return lambda: function(at, out, ctypes.c_int32(share // 256))

    tasks = [part(i) for i in range(threads)]
    return lambda: _in_threads(tasks), float(share * threads), lambda: ""


def _dot(library: Any, call: Call, spec: Mapping[str, Any], memory: _Memory) -> Prepared:
    function, seed, out = library[call["symbol"]], np.full(256, 0x55, np.uint8), np.zeros(16, "i4")
    steps = ctypes.c_int32(DOT_STEPS)
    return (
        lambda: function(_pointer(seed), _pointer(out), steps),
        float(call["macs"] * DOT_STEPS),
        lambda: "",
    )


_PREPARE: Mapping[str, Callable[..., Prepared]] = {
    "read": _read,
    "dot": _dot,
    "gemv": _gemv,
    "gemm": _gemm,
}


def _digest(y: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(y.tobytes()).hexdigest()[:16]


def main() -> None:
    """The child process: measure a spec file, print JSON."""
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    json.dump(measure(spec), sys.stdout)


if __name__ == "__main__":
    main()
