"""A GGUF file of BitNet b1.58 2B-4T's shape with random weights, for the benchmark of llama.cpp.

    python -m tests.bench.gguf_model OUT.gguf [--head Q8_0] [--ternary IQ2_BN]
    llama-bench -m OUT.gguf -t 2 -p 512 -n 64 -r 5

Ternary products are TQ2_0 (2.06 bits a weight, each layer its own), or IQ2_BN (2 bits) for
ik_llama.cpp; the embedding that is also the head is of the type ``--head``. Architecture
``bitnet``: its gate is SiLU where the model has a squared ReLU, which costs the same. No
vocabulary: the program only computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tests.bench.peers import FFN, HIDDEN, LAYERS

HEADS, KV_HEADS, VOCABULARY = 20, 5, 128256
KV = HIDDEN // HEADS * KV_HEADS
PRODUCTS = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}  # fmt: skip
"""(rows, columns) of a layer's ternary weights."""
IQ2_BN = 135
"""Of ik_llama.cpp: a row is a float32 scale, then four codes of 0 to 2 a byte (ggml-common.h)."""
NORMS = {"attn_norm": HIDDEN, "attn_sub_norm": HIDDEN, "ffn_norm": HIDDEN, "ffn_sub_norm": FFN}


def blocks(rng: np.random.Generator, rows: int, columns: int, kind: Type) -> np.ndarray:
    """Random bytes of a matrix in blocks that begin or end with a float16 scale."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (rows, columns // values, size), np.uint8)
    scale = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    if kind == Type.TQ2_0:
        made[..., :-2] = codes(rng, (*made.shape[:2], size - 2))
        made[..., -2:] = scale
    else:
        made[..., :2] = scale
    return made.reshape(rows, -1)


def codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes of four codes of 0 to 2."""
    four = rng.integers(0, 3, (*shape, 4), np.uint8)
    return (four << (2 * np.arange(4, dtype=np.uint8))).sum(-1, dtype=np.uint8)


def scaled_rows(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random rows of IQ2_BN."""
    scale = np.full((rows, 1), 0.02, np.float32).view(np.uint8)
    return np.concatenate([scale, codes(rng, (rows, columns // 4))], axis=1)


def tensors(head: Type, ternary: str) -> Iterator[tuple[str, np.ndarray, int | None]]:
    """Name, content and type of every tensor."""
    rng = np.random.default_rng(0)
    yield "token_embd.weight", blocks(rng, VOCABULARY, HIDDEN, head), head
    yield "output_norm.weight", np.ones(HIDDEN, np.float32), None
    for i in range(LAYERS):
        for name, size in NORMS.items():
            yield f"blk.{i}.{name}.weight", np.ones(size, np.float32), None
        for name, shape in PRODUCTS.items():
            if ternary == "IQ2_BN":
                yield f"blk.{i}.{name}.weight", scaled_rows(rng, *shape), IQ2_BN
            else:
                yield f"blk.{i}.{name}.weight", blocks(rng, *shape, Type.TQ2_0), Type.TQ2_0


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--head", choices=("Q8_0", "Q4_0"), default="Q8_0")
    parser.add_argument("--ternary", choices=("TQ2_0", "IQ2_BN"), default="TQ2_0")
    arguments = parser.parse_args()
    writer = gguf.GGUFWriter(arguments.out, "bitnet")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for name, data, kind in tensors(Type[arguments.head], arguments.ternary):
        if kind == IQ2_BN:  # the package does not know it, nor that rows begin with a scale
            shape = (len(data), 4 * (data.shape[1] - 4))
            writer.add_tensor(name, data.view(np.int8), raw_shape=shape, raw_dtype=kind)
        else:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
