"""route: which experts serve a token, with which weights, and how even and how sure the choice is.

    a[t, e]  = router logit of the policy, below;  p[t, :] = softmax(a[t, :])
    choice   = for every t the K experts of largest key[t, :], ties to the smaller id; best first
    weight   = p of the chosen experts, or exp(a) normalized over them
An expert of key -inf or NaN is never chosen; a slot without an expert is unused: id E, weight 0.

policy         a                             key
softmax        score                         score + noise
sigmoid        log sigmoid(score)            score, or sigmoid(score) + bias [DeepSeek-V3]
group_limited  of `gate` softmax | sigmoid   the same (sigmoid(score) without bias too), in the
                                             `top_groups` best of `num_groups` groups
expert_choice  score                         p, by columns: every expert takes its `capacity` best
                                             tokens, ties to the smaller id [Zhou et al. 2022]
egs            -log(H + entropy_floor), or   -H: the surest experts; H = max(entropy, 0) of
               -H / tau if tau is given      entropy_TE (per input) or entropy_E (per module)

Groups are runs of E / num_groups experts; a group's score is its largest key (gate softmax) or the
sum of its two largest (gate sigmoid).
expert_choice looks at all tokens: not for causal decoding. A token keeps the K likeliest of the
experts that took it, best first; the surplus is dropped.
Weights: softmax gates give p, or with softmax_before=False or renormalize exp(a) divided by its sum
over the chosen (one number by two names). sigmoid gates give sigmoid(score), with renormalize
divided by their sum. egs always sums to 1.
noise (softmax only; drawn by the caller, a constant) enters choice, weights and priority; all
statistics are those of the clean scores [V-MoE].
adaptive drops slots from the end, before weights are normalized; the first one stays. It keeps
    "mass"  the fewest slots whose p sum to >= mass;  "bands"  1 + number of bands < entropy[t]
capacity: an expert keeps its first `capacity` slots, in the order: all first slots, all second
ones, ...; in each by "token", or by "priority" = p of the first slot, noise included, descending,
ties to the smaller token [V-MoE]. A dropped slot becomes unused where it stands; no other weight
changes for it.

score_TE    float32 | bfloat16 | float16 | float64, any strides; -inf = expert not available to the
            token, a row of -inf is no token. egs reads nothing else of it. Computed in float32
            (float64 for float64)
entropy_TE, entropy_E  floating; egs only, exactly one of them
bias_E      floating; sigmoid gates only; no gradient
noise_TE    floating; softmax only, `noise_std` is its scale
returns     weight_TK float32 (float64 for float64), expert_TK int32,
            entropy_T of p in [0, 1] as op `entropy` has it,
            load_E int32: slots given to e before capacity and surplus drops (dropped of e: load[e]
            less the count of e in expert_TK), importance_E = sum_t p, loss_L in the order of LOSSES
With V tokens and E' experts that are not all -inf (an unavailable expert changes no number):
    balance     E' * sum_e (load[e] / sum load) * (importance[e] / V), load held constant; 1 if
                even; K times smaller than transformers' form [Switch]
    importance  CV2(importance); CV2(x) = population variance / mean^2 over the E' experts [V-MoE]
    noisy_load  CV2(mean_t Phi((score[t, e] - threshold[t]) / noise_std)), threshold = K-th largest
                score + noise; 0 unless policy softmax and noise_std > 0 [V-MoE]
    z           sum_t logsumexp(score[t])^2 / V; 0 for egs [ST-MoE]
    entropy     sum_t entropy[t] / V
Gradients are closed forms (`route_backward`) with the choice held constant, finite for finite
input. T = 0 gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32, int32

from gose_kernels.backends import native, reference, triton
from gose_kernels.ops.route_call import (
    CUDA_BANDS,
    CUDA_EXPERTS,
    LOSSES,
    RouteCall,
    check,
    pack_options,
)
from gose_kernels.registry import Cost, register


def _entropy(call: RouteCall) -> Tensor:
    given = call.entropy_TE if call.entropy_TE is not None else call.entropy_E
    assert given is not None
    return given.to(call.dtype).clamp_min(0).expand(call.score_TE.shape)


def _logits(call: RouteCall) -> Tensor:
    """a: the router's distribution is its softmax."""
    score = call.score_TE.to(call.dtype)
    if call.policy == "egs":
        H = _entropy(call)
        a = -torch.log(H + call.entropy_floor) if call.tau is None else -H / call.tau
        return a.masked_fill(score == -torch.inf, -torch.inf)
    return torch.nn.functional.logsigmoid(score) if call.is_sigmoid else score


