"""recognize-bit-linear: every way of writing a ternary layer, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from bitcompile import numerics
from bitcompile.frontends.foreign import convert, recognize
from bitcompile.packing import PORTABLE
from bitcompile.passing import Record
from tests.graphs import Array, input_names, node_of, ops, run_model

K, N = 37, 21
RNG = np.random.default_rng(3)
SIGNS = RNG.integers(-1, 2, (N, K)).astype(np.float32)
SIGNS[5] = 0
ROWS = RNG.uniform(0.01, 0.1, N).astype(np.float32)
BIAS = RNG.standard_normal(N).astype(np.float32)
ALPHA = np.float32(0.0625 + 0.003)
X = RNG.standard_normal((2, 3, K)).astype(np.float32) * np.array([1e-7, 1, 50], "f")[:, None]

NUMBERS = {"eps": 1e-5, "qmax": 127, "qmin": -128, "one_over": 1 / 127, "two": 2, "alpha": ALPHA}
AMAX = "a = Abs(x)\n m = ReduceMax<keepdims=1>(a, last)\n f = Clip(m, eps)"
SCALE = f"{AMAX}\n r = Reciprocal(f)\n s = Mul(r, qmax)"
ROUND = "u = Mul(x, s)\n v = Round(u)\n c = Clip(v, qmin, qmax)"
QUANTISED = f"{SCALE}\n {ROUND}"
AUTO = f"{QUANTISED}\n q = Div(c, s)\n p = MatMul(q, Wt)\n y = Mul(p, alpha)"


def model(body: str, weights: Mapping[str, Array] | None = None, opset: int = 23) -> ir.Model:
    """``x [b, s, K] -> y [b, s, N]``; names that no node makes are constants."""
    constants: dict[str, Array] = {k: np.asarray(v, np.float32) for k, v in NUMBERS.items()}
    constants |= {"last": np.array([-1]), "Wt": np.ascontiguousarray(SIGNS.T), "W": SIGNS}
    constants |= dict(weights or {})
    text = f'<ir_version: 8, opset_import: ["": {opset}]>\ng (float[b,s,{K}] x) => (float[b,s,n] y)'
    made = onnx.parser.parse_model(f"{text} {{\n{body}\n}}")
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(
        numpy_helper.from_array(data, name) for name, data in constants.items() if name in read
    )
    seen: list[str] = []
    for node in made.graph.node:
        again = f"_{seen.count(node.op_type)}" if node.op_type in seen else ""
        node.name = f"/layers.0/proj/{node.op_type}{again}"
        seen.append(node.op_type)
    onnx.checker.check_model(made)
    return ir.from_proto(made)


def recognised(source: ir.Model) -> tuple[ir.Model, Record]:
    copy = ir.from_proto(ir.to_proto(source))
    convert(copy, "model.onnx")
    return copy, recognize(copy, "model.onnx")


def plain_run(source: ir.Model, x: Array = X) -> Array:
    """As written: optimised, a DequantizeLinear before MatMul rounds the activations again."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(source).SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def equal(source: ir.Model, rows: Any = ALPHA, bias: Any = None) -> ir.Model:
    """Recognise the layer; results and int32 accumulators are those of the exporter's graph."""
    found, record = recognised(source)
    assert (record.count, record.refusals) == (1, ())
    node = node_of(found, "BitLinear")
    assert ops(found) == ["BitLinear"]
    assert node.attributes["layout"].value == PORTABLE.id
    assert (node.attributes["K"].value, node.attributes["N"].value) == (K, N)
    (before, after) = plain_run(source), run_model(found, {"x": X})[0]
    np.testing.assert_allclose(after, before, rtol=2e-5, atol=2e-5 * np.abs(before).max(-1).min())
    q, s = numerics.quantize_activations(X)
    acc = numerics.integer_matmul(q, SIGNS.astype(np.int8))
    for y in (before, after):
        unscaled = (y.astype(np.float64) - (0 if bias is None else bias)) * s / rows
        if bias is None:  # beside a bias, the smallest rows lose their digits
            np.testing.assert_array_equal(np.rint(unscaled), acc)
    stored = node.inputs[2]
    assert stored is not None
    assert stored.const_value is not None
    live = SIGNS.any(axis=1)
    scale = stored.const_value.numpy()[live, 0]
    np.testing.assert_allclose(scale, np.broadcast_to(rows, N)[live], rtol=2e-7)
    if bias is not None:
        given = node.inputs[3]
        assert given is not None
        assert given.const_value is not None
        np.testing.assert_allclose(given.const_value.numpy(), np.broadcast_to(bias, N), rtol=1e-6)
    return found


