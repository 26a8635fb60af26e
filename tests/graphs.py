"""Small graphs in portable form, built by hand, and how the tests run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bitcompile.opset import DOMAIN, IR_VERSION, ONNX_OPSET
from bitcompile.packing import PackedTernary, groups
from bitcompile.passes.attach_functions import AttachFunctions
from bitcompile.passes.graph import MICROSOFT

Array = np.ndarray[Any, Any]
Dims = Sequence[Any]
"""Dimensions: numbers, names, or None for one that is not known."""
ABSENT = np.float32(0)


class Build:
    """A graph under construction; random weights are the same on every construction."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": ONNX_OPSET, DOMAIN: 1})

    def input(self, name: str, shape: Dims, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def const(self, name: str, data: Any) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.asarray(data), name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        shape: Dims | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """One node of one output, shaped like its input of most dimensions unless told."""
        return self.ops(
            op_type, *inputs, names=[name], shapes=[shape], dtype=dtype, domain=domain, **attributes
        )[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        names: Sequence[str],
        shapes: Sequence[Dims | None],
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        first = inputs[0]
        assert first is not None
        widest = max((list(v.shape or ()) for v in inputs if v is not None), key=len)
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=len(names), name=f"n_{names[0]}")
        self.graph.append(node)
        for value, name, shape in zip(node.outputs, names, shapes, strict=True):
            value.name = name
            value.type = ir.TensorType(dtype or first.dtype or ir.DataType.FLOAT)
            value.shape = ir.Shape(shape if shape is not None else widest)
        if domain:
            self.graph.opset_imports[domain] = 1
        return node.outputs

    def gamma(self, name: str, K: int) -> ir.Value:
        return self.const(name, self.rng.uniform(0.5, 1.5, K).astype(np.float32))

    def norm(
        self, x: ir.Value, name: str, eps: float = 1e-5, *, written_out: bool = False
    ) -> ir.Value:
        """RMSNormalization, or what an exporter without that operator writes."""
        assert x.shape is not None
        gamma = self.gamma(f"{name}.weight", int(x.shape[-1]))  # type: ignore[arg-type]
        if not written_out:
            return self.op("RMSNormalization", x, gamma, name=f"{name}_y", axis=-1, epsilon=eps)
        square = self.op("Pow", x, self.const("two", np.float32(2)), name=f"{name}_square")
        mean = self.op("ReduceMean", square, self.const("last_axis", np.array([-1])),
                       name=f"{name}_mean", shape=[*x.shape[:-1], 1], keepdims=1,
                       noop_with_empty_axes=0)  # fmt: skip
        moved = self.op("Add", mean, self.const(f"eps{eps}", np.float32(eps)), name=f"{name}_moved")
        root = self.op("Sqrt", moved, name=f"{name}_root")
        over = self.op("Reciprocal", root, name=f"{name}_over")
        unit = self.op("Mul", x, over, name=f"{name}_unit")
        return self.op("Mul", gamma, unit, name=f"{name}_y", shape=list(x.shape))

    def linear(
        self,
        x: ir.Value,
        N: int,
        name: str,
        *,
        bias: bool = False,
        residual: ir.Value | None = None,
        group_size: int = 0,
        **attributes: Any,
    ) -> ir.Value:
        """BitLinear with random ternary weights."""
        assert x.shape is not None
        K = int(x.shape[-1])  # type: ignore[arg-type]
        weight = self.rng.integers(-1, 2, (N, K)).astype(np.int8)
        scale = self.rng.uniform(0.01, 0.1, (N, groups(K, group_size)) if group_size else None)
        packed = PackedTernary.pack(weight, scale, group_size=group_size)
        if group_size:
            attributes["group_size"] = group_size
        absent = self.const("none", ABSENT)
        bias_data = self.rng.standard_normal(N).astype(np.float32)
        return self.op(
            "BitLinear",
            x,
            self.const(f"{name}.weight", packed.data),
            self.const(f"{name}.weight_scale", packed.scale),
            self.const(f"{name}.bias", bias_data) if bias else absent,
            residual or absent,
            name=f"{name}_y",
            shape=[*x.shape[:-1], N],
            domain=DOMAIN,
            **{"K": K, "N": N, **attributes},
        )

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=IR_VERSION)


def run_model(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of a copy of ``model`` in plain onnxruntime, through the operators' functions."""
    import onnxruntime

    copy = ir.from_proto(ir.to_proto(model))
    AttachFunctions().apply(copy)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))


def ops(model: ir.Model) -> list[str]:
    """Operator of each node, in order."""
    return [node.op_type for node in model.graph]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    """The one node of this kind."""
    (node,) = (node for node in model.graph if node.op_type == op_type)
    return node


