"""A decoder on onnxruntime's CUDA provider: everything stays on the GPU, a step may be a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitcompile.decoder import ELEMENTS

DEVICE = ("cuda", 0)
NO_GRAPH, GRAPH = "-1", "1"
"""Values of onnxruntime's run option ``gpu_graph_id``: run the kernels, or replay them."""


class CudaDecoder:
    """Sequences of one length on a session, with KV buffers that are written in place.

    ``capacity``: tokens the buffers hold; ``batch``: sequences that go together.
    """

    def __init__(
        self, session: Any, language: Mapping[str, Any], capacity: int, batch: int = 1
    ) -> None:
        self._session, self._capacity, self._batch = session, capacity, batch
        self._logits = next(o for o in session.get_outputs() if o.name == "logits")
        self._vocabulary = language["vocab_size"]
        shape = (batch, language["num_kv_heads"], capacity, language["head_size"])
        self._caches = {
            i.name: _memory(shape, i.type)
            for i in session.get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def step(self, tokens: int, past: int, graph: bool = False) -> Step:
        """What feeds ``tokens`` to every sequence behind ``past`` others, each time it is called.

        With ``graph``, in a session that has ``enable_cuda_graph``, its kernels are captured at
        first and then replayed: their inputs then have sizes that do not depend on ``past``.
        """
        import onnxruntime

        length = self._capacity if graph else past + tokens
        mask = np.zeros((self._batch, length), np.int64)
        mask[:, : past + tokens] = 1
        binding = self._session.io_binding()
        for name, array in (
            ("input_ids", np.ones((self._batch, tokens), np.int64)),
            ("attention_mask", mask),
        ):
            held = onnxruntime.OrtValue.ortvalue_from_numpy(array, *DEVICE)
            binding.bind_ortvalue_input(name, held)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        rows = 1 if self._logits.shape[1] == 1 else tokens
        shape = (self._batch, rows, self._vocabulary)
        logits = _memory(shape, self._logits.type)
        binding.bind_ortvalue_output("logits", logits)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", GRAPH if graph else NO_GRAPH)
        return Step(self._session, binding, options, logits)


@dataclass(frozen=True)
class Step:
    """Runs of one form; the GPU has finished when a call returns."""

    session: Any
    binding: Any
    options: Any
    logits: Any
    """An OrtValue ``[batch, tokens or 1, vocabulary]`` that stays where it is."""

    def __call__(self) -> None:
        """Run once."""
        self.session.run_with_iobinding(self.binding, self.options)


def _memory(shape: tuple[int, ...], kind: str) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENTS[kind], *DEVICE)
