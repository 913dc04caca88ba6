"""Routers of transformers on op `route`: what a router computes, found by asking it, and the swap.

There is no interface for routers: each model has a class of its own whose forward gives
`(router_logits, top_k_weights, top_k_index)`. `find_routing` runs a copy of it on random tokens and
looks for the options of `route` that give the same experts and weights. `swap_router` turns the
router into an instance of a subclass of its own class: parameters, hooks, `isinstance` and with
them router-logit capture and the auxiliary loss stay; `unswap_router` turns it back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gose_kernels.ops.route import route

_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_BIAS = "e_score_correction_bias"
_TOKENS, _RELATIVE = 97, 1e-5


class Routing(NamedTuple):
    """How one router's outputs come from its tokens.

    options       arguments of `route`, with those that replace the router's own
    scale         factor of all weights
    exact         logits are computed in float32 from tokens and weights in float32
    autocast      whether autocast may lower the precision of the logits
    float_logits, float_weights   these are float32 whatever the dtype of the tokens
    takes_bias    the forward has a second argument: the selection bias
    entropy_E     per-expert entropies of policy egs
    """

    options: Mapping[str, Any]
    scale: float
    exact: bool
    autocast: bool
    float_logits: bool
    float_weights: bool
    takes_bias: bool
    entropy_E: Tensor | None = None


def _forward_of(router: nn.Module) -> Any:
    return type(router).forward


def _policies(router: nn.Module) -> Iterator[dict[str, Any]]:
    for renormalize in (False, True):
        yield {"policy": "softmax", "renormalize": renormalize}
    yield {"policy": "softmax", "softmax_before": False}
    for renormalize in (False, True):
        yield {"policy": "sigmoid", "renormalize": renormalize}
    groups = getattr(router, "num_group", None) or 1
    best = getattr(router, "topk_group", None) or 1
    for gate, renormalize in itertools.product(("softmax", "sigmoid"), (False, True)):
        yield {
            "policy": "group_limited",
            "gate": gate,
            "num_groups": groups,
            "top_groups": best,
            "renormalize": renormalize,
        }


def _logits(router: Any, x_TD: Tensor, exact: bool, autocast: bool) -> Tensor:
    weight_ED, bias_E = router.weight, getattr(router, "bias", None)
    if exact:
        x_TD, weight_ED = x_TD.float(), weight_ED.float()
        bias_E = None if bias_E is None else bias_E.float()
    off = torch.autocast(x_TD.device.type, enabled=False)
    with contextlib.nullcontext() if autocast else off:
        return functional.linear(x_TD, weight_ED, bias_E)


def _copy(router: nn.Module, dtype: torch.dtype) -> Any:
    """The router on the CPU with weights and biases that tell its choices apart."""
    probe: Any = copy.deepcopy(router).to("cpu", dtype)
    seed = torch.Generator().manual_seed(0)
    for name, tensor in itertools.chain(probe.named_parameters(), probe.named_buffers()):
        if tensor.is_floating_point():
            scale = tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.3
            if name == "weight":
                scale *= 2  # scores well apart
            tensor.data = (torch.randn(tensor.shape, generator=seed) * scale).to(tensor.dtype)
    return probe


def _extra(router: nn.Module) -> list[str]:
    """Names of the arguments of forward beyond the tokens."""
    return list(inspect.signature(_forward_of(router)).parameters)[2:]


def _expert_sets(expert_TK: Tensor) -> Tensor:
    return expert_TK.sort(dim=1).values


@torch.no_grad()
def find_routing(router: nn.Module) -> Routing | str:
    """How to compute what the router does with `route`, or the reason why that is not possible."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return "it has no weight [experts, width]"
    if type(getattr(router, "top_k", None)) is not int:
        return "it has no top_k"
    extra = _extra(router)
    if extra and (len(extra) > 1 or "bias" not in extra[0]):
        return f"its forward also takes {', '.join(extra)}"
    E, D = weight.shape
    seed = torch.Generator().manual_seed(1)
    x_TD = torch.randn(_TOKENS, D, generator=seed)
    given = [torch.randn(E, generator=seed) * 0.3] if extra else []
    probe = _copy(router, torch.float32)
    try:
        outputs = _forward_of(router)(probe, x_TD, *given)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"it cannot be called with [tokens, width]: {error}"
    if not (isinstance(outputs, tuple) and len(outputs) == 3):
        return "it does not return (logits, weights, experts)"
    logits_TE, weight_TK, expert_TK = outputs
    if not torch.equal(logits_TE, _logits(probe, x_TD, exact=True, autocast=True)):
        return "its logits are not tokens times weight"
    bias_E = given[0] if given else getattr(probe, _BIAS, None)
    scales = {
        1.0,
        *(float(s) for n in _SCALES if isinstance(s := getattr(router, n, 1), int | float)),
    }
    order = _expert_sets(expert_TK)
    for options, scale in itertools.product(_policies(router), sorted(scales)):
        biased = bias_E is not None and "sigmoid" in (options["policy"], options.get("gate"))
        try:
            ours = route(logits_TE, router.top_k, bias_E=bias_E if biased else None, **options)
        except ValueError:
            continue  # groups that do not divide the experts, ...
        if not torch.equal(_expert_sets(ours[1].long()), order):
            continue
        ours_TE = torch.zeros(_TOKENS, E).scatter_(1, ours[1].long(), ours[0] * scale)
        theirs_TE = torch.zeros(_TOKENS, E).scatter_(1, expert_TK, weight_TK.float())
        if bool(((ours_TE - theirs_TE).abs() <= _RELATIVE * theirs_TE.abs()).all()):
            return _with_dtypes(router, probe, x_TD, given, options, scale)
    return "no policy of route gives its experts and weights"


