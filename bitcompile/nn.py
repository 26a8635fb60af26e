"""Ternary layers for torch: a trainable one, and how any class of them is read.

:class:`BitLinear` takes the place of ``torch.nn.Linear``; :func:`quantize_` puts it there in a
whole model. Layers of Hugging Face transformers are known too; :func:`register` teaches
bitcompile a class of yours.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from bitcompile.errors import InputError, UsageError
from bitcompile.numerics import AMAX_FLOOR, quantize_weight_absmean

NORMS = (None, "rms")
_FLOOR = float(AMAX_FLOOR)


# --- the trainable layer ------------------------------------------------------------------------


class BitLinear(nn.Linear):  # type: ignore[misc]  # torch is untyped here
    """A linear layer with ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764).

    ``y = fl(w q) * fl(scale / s) + bias``: q, s from :func:`quantize_activations` of each token,
    w, scale from :func:`quantize_weight` of the float weight, which is what is trained. Sums of
    integers are exact in float32 (K up to 131,072), so training, evaluation and the compiled
    layer have the same integers. Computed in float32, also under autocast; the result has the
    type of the input. Gradients pass straight through both roundings.

    ``norm="rms"``: an RMSNorm with ``eps`` on the input, as a submodule ``norm``. Parameters and
    state are those of ``nn.Linear``, so its checkpoints load.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        norm: str | None = None,
        eps: float = 1e-6,
    ) -> None:
        if norm not in NORMS:
            raise UsageError(f"unknown norm {norm!r}: choose 'rms' or None")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.norm = None
        if norm is not None:
            self.norm = nn.RMSNorm(in_features, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.norm is not None:
            x = self.norm(x)
        with _without_autocast(x.device.type):
            q, s = quantize_activations(x.float())
            w, scale = quantize_weight(self.weight.float())
            y = functional.linear(q, w) * (scale / s)
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{super().extra_repr()}, norm={None if self.norm is None else 'rms'!r}"


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`bitcompile.numerics.quantize_activations` in torch, with a straight-through gradient.

    float32 ``[..., K]`` to integers in float32 ``[..., K]`` and ``s`` ``[..., 1]``.
    """
    amax = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=_FLOOR)
    s = amax.reciprocal() * 127
    scaled = x * s
    return _straight_through(scaled.round().clamp(-128, 127), scaled), s


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`bitcompile.numerics.quantize_weight_absmean` in torch, straight through.

    float32 ``[N, K]`` to -1, 0, 1 in float32 and the scale, a scalar. torch sums the mean in its
    own order, so the scale may differ from NumPy's in the last bit.
    """
    scale = weight.detach().abs().mean().clamp(min=_FLOOR)
    scaled = weight * scale.reciprocal()
    return _straight_through(scaled.round().clamp(-1, 1), scaled), scale


def _without_autocast(device: str) -> AbstractContextManager[None]:
    """A context in which a product of integers keeps its bits; the meta device has no autocast."""
    off: AbstractContextManager[None] = (
        nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    )
    return off


def _straight_through(exact: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """The value of ``exact`` with the gradient of ``smooth``; their difference has no rounding."""
    return smooth + (exact - smooth).detach()


def quantize_(
    model: nn.Module,
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    norm: str | None = None,
    eps: float = 1e-6,
) -> int:
    """Replace every ``nn.Linear`` in ``model`` by a :class:`BitLinear`; returns how many.

    ``filter(name, module)`` says whether a layer is replaced. Parameters are kept, the objects
    themselves, so an optimizer made before stays valid. Subclasses of ``nn.Linear`` are left: the
    code around them (as in ``nn.MultiheadAttention``) reads their weight without calling them.
    Raises UsageError if ``model`` itself is the linear layer, which cannot be replaced in place.
    """
    if type(model) is nn.Linear:
        raise UsageError("the model is one nn.Linear: make a bitcompile.nn.BitLinear instead")
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and (filter is None or filter(name, module))
    ]
    made: dict[nn.Module, BitLinear] = {}
    for name, linear in found:
        if linear not in made:
            made[linear] = _ternary_twin(linear, norm, eps)
        model.set_submodule(name, made[linear])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _forbid_fast_path(module)
    return len(made)


def _ternary_twin(linear: nn.Module, norm: str | None, eps: float) -> BitLinear:
    """A BitLinear with the parameters of ``linear``."""
    weight = linear.weight
    shape = (linear.in_features, linear.out_features)
    new = BitLinear(*shape, bias=False, device="meta", dtype=weight.dtype, norm=norm, eps=eps)
    new.weight, new.bias = weight, linear.bias
    if new.norm is not None:
        new.norm = nn.RMSNorm(shape[0], eps=eps, device=weight.device, dtype=weight.dtype)
    new.train(linear.training)
    return new


def _forbid_fast_path(layer: Any) -> None:
    """Make torch call the layer's linears: its fused inference path multiplies by their floats."""
    if isinstance(layer.linear1, BitLinear) or isinstance(layer.linear2, BitLinear):
        layer.activation_relu_or_gelu = 0


# --- reading ternary layers ---------------------------------------------------------------------


@dataclass(frozen=True)
class TernaryWeights:
    """What a ternary layer computes: BitLinear of ``RMSNorm(x)``, see docs/operators.md.

    Values are torch tensors or NumPy arrays.
    """

    weight: Any
    """``[N, K]`` of -1, 0, 1, any type."""
    scale: Any
    """Multiplied to the integer product: a number, or one a row ``[N]``, or group ``[N, G]``."""
    bias: Any = None
    """``[N]``, added last; None without one."""
    gamma: Any = None
    """Weight ``[K]`` of an RMSNorm on the input; None without one."""
    eps: float = 1e-6
    """Its epsilon."""
    group_size: int = 0
    """Columns that share a scale, 0 for whole rows."""


Reader = Callable[[Any], TernaryWeights]

_READERS: dict[type | str, Reader] = {}
"""By class, or by the full name of a class whose package may not be installed."""


def register(cls: type, read: Reader) -> None:
    """Teach bitcompile that modules of ``cls`` are ternary layers and how to read them.

    ``read(module)`` gives the weights; the layer must compute what :class:`TernaryWeights` says.
    Subclasses count too, unless they have a ``forward`` of their own. A later registration
    replaces an earlier one. Raises UsageError if ``cls`` is no module class.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UsageError(f"{cls!r} is no class of torch.nn.Module: only such can be registered")
    _READERS[cls] = read


def reader(module: nn.Module) -> Reader | None:
    """How ``module`` is read; None if it is no ternary layer.

    Raises InputError if its class changes the ``forward`` of a registered one.
    """
    changed: type | None = None
    for cls in type(module).__mro__:
        read = _READERS.get(cls) or _READERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if read is not None:
            if changed is None:
                return read
            raise InputError(
                f"{changed.__name__} changes the forward of {cls.__name__}: "
                "register it with bitcompile.nn.register"
            )
        if changed is None and "forward" in vars(cls):
            changed = cls
    return None


def _read_ours(module: Any) -> TernaryWeights:
    with torch.no_grad():
        weight, scale = quantize_weight(module.weight.float())
    norm = module.norm
    if norm is None:
        return TernaryWeights(weight.to(torch.int8), scale, module.bias)
    return TernaryWeights(weight.to(torch.int8), scale, module.bias, norm.weight, norm.eps)


def _read_transformers_bit_linear(module: Any) -> TernaryWeights:
    """Packed ``[N/4, K]``, and the result is divided by ``weight_scale``."""
    from bitcompile.frontends.checkpoint import unpack_rows

    codes = unpack_rows(module.weight.detach().cpu().numpy(), "weight")
    scale = module.weight_scale.detach().float().reciprocal()
    return TernaryWeights(codes.astype(np.int8) - 1, scale, module.bias, *_inner_norm(module))


def _read_transformers_auto_bit_linear(module: Any) -> TernaryWeights:
    """Float masters (online), or ternary floats and a scale that multiplies the bias too."""
    weight: npt.NDArray[Any] = module.weight.detach().float().cpu().numpy()
    if module.online_quant:
        quantized = quantize_weight_absmean(weight)
        return TernaryWeights(*quantized, module.bias, *_inner_norm(module))
    scale = module.weight_scale.detach().float()
    bias = None if module.bias is None else module.bias.detach().float() * scale
    return TernaryWeights(weight, scale, bias, *_inner_norm(module))


def _inner_norm(module: Any) -> tuple[Any, float]:
    norm = module.rms_norm
    return (None, 1e-6) if norm is None else (norm.weight, norm.variance_epsilon)


_READERS[BitLinear] = _read_ours
_READERS["transformers.integrations.bitnet.BitLinear"] = _read_transformers_bit_linear
_READERS["transformers.integrations.bitnet.AutoBitLinear"] = _read_transformers_auto_bit_linear
