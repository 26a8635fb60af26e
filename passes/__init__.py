"""The graph passes, one a file, and the order they run in."""

from __future__ import annotations

from bitcompile.passes.attach_functions import AttachFunctions
from bitcompile.passes.drop_views import DropViews
from bitcompile.passes.fold_residual import FoldResidual
from bitcompile.passes.fuse_glu import FuseGlu
from bitcompile.passes.fuse_norm_bit_linear import FuseNormBitLinear
from bitcompile.passes.fuse_rms_norm import FuseRmsNorm
from bitcompile.passes.last_logits import LastLogits
from bitcompile.passes.merge_projections import MergeProjections
from bitcompile.passes.name_nodes import NameNodes
from bitcompile.passes.narrow_activations import NarrowActivations
from bitcompile.passes.pack_attention import PackAttention
from bitcompile.passes.quantize_head import QuantizeHead
from bitcompile.passes.strip_metadata import StripMetadata
from bitcompile.passes.verify_graph import VerifyGraph
from bitcompile.passing import Options, Pass


def pipeline(options: Options) -> tuple[Pass, ...]:
    """The passes from a portable model to one that is fused for ternary inference.

    Nodes get their names first, so that refusals and dumps say which layer they speak of.
    """
    return (
        NameNodes(),
        FuseRmsNorm(),
        DropViews(),
        MergeProjections(),
        PackAttention(),
        FuseGlu(),
        FuseNormBitLinear(),
        FoldResidual(),
        *((LastLogits(),) if options.logits == "last" else ()),
        QuantizeHead(options.head),
    )


def finishing(activations: str = "float32") -> tuple[Pass, ...]:
    """The passes after lowering, when every weight lies in the target's layout.

    ``activations``: element type of what passes between operators, see ``Target.activations``.
    """
    return (
        *((NarrowActivations(activations),) if activations != "float32" else ()),
        StripMetadata(),
        NameNodes(),
        AttachFunctions(),
        VerifyGraph(),
    )


__all__ = ["finishing", "pipeline"]