def _with_dtypes(
    router: nn.Module,
    probe: nn.Module,
    x_TD: Tensor,
    given: list[Tensor],
    options: dict[str, Any],
    scale: float,
) -> Routing | str:
    forward = _forward_of(router)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = forward(probe, x_TD, *given)[0].float()
        autocast = torch.equal(theirs, _logits(probe, x_TD, exact=True, autocast=True).float())
    low = _copy(router, torch.bfloat16)
    try:
        logits_TE, weight_TK, _ = forward(low, x_TD.bfloat16(), *given)
    except (RuntimeError, ValueError) as error:
        return f"it cannot run in bfloat16: {error}"
    for exact in (False, True):
        ours = _logits(low, x_TD.bfloat16(), exact, autocast)
        if torch.equal(ours.to(logits_TE.dtype), logits_TE):
            return Routing(
                options,
                scale,
                exact,
                autocast,
                float_logits=logits_TE.dtype == torch.float32,
                float_weights=weight_TK.dtype == torch.float32,
                takes_bias=bool(given),
            )
    return "its logits in bfloat16 are not tokens times weight"


def routed(
    self: Any, hidden_states: Tensor, *given: Tensor | None, **named: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a swapped router's forward is made of: its logits, and the six outputs of `route`."""
    routing: Routing = self._gose_routing
    x_TD = hidden_states.reshape(-1, self.weight.shape[1])
    logits_TE = _logits(self, x_TD, routing.exact, routing.autocast)
    if "live_E" in self._buffers:
        logits_TE = logits_TE.masked_fill(~self.live_E, -torch.inf)
    options = routing.options
    bias_E = None
    if "sigmoid" in (options["policy"], options.get("gate")):
        passed = (*given, *named.values(), None)
        bias_E = passed[0] if routing.takes_bias else getattr(self, _BIAS, None)
    entropy_E = routing.entropy_E
    if entropy_E is not None:
        entropy_E = entropy_E.to(logits_TE.device)
    return logits_TE, route(logits_TE, self.top_k, entropy_E=entropy_E, bias_E=bias_E, **options)


def _route(
    self: Any, hidden_states: Tensor, *given: Tensor | None, **named: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """forward of a swapped router: logits, weights, experts (num_experts marks an unused slot)."""
    routing: Routing = self._gose_routing
    logits_TE, (weight_TK, expert_TK, *_) = routed(self, hidden_states, *given, **named)
    weight_TK = weight_TK * routing.scale
    weight_TK = weight_TK if routing.float_weights else weight_TK.to(hidden_states.dtype)
    logits_TE = logits_TE.float() if routing.float_logits else logits_TE
    return logits_TE, weight_TK, expert_TK.long()


@functools.cache
def _swapped_class(router_class: type[nn.Module]) -> type[nn.Module]:
    return type(router_class.__name__, (router_class,), {"forward": _route})


def swap_router(
    router: nn.Module, options: Mapping[str, Any], entropy_E: Tensor | None = None
) -> Routing | str:
    """Makes the router run `route`: how, or the reason if that is not possible.

    options  arguments of `route` that replace those found; {} keeps the router's own numbers
    ValueError for options that `route` refuses.
    """
    found = find_routing(router)
    if isinstance(found, str):
        return found
    own: Mapping[str, Any] = {} if "policy" in options else found.options
    merged = {**own, **options}
    scale = 1.0 if "policy" in options else found.scale
    whole: Any = router
    route(torch.zeros(1, len(whole.weight)), whole.top_k, entropy_E=entropy_E, **merged)
    routing = found._replace(options=merged, scale=scale, entropy_E=entropy_E)
    vars(router)["_gose_routing"] = routing
    own_class: Any = type(router)
    router.__class__ = _swapped_class(own_class)
    return routing


def unswap_router(router: nn.Module) -> None:
    """The router as it was before `swap_router`; ValueError while a LivingExperts has it."""
    if "live_E" in router._buffers:
        raise ValueError(
            f"restore: the experts of {type(router).__name__} are in a LivingExperts, whose free "
            "slots this router would choose; call its settle() first"
        )
    del vars(router)["_gose_routing"]
    router.__class__ = type(router).__mro__[1]