def _with_noise(call: RouteCall, logit_TE: Tensor) -> Tensor:
    return logit_TE if call.noise_TE is None else logit_TE + call.noise_TE.to(call.dtype)


def _minus_sum(value: Tensor, over: Tensor) -> Tensor:
    """value - logsumexp(over), rows of -inf stay -inf."""
    total = over.logsumexp(dim=-1, keepdim=True)
    return value - total.masked_fill(total == -torch.inf, 0)


def _keys(call: RouteCall) -> Tensor:
    score = call.score_TE.to(call.dtype)
    gone = score == -torch.inf
    if call.policy == "egs":
        key = -_entropy(call)
    elif call.is_sigmoid and (call.bias_E is not None or call.policy == "group_limited"):
        key = score.sigmoid()
        key = key if call.bias_E is None else key + call.bias_E.to(call.dtype)
    else:
        key = _with_noise(call, score)
    key = key.masked_fill(gone | key.isnan(), -torch.inf)
    if call.policy != "group_limited":
        return key
    T, E = key.shape
    grouped = key.view(T, call.num_groups, E // call.num_groups)
    best = grouped.topk(min(2, grouped.shape[-1]) if call.is_sigmoid else 1, dim=-1).values
    total = best.masked_fill(best == -torch.inf, 0).sum(dim=-1)
    total = total.masked_fill(best[..., 0] == -torch.inf, -torch.inf)
    order = total.sort(dim=-1, descending=True, stable=True).indices[:, : call.top_groups]
    chosen = torch.zeros_like(total, dtype=torch.bool).scatter_(1, order, True)
    return torch.where(chosen.unsqueeze(-1), grouped, -torch.inf).view(T, E)


def _top(key_TE: Tensor, top_k: int) -> Tensor:
    """Ids of the K largest keys of every row, ties to the smaller id; E where the key is -inf."""
    value, order = key_TE.sort(dim=-1, descending=True, stable=True)
    return torch.where(value == -torch.inf, key_TE.shape[1], order)[:, :top_k]


def _experts_take(call: RouteCall, logit_TE: Tensor) -> Tensor:
    """expert_choice: True where expert e takes token t."""
    log_p = _minus_sum(logit_TE, logit_TE)
    usable = (logit_TE != -torch.inf) & ~log_p.isnan()
    ranked = log_p.masked_fill(~usable, -torch.inf).sort(dim=0, descending=True, stable=True)
    taken = torch.zeros_like(usable).scatter_(0, ranked.indices[: call.capacity], True)
    return taken & usable


def _choose(call: RouteCall, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
    """choice_TK before any capacity drop, load_E."""
    E = logit_TE.shape[1]
    if call.policy == "expert_choice":
        taken_TE = _experts_take(call, logit_TE)
        choice = _top(logit_TE.masked_fill(~taken_TE, -torch.inf), call.top_k)
        return choice, taken_TE.sum(dim=0)
    choice = _top(_keys(call), call.top_k)
    if call.adaptive == "mass":
        p = _minus_sum(logit_TE, logit_TE).exp()
        p_TK = torch.where(choice < E, p.gather(1, choice.clamp_max(E - 1)), 0)
        before = torch.nn.functional.pad(p_TK, (1, -1)).cumsum(dim=1)
        choice = choice.masked_fill(before >= call.mass, E)
    elif call.adaptive == "bands":
        sureness = torch.ops.gose.entropy(logit_TE, backend="torch")
        above = sureness.unsqueeze(-1) > sureness.new_tensor(list(call.bands))
        slot = torch.arange(call.top_k, device=choice.device)
        choice = choice.masked_fill(slot > above.sum(dim=-1, keepdim=True), E)
    return choice, torch.bincount(choice.flatten(), minlength=E + 1)[:E]


def _drop(call: RouteCall, choice_TK: Tensor, logit_TE: Tensor) -> Tensor:
    """choice_TK with the slots beyond every expert's capacity unused."""
    if call.capacity is None or call.policy == "expert_choice":
        return choice_TK
    T, E = logit_TE.shape
    order_T = torch.arange(T, device=choice_TK.device)
    if call.capacity_order == "priority":
        noisy = _with_noise(call, logit_TE)
        first = choice_TK[:, :1]
        log_p = (
            _minus_sum(noisy, noisy)
            .gather(1, first.clamp_max(E - 1))
            .masked_fill(first == E, -torch.inf)
        )
        order_T = log_p[:, 0].argsort(descending=True, stable=True)
    expert_N = choice_TK[order_T].t().reshape(-1)  # all first slots, then all second slots, ...
    row_N1, _, offset = torch.ops.gose.dispatch(expert_N[:, None], E, backend="torch")
    rank_N = row_N1[:, 0] - offset[expert_N]
    kept_N = torch.where(rank_N < call.capacity, expert_N, E)
    return torch.empty_like(choice_TK).index_copy_(0, order_T, kept_N.view(call.top_k, T).t())


def _weights(call: RouteCall, logit_TE: Tensor, choice_TK: Tensor) -> Tensor:
    """Weights of the chosen experts before any capacity drop, 0 in unused slots."""
    E = logit_TE.shape[1]
    noisy_TE = _with_noise(call, logit_TE)
    slot_TK = noisy_TE.gather(1, choice_TK.clamp_max(E - 1)).masked_fill(choice_TK == E, -torch.inf)
    if call.sums_over == "nothing":
        return slot_TK.exp()
    return _minus_sum(slot_TK, slot_TK if call.sums_over == "chosen" else noisy_TE).exp()


class _Live(NamedTuple):
    """What takes part: the experts available to a token; tokens and experts that have any."""

    live_TE: Tensor
    live_E: Tensor
    num_tokens: Tensor
    num_experts: Tensor


def _live(call: RouteCall) -> _Live:
    live_TE = call.score_TE != -torch.inf
    tokens = live_TE.any(dim=1).sum().clamp_min(1).to(call.dtype)
    live_E = live_TE.any(dim=0)
    return _Live(live_TE, live_E, tokens, live_E.sum().clamp_min(1).to(call.dtype))


def _cv2(x_E: Tensor, live: _Live) -> tuple[Tensor, Tensor]:
    """Squared coefficient of variation over the live experts, and its gradient."""
    mean = x_E.sum() / live.num_experts
    mean = torch.where(mean == 0, 1, mean)  # no token: all x are 0 and so is the result
    apart_E = torch.where(live.live_E, x_E - x_E.sum() / live.num_experts, 0)
    cv2 = apart_E.square().sum() / live.num_experts / mean**2
    slope_E = 2 * (apart_E / mean - cv2) / (live.num_experts * mean)
    return cv2, torch.where(live.live_E, slope_E, 0)


def _margins(call: RouteCall, live: _Live) -> tuple[Tensor, Tensor] | None:
    """noisy_load: (score - threshold) / noise_std, inf where every expert wins; the K-th choice."""
    if call.noise_std == 0:
        return None
    last_T1 = _top(_keys(call), call.top_k)[:, -1:]
    E = live.live_TE.shape[1]
    score = call.score_TE.to(call.dtype)
    threshold_T1 = _with_noise(call, score).gather(1, last_T1.clamp_max(E - 1))
    margin = torch.where(last_T1 == E, torch.inf, (score - threshold_T1) / call.noise_std)
    return torch.where(live.live_TE, margin, -torch.inf), last_T1


def route_reference(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call = RouteCall(*args, **options)
    check(call)
    live = _live(call)
    logit_TE = _logits(call)
    choice_TK, load_E = _choose(call, logit_TE)
    expert_TK = _drop(call, choice_TK, logit_TE)
    weight_TK = torch.where(expert_TK == logit_TE.shape[1], 0, _weights(call, logit_TE, choice_TK))
    entropy_T: Tensor = torch.ops.gose.entropy(logit_TE, backend="torch")
    importance_E = _minus_sum(logit_TE, logit_TE).exp().sum(dim=0)

    zero = importance_E.new_zeros(())
    share_E = load_E.to(call.dtype) / load_E.sum().clamp_min(1)
    balance = live.num_experts * (share_E * importance_E).sum() / live.num_tokens
    importance, _ = _cv2(importance_E, live)
    noisy_load = z = zero
    if (margins := _margins(call, live)) is not None:
        win_E = torch.special.ndtr(margins[0]).sum(dim=0) / live.num_tokens
        noisy_load, _ = _cv2(win_E, live)
    if call.policy != "egs":
        total_T = call.score_TE.to(call.dtype).logsumexp(dim=1)
        z = torch.where(total_T == -torch.inf, 0, total_T).square().sum() / live.num_tokens
    loss_L = torch.stack([balance, importance, noisy_load, z, entropy_T.sum() / live.num_tokens])
    return weight_TK, expert_TK.to(int32), entropy_T, load_E.to(int32), importance_E, loss_L


def _weight_gradient(
    call: RouteCall, logit_TE: Tensor, expert_TK: Tensor, grad_weight_TK: Tensor
) -> Tensor:
    """Gradient of the weights with respect to a; a dropped slot still shares its normalizer."""
    T, E = logit_TE.shape
    drops = call.capacity is not None and call.policy != "expert_choice"
    choice_TK = _choose(call, logit_TE)[0] if drops else expert_TK
    weight_TK = _weights(call, logit_TE, choice_TK)
    grad_slot_TK = torch.where(expert_TK < E, grad_weight_TK, 0) * weight_TK
    total_T1 = grad_slot_TK.sum(dim=1, keepdim=True)
    if call.sums_over == "chosen":
        grad_slot_TK = grad_slot_TK - weight_TK * total_T1
    grad_TE = logit_TE.new_zeros(T, E + 1).scatter_add_(1, choice_TK, grad_slot_TK)[:, :E]
    if call.sums_over == "experts":
        noisy_TE = _with_noise(call, logit_TE)
        grad_TE = grad_TE - _minus_sum(noisy_TE, noisy_TE).exp() * total_T1
    return grad_TE


def _noisy_load_gradient(call: RouteCall, live: _Live) -> Tensor | float:
    """Gradient of loss noisy_load with respect to score, through the threshold too."""
    if (margins := _margins(call, live)) is None:
        return 0.0
    margin_TE, last_T1 = margins
    _, slope_E = _cv2(torch.special.ndtr(margin_TE).sum(dim=0) / live.num_tokens, live)
    density_TE = torch.exp(-margin_TE.square() / 2) / (2 * torch.pi) ** 0.5
    grad_TE: Tensor = slope_E * density_TE / (live.num_tokens * call.noise_std)
    T, E = grad_TE.shape
    back = torch.zeros(T, E + 1, dtype=grad_TE.dtype, device=grad_TE.device)
    return grad_TE - back.scatter_(1, last_T1, grad_TE.sum(dim=1, keepdim=True))[:, :E]


def _check_backward(call: RouteCall, outputs: Sequence[Tensor | None]) -> None:
    """outputs: expert, load and importance, then a gradient of each floating output or None."""
    check(call)
    (T, E), K = call.score_TE.shape, call.top_k
    wanted = {
        "expert_TK": ((T, K), int32),
        "load_E": ((E,), int32),
        "importance_E": ((E,), call.dtype),
        "grad_weight_TK": ((T, K), call.dtype),
        "grad_entropy_T": ((T,), call.dtype),
        "grad_importance_E": ((E,), call.dtype),
        "grad_loss_L": ((len(LOSSES),), call.dtype),
    }
    for (name, (shape, dtype)), given in zip(wanted.items(), outputs, strict=True):
        if given is not None and (tuple(given.shape) != shape or given.dtype != dtype):
            raise ValueError(
                f"route_backward: {name} must be {dtype} of shape {shape}, "
                f"got {given.dtype} of shape {tuple(given.shape)}"
            )


def route_backward_reference(
    score_TE: Tensor,
    top_k: int,
    entropy_TE: Tensor | None,
    entropy_E: Tensor | None,
    bias_E: Tensor | None,
    noise_TE: Tensor | None,
    expert_TK: Tensor,
    load_E: Tensor,
    importance_E: Tensor,
    grad_weight_TK: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_importance_E: Tensor | None,
    grad_loss_L: Tensor | None,
    **options: Any,
) -> Tensor:
    """Gradient of what ranks the experts: score_TE; for egs entropy_TE or entropy_E. Its dtype.

    expert_TK, load_E, importance_E are route's outputs. A gradient that is None is zero.
    """
    call = RouteCall(score_TE, top_k, entropy_TE, entropy_E, bias_E, noise_TE, **options)
    grads = (grad_weight_TK, grad_entropy_T, grad_importance_E, grad_loss_L)
    _check_backward(call, (expert_TK, load_E, importance_E, *grads))
    E = score_TE.shape[1]
    if expert_TK.numel() and not bool(((expert_TK >= 0) & (expert_TK <= E)).all()):
        raise ValueError(f"route_backward: expert_TK must hold experts in [0, E={E}]")
    live = _live(call)
    logit_TE = _logits(call)
    grad_logit_TE = torch.zeros_like(logit_TE)
    if grad_weight_TK is not None:
        grad_logit_TE += _weight_gradient(call, logit_TE, expert_TK.long(), grad_weight_TK)

    p_TE = _minus_sum(logit_TE, logit_TE).exp()
    loss_L = grad_loss_L if grad_loss_L is not None else logit_TE.new_zeros(len(LOSSES))
    balance, importance, noisy_load, z, entropy = loss_L.unbind()
    share_E = load_E.to(call.dtype) / load_E.sum().clamp_min(1)
    column_E = balance * live.num_experts * share_E / live.num_tokens
    column_E = column_E + importance * _cv2(importance_E, live)[1]
    if grad_importance_E is not None:
        column_E = column_E + grad_importance_E
    grad_logit_TE += p_TE * (column_E - (p_TE * column_E).sum(dim=1, keepdim=True))
    row_T = (entropy / live.num_tokens).expand(len(p_TE))
    row_T = row_T if grad_entropy_T is None else row_T + grad_entropy_T
    grad_logit_TE += torch.ops.gose.entropy_backward(row_T, logit_TE, backend="torch")

    if call.policy == "egs":
        given = entropy_TE if entropy_TE is not None else entropy_E
        assert given is not None
        slope = -1 / (_entropy(call) + call.entropy_floor) if call.tau is None else -1 / call.tau
        grad_TE = torch.where(given < 0, 0, grad_logit_TE * slope)
        return (grad_TE if entropy_TE is not None else grad_TE.sum(dim=0)).to(given.dtype)
    score = score_TE.to(call.dtype)
    grad_TE = grad_logit_TE * torch.sigmoid(-score) if call.is_sigmoid else grad_logit_TE
    total_T1 = score.logsumexp(dim=1, keepdim=True)
    total_T1 = total_T1.masked_fill(total_T1 == -torch.inf, 0)
    grad_TE = grad_TE + 2 * z / live.num_tokens * total_T1 * (score - total_T1).exp()
    return (grad_TE + noisy_load * _noisy_load_gradient(call, live)).to(score_TE.dtype)


def _check_arguments(*args: Any, **options: Any) -> None:
    check(RouteCall(*args, **options))


def _check_backward_arguments(*args: Any, **options: Any) -> None:
    _check_backward(RouteCall(*args[:6], **options), args[6:])


def too_large_for_cuda(
    score_TE: Tensor,
    *_tensors: object,
    adaptive: str | None = None,
    bands: Sequence[float] = (),
    **_options: Any,
) -> str | None:
    E, count = score_TE.shape[-1], len(bands) if adaptive == "bands" else 0
    if E > CUDA_EXPERTS:
        return f"takes at most {CUDA_EXPERTS} experts, got {E}"
    return f"takes at most {CUDA_BANDS} bands, got {count}" if count > CUDA_BANDS else None


def _fake(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    call = RouteCall(*args, **options)
    check(call)
    T, E = call.score_TE.shape
    empty = call.score_TE.new_empty
    return (
        empty(T, call.top_k, dtype=call.dtype),
        empty(T, call.top_k, dtype=int32),
        empty(T, dtype=call.dtype),
        empty(E, dtype=int32),
        empty(E, dtype=call.dtype),
        empty(len(LOSSES), dtype=call.dtype),
    )


def _ranked(args: Sequence[Any]) -> Tensor:
    """The tensor that ranks the experts: entropy_TE, entropy_E or score_TE."""
    ranked: Tensor = next(a for a in (args[2], args[3], args[0]) if a is not None)
    return ranked


def _backward_fake(*args: Any, backend: str | None = None, **options: Any) -> Tensor:
    _check_backward_arguments(*args, **options)
    return torch.empty_like(_ranked(args), memory_format=torch.contiguous_format)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]
) -> None:
    score_TE, ctx.top_k, *optional = inputs
    ctx.save_for_backward(score_TE, *optional, output[1], output[3], output[4])
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    score_TE, entropy_TE, entropy_E, *saved = ctx.saved_tensors
    weight, _, entropy, _, importance, loss = grads
    grad: Tensor = route_backward(
        *(score_TE, ctx.top_k, entropy_TE, entropy_E, *saved),
        *(weight, entropy, importance, loss),
        **ctx.options,
    )
    per_input, per_module = entropy_TE is not None, entropy_E is not None
    return (
        None if per_input or per_module else grad,
        None,
        grad if per_input else None,
        grad if per_module else None,
        None,
        None,
    )


def _cost(score_TE: Tensor, top_k: int, *tensors: Tensor | None, **options: Any) -> Cost:
    T, E = score_TE.shape
    read = sum(t.numel() * t.element_size() for t in (score_TE, *tensors) if t is not None)
    written = T * (top_k * 8 + 4) + E * 8 + 4 * len(LOSSES)
    return Cost(T, read + written, 2 * T * E)


def _backward_cost(score_TE: Tensor, top_k: int, *tensors: Tensor | None, **options: Any) -> Cost:
    *inputs, load_E, importance_E = tensors[:7]
    grads = tensors[7:]
    of_losses = (load_E, importance_E) if grads[3] is not None else ()
    ranked = _ranked((score_TE, top_k, *tensors))
    moved = (score_TE, *inputs, *of_losses, *grads, ranked)
    T, E = score_TE.shape
    return Cost(T, sum(t.numel() * t.element_size() for t in moved if t is not None), 2 * T * E)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    return torch.ones(4, 8, device=device, dtype=dtype), 2


def _backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    score_TE, top_k = _example(device, dtype)
    expert_TK = torch.zeros(4, top_k, device=device, dtype=int32)
    load_E = torch.ones(8, device=device, dtype=int32)
    grad_TK = torch.ones(4, top_k, device=device, dtype=torch.promote_types(dtype, float32))
    importance_E = load_E.to(grad_TK.dtype)
    return (score_TE, top_k, *[None] * 4, expert_TK, load_E, importance_E, grad_TK, *[None] * 3)


_OPTIONS = (
    '*, str policy="softmax", bool softmax_before=True, bool renormalize=False, '
    'str gate="softmax", int num_groups=1, int top_groups=1, float entropy_floor=0.05, '
    'float? tau=None, int? capacity=None, str capacity_order="token", str? adaptive=None, '
    "float mass=0.9, float[] bands=[], float noise_std=0.0, str? backend=None"
)

route = register(
    "route(Tensor score_TE, int top_k, Tensor? entropy_TE=None, Tensor? entropy_E=None, "
    f"Tensor? bias_E=None, Tensor? noise_TE=None, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    native(
        "cuda",
        "route",
        *(float32, bfloat16, float16),
        pack=pack_options,
        unless=too_large_for_cuda,
    ),
    triton("route", "route", float32, bfloat16, float16, check=_check_arguments),
    native("cpu", "route", float32, bfloat16, float16, pack=pack_options),
    reference(route_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
)

route_backward = register(
    "route_backward(Tensor score_TE, int top_k, Tensor? entropy_TE, Tensor? entropy_E, "
    "Tensor? bias_E, Tensor? noise_TE, Tensor expert_TK, Tensor load_E, Tensor importance_E, "
    "Tensor? grad_weight_TK, Tensor? grad_entropy_T, Tensor? grad_importance_E, "
    "Tensor? grad_loss_L, "
    f"{_OPTIONS}) -> Tensor",
    native(
        "cuda",
        "route_backward",
        *(float32, bfloat16, float16),
        pack=pack_options,
        unless=too_large_for_cuda,
    ),
    triton(
        "route_backward",
        "route_backward",
        *(float32, bfloat16, float16),
        check=_check_backward_arguments,
    ),
    native("cpu", "route_backward", float32, bfloat16, float16, pack=pack_options),
    reference(route_backward_reference),
    fake=_backward_fake,
    cost=_backward_cost,
    example=_backward_example,
)
