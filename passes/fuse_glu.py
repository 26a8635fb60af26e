"""Fuse a gated feed-forward network into one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitcompile.opset import DOMAIN
from bitcompile.passes import graph as edit
from bitcompile.passes.activations import GatedProduct, gated_product
from bitcompile.passes.norms import epsilon, norm_of, unfusable
from bitcompile.passing import Rewrite


@dataclass(frozen=True)
class FeedForward:
    """``down(sub_norm?(act(gate) * up))`` with gate and up still to be traced back."""

    down: ir.Node
    sub_norm: ir.Node | None
    product: GatedProduct

    @property
    def hidden(self) -> ir.Value | None:
        """``act(gate) * up``."""
        return (self.sub_norm or self.down).inputs[0]

    @property
    def split(self) -> ir.Node | None:
        """The Split that makes gate and up."""
        return edit.made_by(self.product.gate, "Split")

    @property
    def gate_up(self) -> ir.Node | None:
        """The merged projection."""
        return edit.made_by(self.split.inputs[0], "BitLinear", DOMAIN) if self.split else None

    @property
    def norm(self) -> ir.Node | None:
        """The norm before the network."""
        return norm_of(self.gate_up.inputs[0]) if self.gate_up else None


class FuseGlu(Rewrite[FeedForward]):
    """``down(sub_norm?(act(gate) * up))`` -> ``BitGLU(x)``.

    Where ``gate, up = Split(BitLinear(RMSNormalization(x)))`` and act is relu2, silu, gelu_erf or
    gelu_tanh in any form that :mod:`bitcompile.passes.activations` reads. Refuses when gate and up
    are not the two equal halves, in this order, of one merged projection behind an
    RMSNormalization; when a projection has a bias; when the two norms differ in eps, or the
    projections in layout, group size or activation bits; or when a value inside is used outside.
    """

    name: ClassVar[str] = "fuse-glu"

    def pattern(self, node: ir.Node) -> FeedForward | None:
        """Match at the down projection."""
        if not edit.is_op(node, "BitLinear", DOMAIN):
            return None
        sub_norm = norm_of(node.inputs[0])
        product = gated_product((sub_norm or node).inputs[0])
        return FeedForward(node, sub_norm, product) if product is not None else None

    def check(self, match: FeedForward) -> str | None:
        """See the class."""
        return _halves(match) or _plain(match) or _norms(match) or _closed(match)

    def rewrite(self, graph: ir.Graph, match: FeedForward) -> None:
        """See the class."""
        norm, gate_up, down, sub_norm = match.norm, match.gate_up, match.down, match.sub_norm
        if norm is None or gate_up is None:
            raise ValueError("rewrite needs a match that check accepted")
        F = down.attributes.get_int("K", 0)
        node = edit.new_node(
            graph,
            "BitGLU",
            [
                *norm.inputs[:2],
                *gate_up.inputs[1:3],
                sub_norm.inputs[1] if sub_norm else edit.absent_input(graph),
                *down.inputs[1:3],
                down.inputs[4],
            ],
            {
                **edit.packing_of(down),
                "K": gate_up.attributes.get_int("K", 0),
                "N": down.attributes.get_int("N", 0),
                "F": F,
                "F2": 2 * F,
                "eps": epsilon(norm),
                "activation": match.product.activation,
                "sub_norm": int(sub_norm is not None),
            },
            domain=DOMAIN,
            name=down.name,
        )
        graph.insert_after(down, node)
        edit.replace(graph, down.outputs[0], node.outputs[0])


def _halves(match: FeedForward) -> str | None:
    """Gate and up must be the halves of one projection."""
    gate, up, split = match.product.gate, match.product.up, match.split
    if split is None or match.gate_up is None:
        return f"gate comes from {edit.describe(gate)}, not from a merged projection"
    if tuple(split.outputs) != (gate, up):
        return "gate and up are not the two parts, in this order, of one Split"
    F = match.down.attributes.get_int("K", 0)
    sizes = edit.constant(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is None or sizes.numpy().tolist() != [F, F]:
        return f"gate and up are not both of {F} rows, as down reads"
    return None


def _plain(match: FeedForward) -> str | None:
    """No bias, nothing added early, one form of weights."""
    if match.gate_up is None:
        return "there is no merged projection"
    for node, what in ((match.gate_up, "gate and up"), (match.down, "down")):
        if not edit.absent(node.inputs[3]):
            return f"{what} has bias {edit.describe(node.inputs[3])}"
    if not edit.absent(match.gate_up.inputs[4]):
        return f"gate and up adds residual {edit.describe(match.gate_up.inputs[4])}"
    before, after = edit.packing_of(match.gate_up), edit.packing_of(match.down)
    for key, value in before.items():
        if value != after[key]:
            return f"{key} is {value} in gate and up, {after[key]} in down"
    return None


def _norms(match: FeedForward) -> str | None:
    """Both norms must be able to vanish and share eps."""
    norm, gate_up = match.norm, match.gate_up
    if gate_up is None or norm is None:
        source = gate_up.inputs[0] if gate_up else None
        return f"gate and up read {edit.describe(source)}, not an RMSNormalization"
    reason = unfusable(norm, gate_up.attributes.get_int("K", 0))
    if reason is not None or match.sub_norm is None:
        return reason
    if epsilon(norm) != epsilon(match.sub_norm):
        return f"eps is {epsilon(norm):g} before the network, {epsilon(match.sub_norm):g} inside"
    return unfusable(match.sub_norm, match.down.attributes.get_int("K", 0))


def _closed(match: FeedForward) -> str | None:
    """Nothing inside may be read from outside."""
    inside = [match.product.gate, match.product.up]
    for node in match.product.nodes:
        inside += [value for value in node.outputs if value is not match.hidden]
    for value in inside:
        if value.is_graph_output() or any(u.node not in match.product.nodes for u in value.uses()):
            return f"{value.name!r} inside the network is used outside"
    return edit.shared(match.hidden) or edit.shared(match.split.inputs[0] if match.split else None)
