"""expert_mlp_packed: the layer of `expert_mlp` from one packed copy of its weights.

packed_EB  of `pack_experts` in the place of both weights, with F = hidden, for inference that keeps
           no other copy of them. With weights="int8" or "int4" it is of `quantize_experts`; the
           torch backend rounds these weights to the dtype of x.
Everything else as in `expert_mlp`. No gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels.backends import native, reference, triton
from gose_kernels.ops import expert_mlp as mlp
from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.ops.mlp_call import MlpCall, check, check_options, mlp_numbers, want
from gose_kernels.packing import DTYPES, expert_bytes, unpack_experts
from gose_kernels.quantized import check_weights
from gose_kernels.registry import Cost, register


class PackedCall(NamedTuple):
    """The arguments of expert_mlp_packed, in schema order."""

    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    packed_EB: Tensor
    hidden: int
    bias_up_EH: Tensor | None = None
    bias_down_ED: Tensor | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.702
    weights: str | None = None

    def unpacked(self) -> MlpCall:
        """The call of expert_mlp that computes the same, its weights with gates first."""
        act, columns = ACTIVATIONS[self.activation], self.hidden
        if self.weights is not None:
            check_weights("expert_mlp_packed", self.weights)
        w_up_EHD, w_down_EDF = unpack_experts(
            self.packed_EB,
            width=self.x_TD.shape[1],
            hidden=self.hidden,
            dtype=self.x_TD.dtype,
            gated=act.gated,
            weights=self.weights,
        )
        bias_up_EH = self.bias_up_EH
        if bias_up_EH is not None and self.interleaved:
            bias_up_EH = bias_up_EH.unflatten(1, (columns, 2)).mT.flatten(1)
        return MlpCall(
            *(self.x_TD, self.weight_TK, self.expert_TK, w_up_EHD, w_down_EDF),
            *(bias_up_EH, self.bias_down_ED),
            activation=self.activation,
            limit=self.limit,
            alpha=self.alpha,
        )


def bind_packed(*args: Any, **options: Any) -> tuple[MlpCall, Tensor, str | None]:
    """A checked call as its Triton launcher takes it: expert_mlp's with weights of shapes alone,
    and the packed ones."""
    call = PackedCall(*args, **options)
    if call.weights is not None:
        check_weights("expert_mlp_packed", call.weights)
    x_TD, packed_EB, F = call.x_TD, call.packed_EB, call.hidden
    want(x_TD.dim() == 2, "x_TD", "of 2 dimensions", f"shape {tuple(x_TD.shape)}")
    want(F >= 0, "hidden", "at least 0", F)
    E, D, dtype = packed_EB.shape[0], x_TD.shape[1], x_TD.dtype
    none = torch.empty(0)
    layer = MlpCall(
        *(x_TD, call.weight_TK, call.expert_TK, none, none, call.bias_up_EH, call.bias_down_ED),
        activation=call.activation,
        interleaved=call.interleaved,
        limit=call.limit,
        alpha=call.alpha,
    )
    check_options(layer)
    H, gated = (2 if layer.act.gated else 1) * F, layer.act.gated
    w_up_EHD, w_down_EDF = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((E, H, D), (E, D, F))
    )
    layer = layer._replace(w_up_EHD=w_up_EHD, w_down_EDF=w_down_EDF)
    check(layer)
    B = expert_bytes(width=D, hidden=F, dtype=dtype, gated=gated, weights=call.weights)
    aligned = packed_EB.numel() == 0 or (packed_EB.stride(0) % 64 == 0 and packed_EB.stride(1) == 1)
    if (packed_EB.dtype, tuple(packed_EB.shape), aligned) != (torch.uint8, (E, B), True):
        raise ValueError(
            f"expert_mlp_packed: packed_EB must be uint8 of shape {(E, B)} with rows a multiple of "
            f"64 bytes apart, got {packed_EB.dtype} of shape {tuple(packed_EB.shape)}, "
            f"strides {packed_EB.stride()}"
        )
    return layer, packed_EB, call.weights


def expert_mlp_packed_reference(*args: Any, **options: Any) -> Tensor:
    return mlp.expert_mlp_reference(*PackedCall(*args, **options).unpacked())


def _cpu(*args: Any, **named: Any) -> Tensor:
    call = PackedCall(*args, **named)
    options = call.activation, call.interleaved, call.limit, call.alpha
    numbers = mlp_numbers(*options, call.hidden, call.weights)
    out_TD: Tensor = torch.ops.gose_native.expert_mlp.default(
        *(numbers, call.packed_EB, call.x_TD, call.weight_TK, call.expert_TK),
        *(None, None, call.bias_up_EH, call.bias_down_ED),
    )
    return out_TD


def _fake(*args: Any, backend: str | None = None, **options: Any) -> Tensor:
    x_TD = PackedCall(*args, **options).x_TD
    return x_TD.new_empty(x_TD.shape)


def _cost(*args: Any, **options: Any) -> Cost:
    """Every slot used, no more experts read than there are slots."""
    call = PackedCall(*args, **options)
    T, D = call.x_TD.shape
    slots, H = (
        call.expert_TK.numel(),
        call.hidden * (2 if ACTIVATIONS[call.activation].gated else 1),
    )
    read = min(call.packed_EB.shape[0], slots) * call.packed_EB.shape[1]
    moved = 2 * call.x_TD.numel() * call.x_TD.element_size() + slots * 8 + read
    return Cost(T, moved, 2 * slots * D * (H + call.hidden))


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x_TD, weight_TK, expert_TK, _, w_down_EDF = mlp.example(device, dtype)
    E, D, F = w_down_EDF.shape
    B = expert_bytes(width=D, hidden=F, dtype=dtype)
    packed_EB = torch.zeros(E, B, device=device, dtype=torch.uint8)
    return x_TD, weight_TK, expert_TK, packed_EB, F


expert_mlp_packed = register(
    "expert_mlp_packed(Tensor x_TD, Tensor weight_TK, Tensor expert_TK, Tensor packed_EB, "
    "int hidden, Tensor? bias_up_EH=None, Tensor? bias_down_ED=None, *, "
    'str activation="swiglu", bool interleaved=False, float? limit=None, float alpha=1.702, '
    "str? weights=None, str? backend=None) -> Tensor",
    triton("expert_mlp_packed", "expert_mlp_packed", *DTYPES, bind=bind_packed),
    native("cpu", _cpu, *DTYPES),
    reference(expert_mlp_packed_reference),
    fake=_fake,
    cost=_cost,
    example=_example,
)