def input_names(node: ir.Node) -> list[str | None]:
    return [value.name if value is not None else None for value in node.inputs]


@dataclass(frozen=True)
class Decoder:
    """A tiny decoder language model, with sizes that fill no tile, byte or block."""

    layers: int = 2
    hidden: int = 50
    heads: int = 2
    kv_heads: int = 1
    head_size: int = 16
    ffn: int = 37
    vocab: int = 43
    activation: str = "relu2"
    sub_norm: bool = True
    bias: bool = False
    tied: bool = True
    bfloat16: bool = True
    views: bool = True
    written_out: bool = False
    context: int = 12
    group_size: int = 0


BITNET = Decoder()
LLAMA = Decoder(
    activation="silu", sub_norm=False, tied=False, bfloat16=False, views=False, written_out=True
)


def decoder(config: Decoder) -> ir.Model:
    """The model as a front end exports it."""
    return _DecoderBuild(config).whole()


def decoder_feeds(config: Decoder, tokens: int = 5, past: int = 0) -> dict[str, Array]:
    """One sequence of ``tokens`` after a cache of ``past`` positions."""
    rng = np.random.default_rng(7)
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(0, config.vocab, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
    }
    for i in range(config.layers):
        for kind in ("key", "value"):
            shape = (1, config.kv_heads, past, config.head_size)
            feeds[f"past_key_values.{i}.{kind}"] = rng.standard_normal(shape).astype(np.float32)
    return feeds


