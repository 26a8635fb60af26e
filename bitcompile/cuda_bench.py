"""How fast an artifact for CUDA is on this machine's GPU, against what its memory gives.

The read roof is measured beside every repeat by the plugin's own kernel. A decoded step is replayed
as a CUDA graph where onnxruntime can capture it; its inputs are on the GPU and its logits stay
there, as generators have it: choosing a token is not part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bitcompile import runtime
from bitcompile.artifact import Artifact, Progress
from bitcompile.cuda_decoder import DEVICE, CudaDecoder, Step
from bitcompile.cuda_driver import Card
from bitcompile.decoder import ELEMENTS, kv_bytes
from bitcompile.errors import BitcompileError, ToolchainError
from bitcompile.roof import roof_session

ROOF_BYTES = 1 << 30
"""Read by the roof: far more than the cache of any GPU."""
ROOF_READS = 8
"""Of one measurement, so that starting it does not count."""
WARM_UP_STEPS = 4


def measure(
    artifact: Artifact,
    sizes: Mapping[str, int],
    repeat: int,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """What was measured: ``seconds`` of ``read``, ``prefill``, ``decode``, a list each, and
    ``device, cuda_graph, load_s, gpu_memory_bytes, kv_cache_bytes``.

    ``sizes``: ``prefill, decode, context, batch``. A decoded step is the one in the middle of the
    ``decode`` that follow ``context``. Raises ToolchainError if this machine cannot run that.
    """
    runtime.session_options(artifact.path)  # these two fail early and clearly
    runtime.providers(artifact)
    card = Card()
    with _clearly(artifact):
        read = _reader(artifact)
    progress("loading")
    before = card.used_bytes()
    model = _Model(artifact, sizes, threads)
    used = card.used_bytes() - before - model.kv_cache_bytes
    seconds: dict[str, list[float]] = {"read": [], "prefill": [], "decode": []}
    for i in range(repeat):
        progress(f"measuring, repeat {i + 1} of {repeat}")
        seconds["read"].append(_timed(read) / ROOF_READS)
        seconds["prefill"].append(_timed(model.prefill))
        seconds["decode"].append(_timed(model.decode, sizes["decode"]))
    return {
        "seconds": seconds,
        "device": card.name,
        "cuda_graph": model.graph,
        "load_s": model.load_s,
        "gpu_memory_bytes": used,
        "kv_cache_bytes": model.kv_cache_bytes,
    }


class _Model:
    """An artifact that takes a prompt, and a step behind it."""

    def __init__(self, artifact: Artifact, sizes: Mapping[str, int], threads: int | None) -> None:
        self._artifact, self._sizes, self._threads = artifact, sizes, threads
        longest = max(sizes["prefill"], sizes["context"] + sizes["decode"])
        batch = sizes["batch"]
        caches = 1 if batch == 1 else batch + 1
        self.kv_cache_bytes = caches * kv_bytes(
            artifact.manifest["language"], longest, artifact.activations
        )
        self.graph = True
        try:
            self.prefill, self.decode = self._prepare(longest)
        except BitcompileError:
            raise
        except Exception:  # of onnxruntime: a graph holds no node that runs on the CPU
            self.graph = False
        if not self.graph:  # here, where nothing holds the memory of the attempt
            with _clearly(artifact):
                self.prefill, self.decode = self._prepare(longest)

    def _prepare(self, longest: int) -> tuple[Step, Step]:
        """Load it, fill its cache, and run everything that is measured; the prompt and a step."""
        language, sizes = self._artifact.manifest["language"], self._sizes
        began = time.perf_counter()
        options = runtime.session_options(self._artifact.path, threads=self._threads)
        options.log_severity_level = 3  # it warns of every graph with a shape in it
        providers = runtime.providers(self._artifact, enable_cuda_graph=str(int(self.graph)))
        session = runtime.open_session(self._artifact.model, options, providers)
        self.load_s = time.perf_counter() - began
        single = CudaDecoder(session, language, longest)
        together = single
        if sizes["batch"] > 1:
            together = CudaDecoder(session, language, longest, sizes["batch"])
        prefill = single.step(sizes["prefill"], 0)
        past = sizes["context"] + sizes["decode"] // 2
        decode = together.step(1, past, self.graph)
        if past:
            together.step(past, 0)()
        for _ in range(WARM_UP_STEPS):
            prefill()
            decode()
        return prefill, decode


@contextmanager
def _clearly(artifact: Artifact) -> Iterator[None]:
    """Raise what onnxruntime says as ToolchainError."""
    try:
        yield
    except BitcompileError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ToolchainError(
            f"the GPU cannot run {artifact.path} ({runtime.one_line(error)}): if it is out of "
            "memory, ask for fewer tokens or sequences, or end what else runs there"
        ) from error


def _reader(artifact: Artifact) -> Callable[[], None]:
    """A function that reads ``ROOF_BYTES`` of the GPU's memory ``ROOF_READS`` times."""
    import onnxruntime

    make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    session = roof_session(artifact, kind=0, steps=ROOF_READS)
    binding = session.io_binding()
    binding.bind_ortvalue_input("data", make((ROOF_BYTES,), ELEMENTS["tensor(uint8)"], *DEVICE))
    binding.bind_ortvalue_output("out", make((1, 64), ELEMENTS["tensor(uint8)"], *DEVICE))
    session.run_with_iobinding(binding)
    return lambda: session.run_with_iobinding(binding)


def _timed(action: Callable[[], None], count: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(count):
        action()
    return time.perf_counter() - began