ACTIVATIONS = {
    "as torch": QUANTISED,
    "Div by the scale": f"{AMAX}\n t = Div(f, qmax)\n s = Reciprocal(t)\n {ROUND}",
    "127 over": f"{AMAX}\n s = Div(qmax, f)\n {ROUND}",
    "times 1/127": f"{AMAX}\n t = Mul(one_over, f)\n s = Reciprocal(t)\n {ROUND}",
    "x over t": f"{AMAX}\n t = Div(f, qmax)\n u = Div(x, t)\n v = Round(u)\n"
    " c = Clip(v, qmin, qmax)\n s = Reciprocal(t)",
    "Max and Min": "a = Abs(x)\n m = ReduceMax<keepdims=1>(a, last)\n f = Max(eps, m)\n"
    " r = Reciprocal(f)\n s = Mul(qmax, r)\n u = Mul(s, x)\n v = Round(u)\n"
    " c1 = Max(v, qmin)\n c = Min(qmax, c1)",
    "clip first": f"{SCALE}\n u = Mul(x, s)\n v = Clip(u, qmin, qmax)\n c = Round(v)",
    "no clip": f"{SCALE}\n u = Mul(x, s)\n c = Round(u)",
    "clip at -127": f"{SCALE}\n low = Neg(qmax)\n u = Mul(x, s)\n v = Round(u)\n"
    " c = Clip(v, low, qmax)",
    "through int8": f"{QUANTISED.replace('c =', 'c0 =')}\n i = Cast<to=3>(c0)\n c = Cast<to=1>(i)",
    "axis by number": QUANTISED.replace("last", "two_axis"),
    "axis unsqueezed": QUANTISED.replace("m = ReduceMax<keepdims=1>(a, last)",
                                         "m0 = ReduceMax<keepdims=0>(a, last)\n"
                                         " m = Unsqueeze(m0, last)"),
    "constants as nodes": "k = Constant<value_float=127.0>()\n ki = Constant<value_int=-128>()\n"
    " lo = CastLike(ki, x)\n" + QUANTISED.replace("qmax", "k").replace("qmin", "lo"),
    "identities": "x1 = Identity(x)\n x2 = Cast<to=1>(x1)\n"
    + QUANTISED.replace("Abs(x)", "Abs(x2)"),
    "floor after the division": "a = Abs(x)\n m = ReduceMax<keepdims=1>(a, last)\n"
    " t0 = Div(m, qmax)\n low = Div(eps, qmax)\n t = Clip(t0, low)\n s = Reciprocal(t)\n" + ROUND,
}  # fmt: skip


@pytest.mark.parametrize("form", ACTIVATIONS)
@pytest.mark.parametrize("before", [True, False])
def test_activations(form: str, before: bool) -> None:
    """Dequantised before the product (AutoBitLinear) or after (BitLinear)."""
    tail = "q = Div(c, s)\n p = MatMul(q, Wt)\n y = Mul(p, alpha)"
    if not before:
        tail = "p = MatMul(c, Wt)\n d = Div(p, s)\n y = Mul(d, alpha)"
    equal(model(f"{ACTIVATIONS[form]}\n {tail}", {"two_axis": np.array([2])}))


