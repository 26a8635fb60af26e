"""Parts of the ONNX function bodies that several operators share (``onnx.parser`` text).

A body restates the NumPy reference in standard operators, in the same order of roundings, so that
without the plugin a model still computes the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitcompile.opset import DOMAIN, ONNX_OPSET, Attribute
from bitcompile.packing import layout


def function(
    name: str, inputs: Sequence[str], attributes: Sequence[str], body: str, result: str = "y"
) -> str:
    """A model-local function of our domain in ``onnx.parser`` text."""
    return (
        f'<opset_import: ["" : {ONNX_OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">\n'
        f"{name} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({result}) {{\n{body}}}\n"
    )


def constant(name: str, value: float | int | Sequence[int]) -> str:
    """One Constant node."""
    if isinstance(value, float):
        kind, text = "value_float: float", repr(value)
    elif isinstance(value, int):
        kind, text = "value_int: int", str(value)
    else:
        kind, text = "value_ints: ints", "[" + ", ".join(map(str, value)) + "]"
    return f"  {name} = Constant <{kind} = {text}> ()\n"


def quantize(limit: float, x: str = "x") -> str:
    """``xq`` (float, integral), ``s``: per-token quantisation of ``x`` to ``+-limit``.

    A NaN or Inf in a row turns that row's ``s`` into NaN.
    """
    return (
        constant("q_last", [-1])
        + constant("q_floor", 1e-5)
        + constant("q_one", 1.0)
        + constant("q_zero", 0.0)
        + constant("q_limit", limit)
        + f"  q_abs = Abs ({x})\n"
        "  q_amax = ReduceMax <keepdims: int = 1> (q_abs, q_last)\n"
        "  q_safe = Max (q_amax, q_floor)\n"
        f"  q_poison = Mul ({x}, q_zero)\n"
        "  q_nan = ReduceSum <keepdims: int = 1> (q_poison, q_last)\n"
        "  q_range = Add (q_safe, q_nan)\n"
        "  q_r = Div (q_one, q_range)\n"
        # Without the Max of one, ONNX Runtime turns (1 / t) * 127 into 127 / t.
        "  q_kept = Max (q_r)\n"
        "  s = Mul (q_kept, q_limit)\n"
        f"  q_scaled = Mul ({x}, s)\n"
        "  xq = Round (q_scaled)\n"
    )


def unpack(layout_id: str, w: str = "w") -> str:
    """``w_t``: the packed weight as int8 ``[K, N]`` (attributes N, K of the function)."""
    chosen = layout(layout_id)
    trits = chosen.codec.codes.astype(int) - 1  # [256, fields]
    split = [0, 0, *chosen.sizes(chosen.data + chosen.field)]
    natural = sorted(range(len(split)), key=chosen.order.__getitem__)
    return (
        constant("u_flat", [0, -1, chosen.tile_bytes])
        + constant("u_split", split)
        + constant("u_trits", [int(trit) for trit in trits.ravel()])
        + constant("u_table", list(trits.shape))
        + constant("u_rows", [0, chosen.tile_n, -1])
        + constant("u_start", [0, 0])
        + constant("u_axes", [0, 1])
        + constant("u_zero", [0])
        + "  u_n = Constant <value_int: int = @N> ()\n"
        "  u_k = Constant <value_int: int = @K> ()\n"
        "  u_n1 = Unsqueeze (u_n, u_zero)\n"
        "  u_k1 = Unsqueeze (u_k, u_zero)\n"
        "  u_end = Concat <axis: int = 0> (u_n1, u_k1)\n"
        "  u_small = Cast <to: int = 3> (u_trits)\n"
        "  u_of_byte = Reshape (u_small, u_table)\n"
        f"  u_int = Cast <to: int = 6> ({w})\n"
        "  u_tiles = Reshape (u_int, u_flat)\n"
        "  u_codes = Gather <axis: int = 0> (u_of_byte, u_tiles)\n"
        "  u_fields = Reshape (u_codes, u_split)\n"
        f"  u_order = Transpose <perm: ints = {natural}> (u_fields)\n"
        "  u_wide = Reshape (u_order, u_rows)\n"
        "  u_rowsize = Shape <start: int = 2, end: int = 3> (u_wide)\n"
        "  u_minus = Constant <value_ints: ints = [-1]> ()\n"
        "  u_target = Concat <axis: int = 0> (u_minus, u_rowsize)\n"
        "  u_padded = Reshape (u_wide, u_target)\n"
        "  u_weight = Slice (u_padded, u_start, u_end, u_axes)\n"
        "  w_t = Transpose <perm: ints = [1, 0]> (u_weight)\n"
    )


SUBTREES = (7, 4, 7)
"""Levels of the tree of a norm's sum, between which zeros fill a row up: for K up to 2**18."""


