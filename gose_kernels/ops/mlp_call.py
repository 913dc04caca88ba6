"""Calls of expert_mlp and its gradients, bound and checked; their options as kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels.ops.activations import ACTIVATIONS, PHIS, Activation
from gose_kernels.quantized import WEIGHTS, check_weights


class MlpCall(NamedTuple):
    """The arguments of expert_mlp and expert_mlp_train, in schema order."""

    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    w_up_EHD: Tensor
    w_down_EDF: Tensor
    bias_up_EH: Tensor | None = None
    bias_down_ED: Tensor | None = None
    frozen_E: Tensor | None = None
    frozen_EF: Tensor | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    transposed: bool = False
    limit: float | None = None
    alpha: float = 1.702

    @property
    def act(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def clamp(self) -> float:
        limit = self.act.limit if self.limit is None else self.limit
        return math.inf if limit is None else limit

    @property
    def scale(self) -> float:
        """alpha as phi takes it."""
        return self.alpha if self.activation == "swiglu_oai" else 1.0

    @property
    def phi(self) -> str:
        """The name of phi: silu, gelu, gelu_tanh, relu or relu2."""
        return self.act.phi.__name__.removeprefix("_")

    @property
    def up_EDH(self) -> Tensor:
        return self.w_up_EHD if self.transposed else self.w_up_EHD.mT

    @property
    def down_EFD(self) -> Tensor:
        return self.w_down_EDF if self.transposed else self.w_down_EDF.mT

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x_TD.dtype, torch.float32)


class BackwardCall(NamedTuple):
    """What expert_mlp_backward takes beyond the arguments of expert_mlp, in schema order."""

    pre_NH: Tensor
    grad_TD: Tensor
    need_x: bool = True
    need_weight: bool = True
    need_up: bool = True
    need_down: bool = True
    need_bias_up: bool = False
    need_bias_down: bool = False

    @property
    def need_pre(self) -> bool:
        return self.need_x or self.need_up or self.need_bias_up


def want(holds: bool, argument: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"expert_mlp: {argument} must be {wanted}, got {got}")


def want_shape(argument: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None:
        want(tuple(tensor.shape) == shape, argument, f"of shape {shape}", tuple(tensor.shape))


def check_options(call: MlpCall) -> None:
    names = ", ".join(ACTIVATIONS)
    want(call.activation in ACTIVATIONS, "activation", f"one of {names}", repr(call.activation))
    for name in ("interleaved", "limit") if not call.act.gated else ():
        want(not getattr(call, name), name, f"unset for {call.activation}", getattr(call, name))
    want(call.clamp > 0, "limit", "above 0", call.limit)


def check(call: MlpCall) -> tuple[int, int, int, int]:
    """(E, H, F, D) of a call that some backend may take; ValueError for any other."""
    x_TD = call.x_TD
    check_options(call)
    want(x_TD.dim() == 2, "x_TD", "of 2 dimensions", f"shape {tuple(x_TD.shape)}")
    want(x_TD.is_floating_point(), "x_TD", "floating point", x_TD.dtype)
    for name in ("w_up_EHD", "w_down_EDF"):
        shape = tuple(getattr(call, name).shape)
        want(len(shape) == 3, name, "of 3 dimensions", f"shape {shape}")
    E, F, D = call.down_EFD.shape
    H = 2 * F if call.act.gated else F
    layout = f"with transposed={call.transposed}, activation={call.activation!r}"
    wanted = (E, D, H) if call.transposed else (E, H, D)
    got = tuple(call.w_up_EHD.shape)
    want(got == wanted, "w_up_EHD", f"of shape {wanted} {layout}, to fit w_down_EDF", got)
    want(x_TD.shape[1] == D, "x_TD", f"of width D = {D} as w_down_EDF {layout}", x_TD.shape[1])
    slots, T = tuple(call.weight_TK.shape), x_TD.shape[0]
    want(len(slots) == 2 and slots[0] == T, "weight_TK", f"of shape [T={T}, K]", slots)
    want_shape("expert_TK", call.expert_TK, *slots)
    want_shape("bias_up_EH", call.bias_up_EH, E, H)
    want_shape("bias_down_ED", call.bias_down_ED, E, D)
    want_shape("frozen_E", call.frozen_E, E)
    want_shape("frozen_EF", call.frozen_EF, E, F)
    wanted_dtype, dtype = call.sum_dtype, call.weight_TK.dtype
    want(dtype == wanted_dtype, "weight_TK", f"{wanted_dtype} for x_TD of {x_TD.dtype}", dtype)
    for name in ("w_up_EHD", "w_down_EDF", "bias_up_EH", "bias_down_ED"):
        if (tensor := getattr(call, name)) is not None:
            want(tensor.dtype == x_TD.dtype, name, f"{x_TD.dtype} as x_TD", tensor.dtype)
    for name in ("frozen_E", "frozen_EF"):
        if (tensor := getattr(call, name)) is not None:
            want(tensor.dtype == torch.bool, name, "bool", tensor.dtype)
    return E, H, F, D


def bind_backward(args: Sequence[Any], options: dict[str, Any]) -> tuple[MlpCall, BackwardCall]:
    needs = {name: options[name] for name in BackwardCall._fields if name in options}
    others = {name: options[name] for name in options if name not in needs}
    return MlpCall(*args[:9], **others), BackwardCall(*args[9:], **needs)


def check_backward(call: MlpCall, back: BackwardCall) -> None:
    _, H, _, D = check(call)
    want_shape("pre_NH", back.pre_NH, call.expert_TK.numel(), H)
    want_shape("grad_TD", back.grad_TD, call.x_TD.shape[0], D)
    for name in ("pre_NH", "grad_TD"):
        dtype = getattr(back, name).dtype
        want(dtype == call.x_TD.dtype, name, f"{call.x_TD.dtype} as x_TD", dtype)


def empty_gradients(call: MlpCall, back: BackwardCall) -> tuple[Tensor, ...]:
    """Uninitialized gradients of x, weight, w_up, w_down, bias_up, bias_down; [0] if not needed."""
    E, H, _, D = check(call)
    shapes = (
        (back.need_x, call.x_TD, call.x_TD.shape),
        (back.need_weight, call.weight_TK, call.weight_TK.shape),
        (back.need_up, call.w_up_EHD, call.w_up_EHD.shape),
        (back.need_down, call.w_down_EDF, call.w_down_EDF.shape),
        (back.need_bias_up, call.x_TD, (E, H)),
        (back.need_bias_down, call.x_TD, (E, D)),
    )
    return tuple(like.new_empty(shape if need else (0,)) for need, like, shape in shapes)


@lru_cache(maxsize=256)
def mlp_numbers(
    activation: str,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    hidden: int,
    weights: str | None = None,
) -> Tensor:
    """The options as the kernel reads them (csrc/bind_mlp.h), checked."""
    none = torch.empty(0)
    tensors = (none, none, none, none, none, None, None, None, None)
    call = MlpCall(*tensors, activation, interleaved, False, limit, alpha)
    check_options(call)
    act = call.act
    numbers = [PHIS.index(act.phi), act.gated, interleaved, call.clamp, call.scale, act.shift]
    if weights is not None:
        check_weights("expert_mlp_packed", weights)
    kind = 0 if weights is None else 1 + WEIGHTS.index(weights)
    return torch.tensor([*numbers, hidden, kind], dtype=torch.float64, device="cpu")
