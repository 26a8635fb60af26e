"""Hugging Face model to portable ONNX: swap the ternary layers and attention, then export.

Imported only when a checkpoint is converted: torch and transformers take seconds to import.

The model is built on the meta device, so that no float weight of a ternary layer ever exists.
Everything is float32 except the embedding and head tables, which keep the checkpoint's type:

- embedding: ``Cast(Gather(table, input_ids), to=FLOAT)``
- head: ``logits = MatMul(h, Transpose(Cast(table, to=FLOAT), perm=[1, 0]))``

with no Cast where the table is float32. Tied models use one initializer, named
``model.embed_tokens.weight``, for both; an untied head reads ``lm_head.weight``. While torch
exports, both are opaque nodes: the exporter would fold the Cast and Transpose of a small table.

Decoders attend through GroupQueryAttention and a cache. Encoders keep transformers' own attention,
which follows ``attention_mask`` on either side and the configuration's ``is_causal``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from bitcompile.custom_ops.bit_linear import BIT_LINEAR
from bitcompile.errors import BitcompileError, InputError
from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET, VERSION, Attribute
from bitcompile.packing import PackedTernary

ATTENTION = "bitcompile_gqa"
TABLE_DOMAIN = "bitcompile.table"
"""Domain of the opaque table nodes; none is left in an exported graph."""
ABSENT = "absent"
"""Name of the rank-0 zero that stands for every absent bias and residual."""
FLOAT = ir.TensorType(ir.DataType.FLOAT)
EMBEDDING_TABLE, HEAD_TABLE = "model.embed_tokens.weight", "lm_head.weight"


class TernaryLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A linear layer that exports as one ``bitcompile::BitLinear`` node.

    ``norm``: an RMSNorm module applied to x first, or None. ``absent``: the shared rank-0 zero.
    """

    def __init__(
        self,
        weight: PackedTernary,
        bias: torch.Tensor | None,
        norm: nn.Module | None,
        absent: nn.Buffer,
    ) -> None:
        super().__init__()
        self.N, self.K = weight.shape
        self.attributes: dict[str, Attribute] = {
            "layout": weight.layout.id,
            "group_size": weight.group_size,
        }
        self.weight = nn.Buffer(torch.from_numpy(weight.data))
        self.weight_scale = nn.Buffer(torch.from_numpy(weight.scale))
        self.bias = absent if bias is None else nn.Buffer(bias)
        self.absent = absent
        self.rms_norm = norm

    def forward(self, x: torch.Tensor) -> Any:
        """float32 ``[..., K]`` to ``[..., N]``; only while exporting."""
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        inputs = (x, self.weight, self.weight_scale, self.bias, self.absent)
        return BIT_LINEAR.symbolic(*inputs, K=self.K, N=self.N, **self.attributes)