def rms_norm(x: str = "x", gamma: str = "gamma") -> str:
    """``normed``: RMSNorm in the reference's summation order (attribute eps of the function).

    A ReduceSum over two values is one addition; of two axes, which every provider takes.
    """
    text = (
        constant("r_last", [-1])
        + constant("r_two", [-1, 2])
        + constant("r_one", 1.0)
        + constant("r_zeros", [0])
        + "  r_eps = Constant <value_float: float = @eps> ()\n"
        f"  r_k = Shape <start: int = -1> ({x})\n"
        "  r_kf = Cast <to: int = 1> (r_k)\n"
        f"  r_lead = Shape <start: int = 0, end: int = -1> ({x})\n"
        "  r_shape = Concat <axis: int = 0> (r_lead, r_last)\n"
        f"  r_p = Mul ({x}, {x})\n"
    )
    p = "r_p"
    for i, levels in enumerate(SUBTREES):
        text += (
            constant(f"r_size{i}", [2**levels]) + f"  r_count{i} = Shape <start: int = -1> ({p})\n"
            f"  r_minus{i} = Neg (r_count{i})\n"
            f"  r_pad{i} = Mod (r_minus{i}, r_size{i})\n"
            f"  r_pads{i} = Concat <axis: int = 0> (r_zeros, r_pad{i})\n"
            f"  r_sums{i}_0 = Pad ({p}, r_pads{i}, , r_last)\n"
        )
        for level in range(levels):
            text += (
                f"  r_pairs{i}_{level} = Reshape <allowzero: int = 1> (r_sums{i}_{level}, r_two)\n"
                f"  r_sums{i}_{level + 1} = ReduceSum <keepdims: int = 0>"
                f" (r_pairs{i}_{level}, r_last)\n"
            )
        p = f"r_rows{i}"
        text += f"  {p} = Reshape <allowzero: int = 1> (r_sums{i}_{levels}, r_shape)\n"
    return text + (
        f"  r_mean = Div ({p}, r_kf)\n"
        "  r_var = Add (r_mean, r_eps)\n"
        "  r_std = Sqrt (r_var)\n"
        "  r_inverse = Div (r_one, r_std)\n"
        "  r_rstd = Max (r_inverse)\n"  # keeps x * (1 / std) from becoming x / std
        f"  r_y = Mul ({x}, r_rstd)\n"
        f"  normed = Mul (r_y, {gamma})\n"
    )


LINEAR_ATTRIBUTES = ("K", "N", "layout", "group_size", "act_bits")


def linear_body(attributes: Mapping[str, Attribute], x: str = "x") -> str:
    """Quantise ``x``, multiply by the unpacked ternary weight, rescale, add bias and residual."""
    size = int(attributes["group_size"])
    return (
        quantize(127.0, x)
        + "  xi = Cast <to: int = 3> (xq)\n"
        + unpack(str(attributes["layout"]))
        + (_grouped(str(attributes["layout"]), size) if size else _per_row())
        + "  l_biased = Add (l_y, bias)\n"
        "  y = Add (l_biased, residual)\n"
    )