TAILS = {
    "div by both": ("d = Mul(inverse, s)\n p = MatMul(c, Wt)\n y = Div(p, d)", ALPHA),
    "mul by the quotient": ("d = Div(alpha, s)\n p = MatMul(c, Wt)\n y = Mul(d, p)", ALPHA),
    "two divisions": ("p = MatMul(c, Wt)\n e = Div(p, inverse)\n y = Div(e, s)", ALPHA),
    "scales of rows": ("q = Div(c, s)\n p = MatMul(q, Wt)\n y = Mul(p, rows)", ROWS),
    "scales of rows, kept": ("q = Div(c, s)\n p = MatMul(q, Wt)\n y = Mul(rows3, p)", ROWS),
    "folded per tensor": ("q = Div(c, s)\n y = MatMul(q, Wa)", ALPHA),
    "folded per row": ("q = Div(c, s)\n y = MatMul(q, Wr)", ROWS),
    "one over s": ("i = Reciprocal(s)\n q = Mul(c, i)\n y = MatMul(q, Wa)", ALPHA),
    "transposed": ("q = Div(c, s)\n T = Transpose<perm=[1,0]>(W)\n p = MatMul(q, T)\n"
                   " y = Mul(p, alpha)", ALPHA),
    "int8 weight": ("q = Div(c, s)\n F = Cast<to=1>(W8)\n p = MatMul(q, F)\n y = Mul(p, alpha)",
                    ALPHA),
    "int8 weight, scaled": ("q = Div(c, s)\n F = Cast<to=1>(W8)\n G = Mul(F, rows)\n"
                            " y = MatMul(q, G)", ROWS),
    "dequantized per tensor": ("q = Div(c, s)\n F = DequantizeLinear(W8, alpha)\n"
                               " y = MatMul(q, F)", ALPHA),
    "dequantized per row": ("q = Div(c, s)\n F = DequantizeLinear<axis=0>(U8, rows, zeros)\n"
                            " T = Transpose(F)\n y = MatMul(q, T)", ROWS),
    "dequantized from 4 bits": ("q = Div(c, s)\n F = DequantizeLinear(W4, alpha)\n"
                                " y = MatMul(q, F)", ALPHA),
    "integers": ("j = Cast<to=3>(c)\n p = MatMulInteger(j, W8)\n F = Cast<to=1>(p)\n"
                 " d = Div(F, s)\n y = Mul(d, alpha)", ALPHA),
    "integers with a zero point": ("j = Cast<to=3>(c)\n p = MatMulInteger(j, U8t, z, one8)\n"
                                   " F = Cast<to=1>(p)\n d = Div(alpha, s)\n y = Mul(F, d)", ALPHA),
    "half precision weight": ("q = Div(c, s)\n F = Cast<to=1>(W16)\n p = MatMul(q, F)\n"
                              " y = Mul(p, alpha)", ALPHA),
    "online": ("q = Div(c, s)\n A = Abs(master)\n M = ReduceMean<keepdims=0>(A)\n"
               " C = Clip(M, eps)\n S = Reciprocal(C)\n U = Mul(master, S)\n V = Round(U)\n"
               " L = Neg(one)\n V2 = Clip(V, L, one)\n F = Div(V2, S)\n y = MatMul(q, F)", None),
}  # fmt: skip
MASTER = SIGNS.T * np.float32(0.3) + RNG.uniform(-0.05, 0.05, (K, N)).astype(np.float32)
STORED: dict[str, Array] = {
    "inverse": 1 / ALPHA,
    "rows": ROWS,
    "rows3": ROWS.reshape(1, 1, N),
    "Wa": SIGNS.T * ALPHA,
    "Wr": SIGNS.T * ROWS,
    "W8": SIGNS.T.astype(np.int8),
    "U8": (SIGNS + 7).astype(np.uint8),
    "U8t": (SIGNS.T + 1).astype(np.uint8),
    "W16": SIGNS.T.astype(np.float16),
    "zeros": np.full(N, 7, np.uint8),
    "z": np.int8(0),
    "one8": np.uint8(1),
    "one": np.float32(1),
    "master": MASTER,
}


def stored() -> dict[str, Array]:
    import ml_dtypes

    four = SIGNS.T.astype(np.int8).astype(ml_dtypes.int4)
    return {**{k: np.asarray(v) for k, v in STORED.items()}, "W4": four}


@pytest.mark.parametrize("form", TAILS)
def test_weights_and_scales(form: str) -> None:
    tail, rows = TAILS[form]
    if rows is None:
        rows = np.abs(MASTER).mean(dtype=np.float32)
    equal(model(f"{QUANTISED}\n {tail}", stored()), rows)


@pytest.mark.parametrize(
    ("tail", "bias"),
    [
        ("q = Div(c, s)\n p = MatMul(q, Wa)\n y = Add(p, bias)", BIAS),
        ("q = Div(c, s)\n p = MatMul(q, Wa)\n y = Sub(p, bias)", -BIAS),
        ("q = Div(c, s)\n p = MatMul(q, Wt)\n b = Add(bias, p)\n y = Mul(b, alpha)", BIAS * ALPHA),
        ("p = MatMul(c, Wt)\n d = Mul(inverse, s)\n e = Div(p, d)\n y = Add(e, bias)", BIAS),
    ],
)
def test_a_bias_between_or_after_the_scales(tail: str, bias: Array) -> None:
    equal(model(f"{QUANTISED}\n {tail}", {**stored(), "bias": BIAS}), bias=bias)