class _DecoderBuild(Build):
    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.c = config

    def whole(self) -> ir.Model:
        c, i64 = self.c, ir.DataType.INT64
        ids = self.input("input_ids", ["batch", "seq"], i64)
        mask = self.input("attention_mask", ["batch", "total"], i64)
        self._shared(mask)
        embed = self._table("model.embed_tokens.weight")
        head = embed if c.tied else self._table("lm_head.weight")
        wide: Dims = ["batch", "seq", c.hidden]
        x = self.op("Gather", embed, ids, name="embedded", shape=wide, axis=0)
        if c.bfloat16:
            x = self.op("Cast", x, name="embedded_float", dtype=ir.DataType.FLOAT, to=1)
        present: list[ir.Value] = []
        for i in range(c.layers):
            x = self._layer(x, i, present)
        h = self.norm(x, "model.norm", written_out=c.written_out)
        if c.bfloat16:
            head = self.op("Cast", head, name="head_float", dtype=ir.DataType.FLOAT, to=1)
        head = self.op("Transpose", head, name="head_t", shape=[c.hidden, c.vocab], perm=[1, 0])
        logits = self.op("MatMul", h, head, name="logits", shape=["batch", "seq", c.vocab])
        return self.model(logits, *present)

    def _shared(self, mask: ir.Value) -> None:
        """seqlens_k, total length and rotary tables of every layer."""
        c, i32 = self.c, ir.DataType.INT32
        one = self.const("one", np.array([1]))
        summed = self.op("ReduceSum", mask, one, name="lengths", shape=["batch"], keepdims=0)
        less = self.op("Sub", summed, self.const("one_scalar", np.int64(1)), name="lengths_less")
        self.seqlens = self.op("Cast", less, name="seqlens_k", dtype=i32, to=6)
        size = self.op("Shape", mask, name="mask_size", shape=[1], start=1, end=2)
        self.total = self.op("Cast", size, name="total_length", dtype=i32, to=6)
        angle = np.outer(np.arange(c.context), 1e4 ** -np.linspace(0, 1, c.head_size // 2))
        self.cos = self.const("cos_cache", np.cos(angle).astype(np.float32))
        self.sin = self.const("sin_cache", np.sin(angle).astype(np.float32))

    def _table(self, name: str) -> ir.Value:
        data = self.rng.standard_normal((self.c.vocab, self.c.hidden)).astype(np.float32)
        return self.const(name, data.astype(ml_dtypes.bfloat16) if self.c.bfloat16 else data)

    def _layer(self, x: ir.Value, i: int, present: list[ir.Value]) -> ir.Value:
        c, at = self.c, f"model.layers.{i}"
        h = self.norm(x, f"{at}.input_layernorm", written_out=c.written_out)
        q, k, v = (
            self._heads(
                self._linear(h, n * c.head_size, f"{at}.self_attn.{p}_proj", bias=c.bias), n
            )
            for p, n in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        )
        y = self._attention(q, k, v, i, present)
        if c.sub_norm:
            y = self.norm(y, f"{at}.self_attn.attn_sub_norm", written_out=c.written_out)
        y = self._linear(y, c.hidden, f"{at}.self_attn.o_proj")
        x = self.op("Add", x, y, name=f"{at}.after_attention")
        h = self.norm(x, f"{at}.post_attention_layernorm", written_out=c.written_out)
        gate = self._linear(h, c.ffn, f"{at}.mlp.gate_proj")
        up = self._linear(h, c.ffn, f"{at}.mlp.up_proj")
        y = self.op("Mul", activation(self, c.activation, gate, at), up, name=f"{at}.hidden")
        if c.sub_norm:
            y = self.norm(y, f"{at}.mlp.ffn_sub_norm", written_out=c.written_out)
        y = self._linear(y, c.hidden, f"{at}.mlp.down_proj")
        return self.op("Add", x, y, name=f"{at}.after_mlp")

    def _linear(self, x: ir.Value, N: int, name: str, bias: bool = False) -> ir.Value:
        return self.linear(x, N, name, bias=bias, group_size=self.c.group_size)

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        """The exporter's trace of ``view``, ``transpose`` and back; or nothing."""
        return views(self, x, heads, self.c.head_size) if self.c.views else x

    def _attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, i: int, present: list[ir.Value]
    ) -> ir.Value:
        c = self.c
        cache: Dims = ["batch", c.kv_heads, "past", c.head_size]
        grown: Dims = ["batch", c.kv_heads, "total", c.head_size]
        past = [self.input(f"past_key_values.{i}.{n}", cache) for n in ("key", "value")]
        y, key, value = self.ops(
            "GroupQueryAttention", q, k, v, *past, self.seqlens, self.total, self.cos, self.sin,
            names=[f"attention_{i}", f"present.{i}.key", f"present.{i}.value"],
            shapes=[["batch", "seq", c.heads * c.head_size], grown, grown], domain=MICROSOFT,
            num_heads=c.heads, kv_num_heads=c.kv_heads, do_rotary=1, scale=c.head_size**-0.5,
        )  # fmt: skip
        present += [key, value]
        return self._heads(y, c.heads)


def views(b: Build, x: ir.Value, heads: int, size: int) -> ir.Value:
    """``[B,S,H*D] -> [B,S,H,D] -> [B,H,S,D] -> [B,S,H,D] -> [B,S,H*D]``."""
    assert x.shape is not None
    at, (batch, seq, _) = x.name, x.shape
    y = b.op("Reshape", x, b.const(f"to_{heads}x{size}", np.array([0, 0, heads, size])),
             name=f"{at}_view", shape=[batch, seq, heads, size])  # fmt: skip
    y = b.op("Transpose", y, name=f"{at}_t", shape=[batch, heads, seq, size], perm=[0, 2, 1, 3])
    y = b.op("Transpose", y, name=f"{at}_tt", shape=[batch, seq, heads, size], perm=[0, 2, 1, 3])
    return b.op("Reshape", y, b.const("to_flat", np.array([0, 0, -1])),
                name=f"{at}_flat", shape=[batch, seq, heads * size])  # fmt: skip


def activation(b: Build, form: str, g: ir.Value, at: str = "act") -> ir.Value:
    """``act(g)`` in one of the forms exporters write."""

    def number(value: float) -> ir.Value:
        return b.const(f"number{value}", np.float32(value))

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return b.op(op_type, *inputs, name=f"{at}.{form}_{len(b.graph)}", **attributes)

    match form:
        case "relu2":
            return op("Pow", op("Relu", g), number(2))
        case "relu2_product":
            relu = op("Relu", g)
            return op("Mul", relu, relu)
        case "relu2_twice":
            return op("Mul", op("Relu", g), op("Relu", g))
        case "silu":
            return op("Mul", g, op("Sigmoid", g))
        case "gelu_erf":
            return op("Gelu", g)
        case "gelu_tanh":
            return op("Gelu", g, approximate="tanh")
        case "gelu_erf_written":
            erf = op("Erf", op("Div", g, number(2**0.5)))
            return op("Mul", op("Mul", g, op("Add", erf, number(1))), number(0.5))
        case "gelu_erf_scaled":
            erf = op("Erf", op("Mul", g, number(0.5**0.5)))
            return op("Mul", op("Mul", number(0.5), g), op("Add", number(1), erf))
        case "gelu_tanh_written":
            cube = op("Mul", op("Pow", g, number(3)), number(0.044715))
            u = op("Mul", op("Add", g, cube), number((2 / np.pi) ** 0.5))
            return op("Mul", op("Mul", g, number(0.5)), op("Add", op("Tanh", u), number(1)))
        case "gelu_tanh_product":
            cube = op("Mul", number(0.044715), op("Mul", op("Mul", g, g), g))
            u = op("Mul", number((2 / np.pi) ** 0.5), op("Add", cube, g))
            return op("Mul", number(0.5), op("Mul", g, op("Add", number(1), op("Tanh", u))))
    raise ValueError(form)
