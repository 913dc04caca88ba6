"""The call of `route`: its arguments and options, checked, and as numbers for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, float32

POLICIES = ("softmax", "sigmoid", "group_limited", "expert_choice", "egs")
GATES = ("softmax", "sigmoid")
ORDERS = ("token", "priority")  # of capacity
ADAPTIVE = (None, "mass", "bands")
_INTS = ("num_groups", "top_groups", "capacity")
_NUMBERS = ("entropy_floor", "tau", "mass", "noise_std")
CUDA_EXPERTS, CUDA_BANDS = 1024, 16  # kRouteDeviceExperts and kRouteBands of csrc/params.h
LOSSES = ("balance", "importance", "noisy_load", "z", "entropy")  # the order of loss_L


class RouteCall(NamedTuple):
    """The arguments of one call, in schema order."""

    score_TE: Tensor
    top_k: int
    entropy_TE: Tensor | None = None
    entropy_E: Tensor | None = None
    bias_E: Tensor | None = None
    noise_TE: Tensor | None = None
    policy: str = "softmax"
    softmax_before: bool = True
    renormalize: bool = False
    gate: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    entropy_floor: float = 0.05
    tau: float | None = None
    capacity: int | None = None
    capacity_order: str = "token"
    adaptive: str | None = None
    mass: float = 0.9
    bands: Sequence[float] = ()
    noise_std: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.score_TE.dtype, float32)

    @property
    def is_sigmoid(self) -> bool:
        return self.policy == "sigmoid" or (
            self.policy == "group_limited" and self.gate == "sigmoid"
        )

    @property
    def sums_over(self) -> str:
        """What the weights are normalized over: "chosen", "experts", or "nothing"."""
        if self.policy == "egs" or self.renormalize:
            return "chosen"
        if self.is_sigmoid:
            return "nothing"
        return "experts" if self.softmax_before else "chosen"


def _want(holds: bool, argument: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"route: {argument} must be {wanted}, got {got}")


def _want_tensor(name: str, value: Tensor | None, shape: tuple[int, ...], policies: bool) -> None:
    if value is not None:
        _want(policies, name, "None", "a tensor: this policy does not read it")
        _want(tuple(value.shape) == shape, name, f"of shape {shape}", tuple(value.shape))
        _want(value.is_floating_point(), name, "floating point", value.dtype)


def check(call: RouteCall) -> None:
    """Raises ValueError for a call that no backend takes."""
    score_TE, top_k, policy = call.score_TE, call.top_k, call.policy
    _check_options(call)
    _want(score_TE.dim() == 2, "score_TE", "of 2 dimensions", f"shape {tuple(score_TE.shape)}")
    _want(score_TE.is_floating_point(), "score_TE", "floating point", score_TE.dtype)
    T, E = score_TE.shape
    _want(1 <= top_k <= E, "top_k", f"in [1, E={E}]", top_k)
    egs = policy == "egs"
    _want_tensor("entropy_TE", call.entropy_TE, (T, E), egs)
    _want_tensor("entropy_E", call.entropy_E, (E,), egs)
    _want_tensor("bias_E", call.bias_E, (E,), call.is_sigmoid)
    _want_tensor("noise_TE", call.noise_TE, (T, E), policy == "softmax")
    given = (call.entropy_TE is not None) + (call.entropy_E is not None)
    _want(given == egs, "exactly one of entropy_TE and entropy_E", "given to policy egs", given)
    if policy == "group_limited":
        groups = call.num_groups
        _want(E % groups == 0, "num_groups", f"a divisor of E={E}", groups)
        room = call.top_groups * (E // groups)
        _want(top_k <= room, "top_k", f"at most the {room} experts of the top_groups", top_k)


def _check_options(call: RouteCall) -> None:
    """The part of `check` that needs no tensor: the kernels trust what passed it."""
    policy, gate, order, adaptive = call.policy, call.gate, call.capacity_order, call.adaptive
    _want(policy in POLICIES, "policy", f"one of {', '.join(POLICIES)}", repr(policy))
    _want(call.entropy_floor > 0, "entropy_floor", "above 0", call.entropy_floor)
    if call.tau is not None:
        _want(policy == "egs", "tau", "None", f"{call.tau}: only policy egs reads it")
        _want(call.tau > 0, "tau", "above 0", call.tau)
    _want(gate in GATES, "gate", "softmax or sigmoid", repr(gate))
    if policy == "group_limited":
        groups, best = call.num_groups, call.top_groups
        _want(groups >= 1, "num_groups", "at least 1", groups)
        _want(1 <= best <= groups, "top_groups", f"in [1, num_groups={groups}]", best)
    _want(order in ORDERS, "capacity_order", "token or priority", order)
    if call.capacity is None:
        _want(policy != "expert_choice", "capacity", "given to policy expert_choice", None)
    else:
        _want(call.capacity >= 1, "capacity", "at least 1", call.capacity)
    _want(adaptive in ADAPTIVE, "adaptive", "None, mass or bands", adaptive)
    if adaptive is not None:
        _want(policy != "expert_choice", "adaptive", "None for expert_choice", adaptive)
        _want(0 < call.mass <= 1, "mass", "in (0, 1]", call.mass)
        ascending = all(a < b for a, b in zip(call.bands, call.bands[1:], strict=False))
        given = adaptive == "mass" or len(call.bands) > 0
        _want(ascending and given, "bands", "ascending and not empty", list(call.bands))
    std = call.noise_std
    _want(std >= 0, "noise_std", "at least 0", std)
    _want(policy == "softmax" or std == 0, "noise_std", f"0 for {policy}", std)


def pack_options(**options: Any) -> Tensor:
    """The options as numbers in the order of csrc/bind_route.h, checked."""
    call = RouteCall(torch.empty(0), 0, **options)
    for option in (*_INTS, *_NUMBERS):
        value = getattr(call, option)
        types, wanted = ((int,), "an int") if option in _INTS else ((int, float), "a number")
        _want(value is None or isinstance(value, types), option, wanted, repr(value))
    _check_options(call)
    numbers = [
        *(POLICIES.index(call.policy), bool(call.softmax_before), bool(call.renormalize)),
        *(GATES.index(call.gate), call.num_groups, call.top_groups),
        *(call.entropy_floor, call.tau or 0, call.capacity or 0),
        *(ORDERS.index(call.capacity_order), ADAPTIVE.index(call.adaptive)),
        *(call.mass, call.noise_std, *call.bands),
    ]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