def gemm(attributes: str, weight: str, bias: str = ", bias") -> ir.Model:
    body = f"{QUANTISED}\n q = Div(c, s)\n y = Gemm{attributes}(q, {weight}{bias})"
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 20]> g (float[b,{K}] x) => (float[b,{N}] y) {{{body}}}'
    )
    data = {**stored(), "last": np.array([-1]), "bias": BIAS, "Wn": SIGNS * ALPHA}
    data |= {k: np.asarray(v, np.float32) for k, v in NUMBERS.items()}
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(
        numpy_helper.from_array(v, k) for k, v in data.items() if k in read
    )
    return ir.from_proto(made)


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [("", "Wa", ", bias"), ("<transB=1>", "Wn", ", bias"), ("<transB=1>", "Wn", ""),
     ("<alpha=0.5, beta=2.0>", "Wa", ", bias")],
)  # fmt: skip
def test_gemm(attributes: str, weight: str, bias: str) -> None:
    source = gemm(attributes, weight, bias)
    found, record = recognised(source)
    assert (record.count, ops(found)) == (1, ["BitLinear"])
    x = X.reshape(-1, K)
    np.testing.assert_allclose(
        run_model(found, {"x": x})[0], plain_run(source, x), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21, 22, 23])
def test_opsets(opset: int) -> None:
    """Axes of reductions are attributes up to 17."""
    body = AUTO
    if opset == 17:
        body = body.replace("<keepdims=1>(a, last)", "<keepdims=1, axes=[-1]>(a)")
    equal(model(body, opset=opset))


def test_layers_that_share_a_quantisation() -> None:
    """Its nodes go with the last layer; one that something else reads stays."""
    body = AUTO.replace("y = Mul", "y1 = Mul")
    body += "\n p2 = MatMul(q, Wa)\n y2 = Add(y1, p2)\n"
    found, record = recognised(model(f"{body} y = Neg(y2)", stored()))
    assert (record.count, record.refusals) == (2, ())
    assert sorted(ops(found)) == ["Add", "BitLinear", "BitLinear", "Neg"]
    body = AUTO.replace("y = Mul", "y1 = Mul") + "\n d = ReduceSum(q)\n y = Add(y1, d)"
    source = model(body)
    found, record = recognised(source)
    assert record.count == 1
    assert "Round" in ops(found)
    np.testing.assert_allclose(
        run_model(found, {"x": X})[0], plain_run(source), rtol=1e-4, atol=1e-4
    )


def test_a_residual_and_later_products_stay_outside() -> None:
    body = AUTO.replace("y = Mul", "y1 = Mul") + "\n y2 = Add(y1, y1)\n y = Mul(y2, y1)"
    found, record = recognised(model(body))
    assert (record.count, ops(found)) == (1, ["BitLinear", "Add", "Mul"])


def test_the_module_names_the_weight() -> None:
    found = equal(model(AUTO))
    assert input_names(node_of(found, "BitLinear")) == [
        "x",
        "layers.0.proj.weight_packed",
        "layers.0.proj.weight_scales",
        "absent",
        "absent",
    ]


