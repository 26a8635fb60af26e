"""A decoder on plain onnxruntime with its KV cache in one place, as the benchmarks run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ELEMENTS = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(float16)": 10, "tensor(bfloat16)": 16,
}  # fmt: skip
"""Type of a tensor as onnxruntime names it, to its number in ONNX."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Decoder:
    """Sequences of one length on a session, with KV buffers that are written in place.

    ``capacity``: tokens the buffers hold; ``batch``: sequences that go together.
    """

    def __init__(
        self, session: Any, language: Mapping[str, Any], capacity: int, batch: int = 1
    ) -> None:
        import onnxruntime

        self._session = session
        self._binding = session.io_binding()
        self._length = 0
        self.batch = batch
        shape = (batch, language["num_kv_heads"], capacity, language["head_size"])
        for i in range(language["num_layers"]):
            for part in ("key", "value"):
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._binding.bind_ortvalue_input(f"past_key_values.{i}.{part}", buffer)
                self._binding.bind_ortvalue_output(f"present.{i}.{part}", buffer)
        self._logits = self._bind_logits(session, language["vocab_size"])

    def _bind_logits(self, session: Any, size: int) -> np.ndarray[Any, Any] | None:
        """The memory that takes the last token's logits; None where every token has some."""
        import onnxruntime

        (shape,) = (y.shape for y in session.get_outputs() if y.name == "logits")
        if shape[1] != 1:
            self._binding.bind_output("logits", "cpu")
            return None
        logits = np.empty((self.batch, 1, size), np.float32)
        memory = onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        self._binding.bind_ortvalue_output("logits", memory)
        return logits

    def reset(self, length: int = 0) -> None:
        """Forget the sequences; as if ``length`` tokens had been fed, whatever the cache holds."""
        self._length = length

    def feed(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        """Append tokens int64 ``[S]`` to every sequence; the most likely next token."""
        self._length += len(tokens)
        repeated = np.ascontiguousarray(np.broadcast_to(tokens, (self.batch, len(tokens))))
        self._binding.bind_cpu_input("input_ids", repeated)
        mask = np.ones((self.batch, self._length), np.int64)
        self._binding.bind_cpu_input("attention_mask", mask)
        self._session.run_with_iobinding(self._binding)
        logits = self._logits
        if logits is None:
            logits = self._binding.get_outputs()[-1].numpy()
        return int(logits[0, -1].argmax())


def kv_bytes(language: Mapping[str, Any], tokens: int, activations: str = "float32") -> int:
    """Bytes of the KV cache of ``tokens`` tokens, whose elements have the activations' type."""
    per_layer = 2 * language["num_kv_heads"] * language["head_size"] * BYTES[activations]
    return int(language["num_layers"] * per_layer * tokens)