class Table(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """The embedding (``op="Lookup"``) or head (``op="Project"``) of a float table ``[V, K]``."""

    def __init__(self, op: str, table: nn.Parameter) -> None:
        super().__init__()
        self.op = op
        self.weight = table

    def forward(self, x: torch.Tensor) -> Any:
        """ids int64 ``[...]`` to ``[..., K]``, or states ``[..., K]`` to ``[..., V]``; float32."""
        V, K = self.weight.shape
        shape = (*x.shape, K) if self.op == "Lookup" else (*x.shape[:-1], V)
        return torch.onnx.ops.symbolic(
            f"{TABLE_DOMAIN}::{self.op}",
            (x, self.weight),
            {},
            dtype=torch.float32,
            shape=shape,
            version=1,
        )


class NoRotary(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Stands for the rotary module while exporting: the attention node rotates."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[Any, Any]:
        """Two values that nothing reads."""
        return x, x


@dataclass
class AttentionState:
    """What every attention node of one graph shares, and the caches they leave."""

    past: list[torch.Tensor]
    """Key and value of each layer in turn, float32 ``[B, kv_heads, P, head_size]``."""
    seqlens: Any
    """int32 ``[B]``: index of the last valid token."""
    total: Any
    """int32 ``[1]``: tokens in the cache after this call."""
    total_dim: Any
    cos: torch.Tensor
    sin: torch.Tensor
    present: dict[int, tuple[Any, Any]] = field(default_factory=dict)


class Decoder(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A causal language model with the inputs and outputs of onnxruntime-genai.

    ``cos``, ``sin``: float32 ``[context, head_size / 2]``.
    """

    def __init__(self, causal: Any, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.model, self.lm_head = causal.model, causal.lm_head
        self.cos_cache, self.sin_cache = nn.Buffer(cos), nn.Buffer(sin)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[Any, ...]:
        """Logits ``[B, S, V]``, then key and value of each layer."""
        state = AttentionState(
            past=past,
            seqlens=(attention_mask.sum(1) - 1).to(torch.int32),
            total=_length(attention_mask),
            total_dim=attention_mask.shape[1],
            cos=self.cos_cache,
            sin=self.sin_cache,
        )
        for layer in self.model.layers:
            layer.self_attn.bitcompile_state = state
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=torch.zeros_like(input_ids),
            use_cache=False,
        ).last_hidden_state
        present = [cache for layer in sorted(state.present) for cache in state.present[layer]]
        return (self.lm_head(hidden), *present)


def _length(mask: torch.Tensor) -> Any:
    """int32 ``[1]``: the second dimension of ``mask``."""
    bounds = {"start": 1, "end": 2}
    shape = torch.onnx.ops.symbolic("Shape", (mask,), bounds, dtype=torch.int64, shape=(1,))
    to = {"to": int(ir.DataType.INT32)}
    return torch.onnx.ops.symbolic("Cast", (shape,), to, dtype=torch.int32, shape=(1,))


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **_: Any,
) -> tuple[Any, None]:
    """One GroupQueryAttention node, for query ``[B, H, S, D]`` and new key and value."""
    state: AttentionState = module.bitcompile_state
    (B, H, S, D), kv_heads = query.shape, key.shape[1]
    layer = module.layer_idx
    flat = [t.transpose(1, 2).reshape(B, S, -1) for t in (query, key, value)]
    cache = (B, kv_heads, state.total_dim, D)
    past = state.past[2 * layer : 2 * layer + 2]
    output, *present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, *past, state.seqlens, state.total, state.cos, state.sin),
        {"num_heads": H, "kv_num_heads": kv_heads, "do_rotary": 1, "scale": float(scaling)},
        dtypes=(torch.float32,) * 3,
        shapes=((B, S, H * D), cache, cache),
        version=1,
    )
    state.present[layer] = (present[0], present[1])
    return output, None


@contextlib.contextmanager
def _swapped_attention(causal: Any) -> Iterator[None]:
    """Attention becomes our node and the rotary function of its module the identity."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    modeling: Any = sys.modules[type(causal).__module__]
    rotary = modeling.apply_rotary_pos_emb
    implementation = causal.config._attn_implementation
    modeling.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)
    causal.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = rotary
        causal.config._attn_implementation = implementation


def rotary_caches(
    causal: Any, context: int, head_size: int, divisor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 ``[context, head_size / 2]``, as the model's own module computes them.

    Both halves of a head share the values (rotate-half form), so one half is kept. ``divisor``:
    float32 ``[head_size / 2]`` that the frequencies are divided by first. Raises InputError if only
    a part of each head rotates.
    """
    rotary = type(causal.model.rotary_emb)(causal.config)
    if divisor is not None:
        if divisor.shape != rotary.inv_freq.shape:
            raise InputError(
                f"{len(divisor)} rotary factors for {len(rotary.inv_freq)} frequencies: damaged"
            )
        rotary.inv_freq = rotary.inv_freq / divisor
    cos, sin = rotary(torch.zeros(1), torch.arange(context)[None])
    if cos.shape[-1] != head_size:
        raise InputError(
            f"{cos.shape[-1]} of {head_size} head columns rotate: partial rotary embeddings "
            "(partial_rotary_factor) are not supported"
        )
    if not (cos.isfinite().all() and sin.isfinite().all()):
        raise InputError("the rotary embedding is not finite: correct rope_parameters")
    half = head_size // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def export(
    causal: Any, context: int, head_size: int, divisor: torch.Tensor | None = None
) -> ir.Model:
    """The portable graph of a model whose linears and tables are swapped (module docstring).

    ``causal``: the Hugging Face model; its rotary module is replaced. ``divisor``: see
    :func:`rotary_caches`. Raises InputError for
    a rotary form attention cannot take, BitcompileError if a ternary layer is no node afterwards.
    """
    config = causal.config
    decoder = Decoder(causal, *rotary_caches(causal, context, head_size, divisor)).eval()
    causal.model.rotary_emb = NoRotary()
    layers = config.num_hidden_layers
    B, S, P = 2, 3, 4  # any sizes above 1: torch takes 1 for a constant
    past = [torch.zeros(B, config.num_key_value_heads, P, head_size) for _ in range(2 * layers)]
    ids, mask = torch.ones(B, S, dtype=torch.int64), torch.ones(B, P + S, dtype=torch.int64)
    batch, sequence = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    total, cached = (
        torch.export.Dim("total_sequence_length"),
        torch.export.Dim("past_sequence_length"),
    )
    inputs, outputs = io_names(layers)
    with torch.no_grad(), _swapped_attention(causal):
        program = torch.onnx.export(
            decoder,
            (ids, mask, past),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes={
                "input_ids": {0: batch, 1: sequence},
                "attention_mask": {0: batch, 1: total},
                "past": [{0: batch, 2: cached}] * (2 * layers),
            },
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    return _finished(program, causal, layers)


def _finished(program: Any, source: Any, attention: int) -> ir.Model:
    """The exporter's graph with its tables as standard nodes, checked."""
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    _name_shared(model)
    _expand_tables(model)
    ternary = sum(isinstance(module, TernaryLinear) for module in source.modules())
    _check(model, ternary, attention)
    return model


class Encoder(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A model without a head: ``input_ids`` and ``attention_mask`` to ``last_hidden_state``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """float32 ``[B, S, hidden]``; rows of padding are finite and mean nothing."""
        # One row a sequence: RotaryEmbedding takes no angles that are broadcast over the batch.
        positions = torch.arange(input_ids.shape[1]).expand(*input_ids.shape)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state


def export_encoder(model: Any) -> ir.Model:
    """The portable graph of a model without a head whose linears and table are swapped.

    Inputs ``input_ids``, ``attention_mask`` int64 ``[B, S]`` (0 marks padding, on either side);
    output ``last_hidden_state`` float32 ``[B, S, hidden]``. Raises BitcompileError if a ternary
    layer is no node afterwards.
    """
    model.rotary_emb = type(model.rotary_emb)(model.config)  # off the meta device
    model.config._attn_implementation = "sdpa"
    names = ("input_ids", "attention_mask")
    dims = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    ids = torch.ones(2, 3, dtype=torch.int64)  # any sizes above 1: torch takes 1 for a constant
    mask = torch.ones_like(ids)  # a tensor of its own: torch makes one input of one tensor
    with torch.no_grad():
        program = torch.onnx.export(
            Encoder(model).eval(),
            (ids, mask),
            dynamo=True,
            input_names=list(names),
            output_names=["last_hidden_state"],
            dynamic_shapes=dict.fromkeys(names, dims),
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    return _finished(program, model, 0)


def io_names(layers: int) -> tuple[list[str], list[str]]:
    """Input and output names as onnxruntime-genai expects them."""
    inputs, outputs = ["input_ids", "attention_mask"], ["logits"]
    for layer in range(layers):
        inputs += [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        outputs += [f"present.{layer}.key", f"present.{layer}.value"]
    return inputs, outputs


def _expand_tables(model: ir.Model) -> None:
    """Lookup(ids, table) and Project(h, table) become the standard nodes of the docstring."""
    for node in list(model.graph):
        if node.domain != TABLE_DOMAIN:
            continue
        x, table = node.inputs
        old = node.outputs[0]
        assert x is not None
        assert table is not None
        expand = _lookup if node.op_type == "Lookup" else _project
        nodes = expand(x, table, old)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], nodes, [old], [nodes[-1].outputs[0]]
        )
    del model.graph.opset_imports[TABLE_DOMAIN]


def _lookup(ids: ir.Value, table: ir.Value, result: ir.Value) -> list[ir.Node]:
    gathered = ir.Value(name="embedding", type=table.type, shape=result.shape)
    gather = ir.node("Gather", [table, ids], {"axis": 0}, outputs=[gathered])
    if table.dtype == ir.DataType.FLOAT:
        return [gather]
    return [gather, _cast(gathered, "embedding_float")]


def _project(h: ir.Value, table: ir.Value, result: ir.Value) -> list[ir.Node]:
    assert table.shape is not None
    nodes, wide = [], table
    if table.dtype != ir.DataType.FLOAT:
        nodes = [_cast(table, "head_float")]
        wide = nodes[0].outputs[0]
    turned = ir.Value(name="head_turned", type=FLOAT, shape=ir.Shape(list(table.shape)[::-1]))
    logits = ir.Value(name=result.name, type=FLOAT, shape=result.shape)
    nodes.append(ir.node("Transpose", [wide], {"perm": [1, 0]}, outputs=[turned]))
    return [*nodes, ir.node("MatMul", [h, turned], outputs=[logits])]


def _cast(value: ir.Value, name: str) -> ir.Node:
    output = ir.Value(name=name, type=FLOAT, shape=value.shape)
    return ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[output])


def _name_shared(model: ir.Model) -> None:
    """Give the tensors that many modules share the names the module docstring promises.

    torch.export names such a tensor after whichever module it meets last.
    """
    for node in model.graph:
        if node.op_type == "Lookup":
            _rename(model, node.inputs[1], EMBEDDING_TABLE)
        if node.op_type == "BitLinear":
            _rename(model, node.inputs[-1], ABSENT)


def _rename(model: ir.Model, value: ir.Value | None, name: str) -> None:
    assert value is not None
    assert value.name is not None
    if value.name != name:
        del model.graph.initializers[value.name]
        value.name = name
        model.graph.initializers.add(value)


def _check(model: ir.Model, ternary: int, layers: int) -> None:
    """Every swapped layer is a node and only the expected domains are used.

    ``layers``: GroupQueryAttention nodes; 0 in an encoder.
    """
    nodes = [node.op_type for node in model.graph]
    found = nodes.count("BitLinear"), nodes.count("GroupQueryAttention")
    if found != (ternary, layers):
        raise BitcompileError(
            f"the exporter kept {found[0]} of {ternary} ternary layers and {found[1]} of {layers} "
            "attention layers: report this with the checkpoint's config.json"
        )
    expected = {"": ONNX_OPSET, DOMAIN: VERSION, **({"com.microsoft": 1} if layers else {})}
    if dict(model.opset_imports) != expected:
        raise BitcompileError(
            f"the exporter used operator sets {dict(model.opset_imports)}, not {expected}: "
            "install the torch and onnxscript versions of bitcompile[build]"
        )