REFUSALS = {
    "floor": (AUTO.replace("eps", "two"), "magnitude has floor 2; BitLinear's is 1e-05"),
    "no floor": (AUTO.replace("f = Clip(m, eps)", "f = Identity(m)"), "has no floor"),
    "floor added": (AUTO.replace("Clip(m, eps)", "Add(m, eps)"),
                    "1e-05 is added to the largest magnitude; BitLinear takes 1e-05 as its floor"),
    "floor of the step": (AUTO.replace("Clip(m, eps)", "Identity(m)").replace(
        "r = Reciprocal(f)\n s = Mul(r, qmax)", "t0 = Div(f, qmax)\n t = Clip(t0, eps)\n"
        " s = Reciprocal(t)"), "has floor 0.00127; BitLinear's is 1e-05"),
    "levels": (AUTO.replace("s = Mul(r, qmax)", "s = Mul(r, seven)"), "becomes 7, not 127"),
    "clamp": (AUTO.replace("Clip(v, qmin, qmax)", "Clip(v, low, seven)"),
              "activations are clamped to -8..7, not to -128..127"),
    "axis": (AUTO.replace("last", "middle"), "it is not over axis -1 alone"),
    "whole tensor": (AUTO.replace("(a, last)", "(a)"), "it is not over axis -1 alone"),
    "largest value": (AUTO.replace("ReduceMax<keepdims=1>(a", "ReduceMax<keepdims=1>(x"),
                      "not of a magnitude"),
    "other x": (AUTO.replace("Abs(x)", "Abs(x2)").replace("a =", "x2 = Neg(x)\n a ="),
                "'x' is scaled by the largest magnitude of 'x2'"),
    "half up": (AUTO.replace("v = Round(u)", "u5 = Add(u, half)\n v = Floor(u5)"),
                "activations come from Div, not from per-token rounding"),
    "plain float": ("p = MatMul(x, Wt)\n y = Mul(p, alpha)",
                    "activations come from 'x', not from per-token rounding"),
    "five values": (AUTO.replace("Wt", "W5"), "weight has 5 distinct values in row 0"),
    "two signs of magnitude": (AUTO.replace("Wt", "Wasym"), "distinct values in row"),
    "NaN": (AUTO.replace("Wt", "Wnan"), "holds NaN or Inf"),
    "computed weight": (AUTO.replace("p = MatMul(q, Wt)", "w0 = Sin(Wt)\n p = MatMul(q, w0)"),
                        "its weight comes from Sin, not from a constant"),
    "unscaled": (f"{QUANTISED}\n p = MatMul(c, Wt)\n y = Neg(p)",
                 "its result is used by Neg before it is scaled"),
    "unscaled output": (f"{QUANTISED}\n y = MatMul(c, Wt)",
                        "'y' is used before it is divided by the activations' scale"),
    "early bias": (f"{QUANTISED}\n p = MatMul(c, Wt)\n e = Add(p, rows)\n y = Div(e, s)",
                   "a bias is added before the activations' scale"),
    "bfloat16 steps": (AUTO.replace("q = Div", "c16 = Cast<to=16>(c)\n c32 = Cast<to=1>(c16)\n"
                                    " q = Div").replace("Div(c,", "Div(c32,"),
                       "activations are cast to BFLOAT16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    body, reason = REFUSALS[case]
    five, asym, nan = SIGNS.T.copy(), SIGNS.T.copy(), SIGNS.T.copy()
    five[:5, 0] = [-2, -1, 0, 1, 2]
    five[5:, 0] = 0
    asym[asym > 0] = 0.5
    nan[0, 0] = np.nan
    extra: dict[str, Array] = {"seven": np.float32(7), "low": np.float32(-8), "W5": five}
    extra |= {"Wasym": asym, "Wnan": nan, "middle": np.array([1]), "half": np.float32(0.5)}
    source = model(body, {**stored(), **{k: np.asarray(v) for k, v in extra.items()}})
    found, record = recognised(source)
    assert record.count == 0
    (refusal,) = record.refusals
    assert refusal.where == "/layers.0/proj/MatMul"
    assert reason in refusal.reason
    assert "BitLinear" not in ops(found)
    np.testing.assert_array_equal(run_model(found, {"x": X})[0], plain_run(source))


def test_refuses_a_weight_that_callers_can_override() -> None:
    source = model(AUTO)
    source.graph.inputs.append(source.graph.initializers["Wt"])
    _, record = recognised(source)
    assert "comes from 'Wt', not from a constant" in record.refusals[0].reason


def test_refuses_half_precision_activations() -> None:
    half = {k: np.asarray(v, np.float16) for k, v in {**NUMBERS, "Wt": SIGNS.T}.items()}
    proto = ir.to_proto(model(AUTO, half))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    _, record = recognised(ir.from_proto(proto))
    assert record.refusals[0].reason == "x is FLOAT16, not FLOAT"


def test_an_ordinary_float_layer_is_no_candidate() -> None:
    weight = RNG.standard_normal((K, N)).astype(np.float32)
    _, record = recognised(model("y = MatMul(x, Wf)", {"Wf": weight}))
    assert (record.count, record.refusals) == (0, ())
