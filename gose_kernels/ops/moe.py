"""moe: a whole mixture-of-experts layer: `route` and `expert_mlp` as one op.

    score[t, e]     = sum_d x[t, d] * w_router[e, d], or logits[t, e]
    weight, expert, entropy, load, importance, loss = route(score, top_k, ...)
    out             = expert_mlp(x, weight, expert, ...)

x_TD           float32 | bfloat16 | float16 | float64, any strides
w_up_EHD, w_down_EDF, bias_up_EH, bias_down_ED, frozen_E, frozen_EF, activation, interleaved,
transposed, limit, alpha                              as in `expert_mlp`
top_k, entropy_TE, entropy_E, bias_E, noise_TE, policy and the options after it   as in `route`
w_router_ED    floating, no bias: scores are summed in float32 (float64 with a float64 x), in which
               x and w_router are read, also under autocast
logits_TE      floating, read in float32 (float64 with a float64 x); for a router of another kind
               Exactly one of the two; policy egs, which reads no score, may have neither
returns        out_TD, dtype of x; then the six outputs of `route`: weight_TK, expert_TK, entropy_T,
               load_E, importance_E, loss_L
T = 0 gives an empty out and zero statistics.
Differentiable in x, router, logits, entropies, weights and biases, once: where a gradient is
needed the layer runs as `route` and `expert_mlp`, whose backward keeps x, scores and pre only.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels import repeats
from gose_kernels.backends import native, reference, triton
from gose_kernels.ops import expert_mlp, route_call
from gose_kernels.ops.mlp_call import MlpCall
from gose_kernels.ops.mlp_call import check as check_mlp
from gose_kernels.packing import (
    DTYPES,
    Packed,
    numbers_then,
    packed_matrix,
)
from gose_kernels.registry import OPS, Cost, register

_MLP_OPTIONS = ("activation", "interleaved", "transposed", "limit", "alpha")


class MoeCall(NamedTuple):
    """The tensors and top_k of one call, in schema order."""

    x_TD: Tensor
    w_up_EHD: Tensor
    w_down_EDF: Tensor
    top_k: int
    w_router_ED: Tensor | None = None
    logits_TE: Tensor | None = None
    bias_up_EH: Tensor | None = None
    bias_down_ED: Tensor | None = None
    frozen_E: Tensor | None = None
    frozen_EF: Tensor | None = None
    entropy_TE: Tensor | None = None
    entropy_E: Tensor | None = None
    bias_E: Tensor | None = None
    noise_TE: Tensor | None = None


def _check(call: MoeCall, policy: str) -> None:
    """What `route` and `expert_mlp` cannot see."""
    x_TD, w_up_EHD = call.x_TD, call.w_up_EHD
    if x_TD.dim() != 2 or w_up_EHD.dim() != 3:
        raise ValueError(
            f"moe: x_TD must have 2 dimensions and w_up_EHD 3, "
            f"got shapes {tuple(x_TD.shape)} and {tuple(w_up_EHD.shape)}"
        )
    given = (call.w_router_ED is not None) + (call.logits_TE is not None)
    if given != 1 and (given, policy) != (0, "egs"):
        raise ValueError(
            f"moe: exactly one of w_router_ED and logits_TE must be given (policy egs may have "
            f"neither), got {given} with policy {policy}"
        )
    E, (T, D) = w_up_EHD.shape[0], x_TD.shape
    for name, wanted in (("w_router_ED", (E, D)), ("logits_TE", (T, E))):
        tensor = getattr(call, name)
        if tensor is not None and (tuple(tensor.shape) != wanted or not tensor.is_floating_point()):
            raise ValueError(
                f"moe: {name} must be floating point of shape {wanted}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def _score(call: MoeCall) -> Tensor:
    dtype = torch.promote_types(call.x_TD.dtype, torch.float32)
    if call.logits_TE is not None:
        return call.logits_TE.to(dtype)
    if call.w_router_ED is not None:
        return call.x_TD.to(dtype) @ call.w_router_ED.to(dtype).mT
    return call.x_TD.new_zeros(call.x_TD.shape[0], call.w_up_EHD.shape[0], dtype=dtype)


def _layer(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    """The layer as a graph of its two ops."""
    call = MoeCall(*args)
    _check(call, options.get("policy", "softmax"))
    of_mlp = {name: options.pop(name) for name in _MLP_OPTIONS if name in options}
    routing = torch.ops.gose.route(
        *(_score(call), call.top_k, call.entropy_TE, call.entropy_E, call.bias_E, call.noise_TE),
        **options,
        backend=backend,
    )
    out_TD: Tensor = torch.ops.gose.expert_mlp(
        *(call.x_TD, routing[0], routing[1], call.w_up_EHD, call.w_down_EDF),
        *(call.bias_up_EH, call.bias_down_ED, call.frozen_E, call.frozen_EF),
        **of_mlp,
        backend=backend,
    )
    return out_TD, *routing


def moe_reference(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    return _layer(*args, backend="torch", **options)


def _checked(call: MoeCall, options: dict[str, Any]) -> tuple[MlpCall, dict[str, Any]]:
    """The call of expert_mlp, its weight_TK and expert_TK of shapes alone, and route's options."""
    _check(call, options.get("policy", "softmax"))
    of_mlp = {name: options[name] for name in _MLP_OPTIONS if name in options}
    of_route = {name: options[name] for name in options if name not in of_mlp}
    (T, _), E = call.x_TD.shape, call.w_up_EHD.shape[0]
    score_TE = call.x_TD.new_empty(T, E, dtype=torch.float32)
    entropies = (call.entropy_TE, call.entropy_E, call.bias_E, call.noise_TE)
    route_call.check(route_call.RouteCall(score_TE, call.top_k, *entropies, **of_route))
    slots_TK = score_TE[:, : call.top_k]
    mlp = MlpCall(
        *(call.x_TD, slots_TK, slots_TK, call.w_up_EHD, call.w_down_EDF),
        *(call.bias_up_EH, call.bias_down_ED, call.frozen_E, call.frozen_EF),
        **of_mlp,
    )
    check_mlp(mlp)
    return mlp, of_route


