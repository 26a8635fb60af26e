"""How fast an artifact is on this machine, against what the machine can do.

Machines are noisy: every repeat measures the roofs (memory reads, integer dot products) beside the
model, medians are reported, and the shares compare figures of one run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitcompile import cuda_bench, runtime
from bitcompile.artifact import Artifact, Progress, silent
from bitcompile.bench_ops import measure_operators
from bitcompile.companions import PROVIDERS
from bitcompile.decoder import BYTES, Decoder, kv_bytes
from bitcompile.errors import InputError, ToolchainError, UsageError
from bitcompile.roof import roof_session

ROOF_BYTES = 768 << 20
"""Read by the memory roof: far more than any cache."""
DOT_STEPS = 200_000
WARM_UP_TOKENS = 4
WARM_PREFILL = 16
"""Longest prefill that is run once more before it is timed; longer ones warm up by themselves."""
SETTLE_S = 0.05
"""Longer than the threads of another session spin after its run: they would share our cores."""
NOISY = 0.2
"""Spread of the read roof (max - min over median) above which figures are not to be trusted."""


def bench(
    artifact: Artifact,
    prefill: int = 512,
    decode: int = 128,
    threads: int | None = None,
    repeat: int = 5,
    progress: Progress = silent,
    context: int | None = None,
    batch: int = 1,
    ops: bool = False,
) -> dict[str, Any]:
    """Measure an artifact; the keys are those of ``bitcompile bench --json``.

    ``prefill`` and ``decode``: tokens of a measurement; ``threads``: intra-op threads (None: every
    CPU this process may use); ``repeat``: interleaved repeats; ``context``: tokens in the cache
    when decoding begins (None: the prefill's); ``batch``: sequences decoded together, whose tokens
    all count; ``ops``: also the time of each kind of operator (:mod:`bitcompile.bench_ops`). Rates
    are medians. An artifact for CUDA is measured on the GPU (:mod:`bitcompile.cuda_bench`). Raises
    InputError for an artifact without a language model, UsageError for sizes it cannot hold or
    ``ops`` on a GPU, ToolchainError for a plugin without CPU kernels, a machine that cannot run it
    or if the onnx package (for the roofs' models) is missing.
    """
    language = artifact.manifest["language"]
    if language is None:
        raise InputError("bench measures language models; this artifact has no decoder")
    if min(prefill, decode, repeat, batch) < 1:
        raise UsageError("prefill, decode, repeat and batch must be 1 or more")
    start = prefill if context is None else context
    longest = max(prefill, start + decode)
    if longest > language["context_length"]:
        what = "prefill + decode" if context is None else "context + decode"
        raise UsageError(
            f"{what} = {longest} tokens, but the artifact's context is "
            f"{language['context_length']}: ask for fewer, or build with --context"
        )
    sizes = {"prefill": prefill, "decode": decode, "context": start, "batch": batch}
    if artifact.manifest["target"]["device"] in PROVIDERS:
        if ops:
            raise UsageError(
                "--ops times operators on CPUs; onnxruntime starts those of a GPU without waiting: "
                "use nsys profile bitcompile bench"
            )
        return _cuda_report(
            artifact, sizes, cuda_bench.measure(artifact, sizes, repeat, threads, progress)
        )
    threads = threads or len(os.sched_getaffinity(0))
    roofs = Roofs(artifact, threads)

    progress("loading")
    before = resident_bytes()
    began = time.perf_counter()
    session = runtime.load(artifact.path, threads=threads)
    load_s = time.perf_counter() - began
    single = Decoder(session, language, longest)
    together = single if batch == 1 else Decoder(session, language, longest, batch)
    tokens = np.arange(prefill, dtype=np.int64) % language["vocab_size"]
    single.feed(tokens)
    for _ in range(WARM_UP_TOKENS):
        together.reset(start)
        together.feed(tokens[:1])
    caches = 1 if batch == 1 else batch + 1
    resident = resident_bytes() - before - caches * kv_bytes(language, longest)

    seconds: dict[str, list[float]] = {"read": [], "prefill": [], "decode": [], "dot": []}
    for i in range(repeat):
        progress(f"measuring, repeat {i + 1} of {repeat}")
        seconds["read"].append(settled(roofs.read))
        seconds["prefill"].append(_prefill(single, tokens))
        seconds["decode"].append(_decode(together, start, decode))
        seconds["dot"].append(settled(roofs.dot))
    report = _report(artifact, sizes, threads, seconds, roofs, resident, load_s)
    if ops:
        progress("timing operators")
        report["operators"] = measure_operators(
            artifact, sizes, threads, report["read_roof_bytes_per_s"]
        )
    return report


def _prefill(decoder: Decoder, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    def run() -> None:
        decoder.reset()
        decoder.feed(tokens)

    return settled(run) if len(tokens) <= WARM_PREFILL else timed(run)


def _decode(decoder: Decoder, start: int, count: int) -> float:
    token = 0
    decoder.reset(start)
    began = time.perf_counter()
    for _ in range(count):
        token = decoder.feed(np.array([token]))
    return time.perf_counter() - began


def timed(action: Callable[[], Any]) -> float:
    """Seconds ``action`` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def settled(action: Callable[[], Any]) -> float:
    """Seconds of ``action`` on threads that are awake, while no others spin."""
    time.sleep(SETTLE_S)
    action()
    return timed(action)


def _report(
    artifact: Artifact,
    sizes: Mapping[str, int],
    threads: int,
    seconds: Mapping[str, list[float]],
    roofs: Roofs,
    resident: int,
    load_s: float,
) -> dict[str, Any]:
    inspection = artifact.manifest["inspection"]
    read_roof = statistics.median(1 / s for s in seconds["read"]) * ROOF_BYTES
    int_peak = statistics.median(1 / s for s in seconds["dot"]) * roofs.macs
    figures = _rates(artifact, sizes, seconds, read_roof)
    prefill = figures["prefill_tokens_per_s"]
    return {
        "threads": threads,
        "isa": roofs.isa,
        **figures,
        "int_peak_macs_per_s": int_peak,
        "prefill_peak_share": prefill * inspection["parameters"]["ternary"] / int_peak,
        "load_s": load_s,
        "resident_bytes": resident,
        **_ending(artifact, seconds),
    }


def _cuda_report(
    artifact: Artifact, sizes: Mapping[str, int], measured: Mapping[str, Any]
) -> dict[str, Any]:
    seconds = measured["seconds"]
    read_roof = statistics.median(1 / s for s in seconds["read"]) * cuda_bench.ROOF_BYTES
    return {
        "device": measured["device"],
        "activations": artifact.activations,
        "cuda_graph": measured["cuda_graph"],
        **_rates(artifact, sizes, seconds, read_roof),
        **{key: measured[key] for key in ("load_s", "gpu_memory_bytes", "kv_cache_bytes")},
        **_ending(artifact, seconds),
    }


def _rates(
    artifact: Artifact,
    sizes: Mapping[str, int],
    seconds: Mapping[str, list[float]],
    read_roof: float,
) -> dict[str, Any]:
    """What a report says of tokens."""
    prefill, decode, batch = sizes["prefill"], sizes["decode"], sizes["batch"]
    context = sizes["context"] + decode / 2
    # A step reads the weights once for all its sequences, and each one's cache.
    cached = kv_bytes(artifact.manifest["language"], 1, artifact.activations) * context
    touched = bytes_per_token(artifact) / batch + cached
    prefills = [prefill / s for s in seconds["prefill"]]
    decodes = [decode * batch / s for s in seconds["decode"]]
    decode_rate = statistics.median(decodes)
    return {
        "prefill_tokens": prefill,
        "decode_tokens": decode,
        "context": sizes["context"],
        "batch": batch,
        "prefill_tokens_per_s": statistics.median(prefills),
        "prefill_tokens_per_s_range": [min(prefills), max(prefills)],
        "decode_tokens_per_s": decode_rate,
        "decode_tokens_per_s_range": [min(decodes), max(decodes)],
        "time_to_first_token_s": statistics.median(seconds["prefill"]),
        "bytes_per_token": round(touched),
        "read_roof_bytes_per_s": read_roof,
        "decode_roof_share": decode_rate * touched / read_roof,
    }


def _ending(artifact: Artifact, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """The size of the artifact, and whether the machine was quiet."""
    reads = [1 / s for s in seconds["read"]]
    spread = (max(reads) - min(reads)) / statistics.median(reads)
    return {
        "artifact_bytes": sum(entry["bytes"] for entry in artifact.manifest["files"].values()),
        "read_roof_spread": spread,
        "trustworthy": spread <= NOISY,
    }


def bytes_per_token(artifact: Artifact) -> int:
    """Bytes of weights one decoded token must read: every ternary weight and the head once.

    The embedding is one row of the head's table; norms and rotary tables are left out (below 1 %).
    """
    language, head = artifact.manifest["language"], artifact.manifest["options"]["head"]
    from bitcompile.custom_ops.head_linear import BLOCK

    V, K = language["vocab_size"], language["hidden_size"]
    blocks, element = -(-K // BLOCK), BYTES[artifact.activations]
    per_row = {"q8": blocks * (BLOCK + 4), "q4": blocks * (BLOCK // 2 + 4), "float": K * element}
    ternary = int(artifact.manifest["inspection"]["bytes"]["ternary"])
    return ternary + int(V) * int(per_row[head])


def resident_bytes() -> int:
    """Resident memory of this process (Linux: field 2 of /proc/self/statm, in pages)."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        raise ToolchainError("bench reads /proc/self/statm and so runs on Linux only") from None
    return int(pages * os.sysconf("SC_PAGE_SIZE"))


class Roofs:
    """The machine's roofs, measured by the artifact's own plugin on onnxruntime's threads."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._read = roof_session(artifact, threads=threads, kind=0, steps=1)
        self._dot = roof_session(artifact, threads=threads, kind=1, steps=DOT_STEPS)
        self._seed = np.full(256, 0x55, np.uint8)
        asked = roof_session(artifact, threads=threads, kind=2, steps=1)
        try:
            about = asked.run(None, {"data": self._seed})
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ToolchainError(f"bench has no roofs here: {runtime.one_line(error)}") from error
        text = about[0].tobytes().rstrip(b"\0").decode("ascii")
        self.isa, macs_per_step, tasks = text.split()[0], *map(int, text.split()[1:])
        """Kernel variant the plugin chose."""
        self.macs = macs_per_step * tasks * DOT_STEPS
        """Multiply-accumulates of one :meth:`dot`."""
        self._data = np.zeros(ROOF_BYTES, np.uint8)
        self._data[::4096] = 1  # touch every page, or all would read one zero page
        self.read()
        self.dot()

    def read(self) -> None:
        """Read ``ROOF_BYTES`` once."""
        self._read.run(None, {"data": self._data})

    def dot(self) -> None:
        """Run ``macs`` multiply-accumulates from registers."""
        self._dot.run(None, {"data": self._seed})