def _per_row() -> str:
    """``l_y`` with one scale a row."""
    return constant("l_flat", [-1]) + (
        "  acc = MatMulInteger (xi, w_t)\n"
        "  accf = Cast <to: int = 1> (acc)\n"
        "  l_rows = Reshape (w_scale, l_flat)\n"
        "  l_scale = Div (l_rows, s)\n"
        "  l_y = Mul (accf, l_scale)\n"
    )


def _grouped(layout_id: str, size: int) -> str:
    """``l_y`` with one scale for each row and ``size`` columns.

    K is padded to whole groups, which become the batch of one integer product ``[G, M, N]``; CumSum
    gathers the groups in order. Tiled scales ``[T, G, tile_n]`` are first laid out as ``[G, N]``.
    """
    tiled = layout(layout_id).tile_n > 1
    order = (
        "  g_order = Transpose <perm: ints = [1, 0, 2]> (w_scale)\n"
        "  g_all = Reshape (g_order, g_keep)\n"
        "  g_gn = Slice (g_all, u_zero, u_n1, g_second)\n"
        if tiled
        else "  g_gn = Transpose <perm: ints = [1, 0]> (w_scale)\n"
    )
    return (
        constant("g_size", [size])
        + constant("g_keep", [0, -1])
        + constant("g_second", [1])
        + constant("g_middle", [1])
        + constant("g_axis", 0)
        + constant("g_lastgroup", -1)
        + constant("g_one", 1.0)
        + constant("g_flat", [-1])
        + order
        + "  g_scale = Unsqueeze (g_gn, g_middle)\n"  # [G, 1, N]
        "  g_neg = Neg (u_k1)\n"
        "  g_pad = Mod (g_neg, g_size)\n"
        "  g_pads = Concat <axis: int = 0> (u_zero, g_pad)\n"
        "  g_last_axis = Constant <value_ints: ints = [-1]> ()\n"
        "  g_xf = Cast <to: int = 1> (xi)\n"
        "  g_xpad = Pad (g_xf, g_pads, , g_last_axis)\n"
        "  g_xint = Cast <to: int = 3> (g_xpad)\n"
        "  g_kpad = Add (u_k1, g_pad)\n"
        "  g_count = Div (g_kpad, g_size)\n"
        "  g_mshape = Concat <axis: int = 0> (g_flat, g_count, g_size)\n"
        "  g_xg = Reshape <allowzero: int = 1> (g_xint, g_mshape)\n"
        "  g_xt = Transpose <perm: ints = [1, 0, 2]> (g_xg)\n"  # [G, M, size]
        "  g_wzero = Concat <axis: int = 0> (u_zero, u_zero, g_pad, u_zero)\n"
        "  g_w32 = Cast <to: int = 1> (w_t)\n"
        "  g_wpad = Pad (g_w32, g_wzero)\n"
        "  g_wint = Cast <to: int = 3> (g_wpad)\n"
        "  g_wshape = Concat <axis: int = 0> (g_count, g_size, u_n1)\n"
        "  g_wg = Reshape (g_wint, g_wshape)\n"  # [G, size, N]
        "  g_acc = MatMulInteger (g_xt, g_wg)\n"
        "  g_accf = Cast <to: int = 1> (g_acc)\n"
        "  g_parts = Mul (g_scale, g_accf)\n"
        "  g_sums = CumSum (g_parts, g_axis)\n"
        "  g_total = Gather <axis: int = 0> (g_sums, g_lastgroup)\n"  # [M, N]
        "  g_lead = Shape <start: int = 0, end: int = -1> (xi)\n"
        "  g_yshape = Concat <axis: int = 0> (g_lead, u_n1)\n"
        "  g_y = Reshape <allowzero: int = 1> (g_total, g_yshape)\n"
        "  g_inverse = Div (g_one, s)\n"
        "  g_kept = Max (g_inverse)\n"  # keeps y * (1 / s) from becoming y / s
        "  l_y = Mul (g_y, g_kept)\n"
    )