def bind(*args: Any, **options: Any) -> tuple[MoeCall, MlpCall, dict[str, Any]]:
    """A checked call, as the Triton launcher takes it."""
    call = MoeCall(*args)
    return call, *_checked(call, options)


def _packed(call: MoeCall, options: dict[str, Any]) -> tuple[Tensor, Tensor, list[Packed]]:
    """A checked call as its kernel takes it: both options as numbers, packed experts and router."""
    mlp, of_route = _checked(call, options)
    copies, router_ED = [expert_mlp.packed_of(mlp)], call.w_router_ED
    if router_ED is not None:
        exact = router_ED.dtype == call.x_TD.dtype  # products of halves are exact in float32
        dtype = None if exact else torch.float32
        copies.append(packed_matrix(router_ED, transposed=False, dtype=dtype))
    kept = [copy for copy in copies if copy is not None]
    return expert_mlp.numbers_of(mlp), route_call.pack_options(**of_route), kept


def _kernel(numbers: Tensor, of_route: Tensor, copies: list[Packed]) -> Any:
    """What takes the positional arguments of a call."""
    packed = [copy.packed_EB for copy in copies]
    router = packed[1] if len(packed) > 1 else None
    return partial(torch.ops.gose_native.moe.default._op, numbers, of_route, packed[0], router)


def _cpu(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _kernel(*_packed(MoeCall(*args), options))(*args)
    return outputs


def _learn(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if any(isinstance(value, list) for value in options.values()):
        return
    numbers, of_route, copies = _packed(MoeCall(*args), options)
    weights = (1, 2, 4) if len(copies) > 1 else (1, 2)
    then = torch.cat([numbers, numbers_then(args[0], [args[at] for at in weights])])
    versions = [version for copy in copies for version in copy.versions]
    run = _kernel(then, of_route, copies)
    repeats.learn("moe", weights, versions, args, options, run)


def _cost(*args: Any, **options: Any) -> Cost:
    """Scores, routing, every slot used."""
    call = MoeCall(*args)
    dtype = torch.promote_types(call.x_TD.dtype, torch.float32)
    (T, D), E = call.x_TD.shape, call.w_up_EHD.shape[0]
    score_TE = call.x_TD.new_empty(T, E, dtype=dtype)
    weight_TK = score_TE.new_empty(T, call.top_k)
    of_mlp = {name: options.pop(name) for name in _MLP_OPTIONS if name in options}
    mlp = OPS["expert_mlp"].cost_of(
        *(call.x_TD, weight_TK, weight_TK.to(torch.int32), call.w_up_EHD, call.w_down_EDF),
        *(call.bias_up_EH, call.bias_down_ED),
        **of_mlp,
    )
    routing = OPS["route"].cost_of(
        *(score_TE, call.top_k, call.entropy_TE, call.entropy_E, call.bias_E, call.noise_TE),
        **options,
    )
    router = call.w_router_ED
    made = 0 if router is None else 2 * T * E * D
    read = 0 if router is None else router.numel() * router.element_size()
    return Cost(T, mlp.bytes + routing.bytes + read, mlp.flops + routing.flops + made)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    T, E, D, F, top_k = 4, 3, 8, 6, 2
    return (
        torch.ones(T, D, device=device, dtype=dtype),
        torch.full((E, 2 * F, D), 0.1, device=device, dtype=dtype),
        torch.full((E, D, F), 0.1, device=device, dtype=dtype),
        top_k,
        torch.full((E, D), 0.1, device=device, dtype=dtype),
    )


moe = register(
    "moe(Tensor x_TD, Tensor w_up_EHD, Tensor w_down_EDF, int top_k, Tensor? w_router_ED=None, "
    "Tensor? logits_TE=None, Tensor? bias_up_EH=None, Tensor? bias_down_ED=None, "
    "Tensor? frozen_E=None, Tensor? frozen_EF=None, Tensor? entropy_TE=None, "
    "Tensor? entropy_E=None, Tensor? bias_E=None, Tensor? noise_TE=None, "
    '*, str activation="swiglu", bool interleaved=False, bool transposed=False, '
    "float? limit=None, float alpha=1.702, "
    'str policy="softmax", bool softmax_before=True, bool renormalize=False, '
    'str gate="softmax", int num_groups=1, int top_groups=1, float entropy_floor=0.05, '
    'float? tau=None, int? capacity=None, str capacity_order="token", str? adaptive=None, '
    "float mass=0.9, float[] bands=[], float noise_std=0.0, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton("moe", "moe", *DTYPES, bind=bind),
    native("cpu", _cpu, *DTYPES, again=repeats.repeating("moe", 1), learn=_learn),
    reference(moe_reference),
    fake=_layer,
    training=_layer,
    cost=_cost,
    example=_example,
    autocast=("x_TD", "w_up_EHD", "w_down_EDF", "bias_up_EH", "bias_down_ED"),
)
