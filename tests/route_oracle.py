"""The brute force of route: choice, drops, weights and losses by loops over Python lists.

log p comes from torch, so that ties between tokens are the same ties.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route_call import RouteCall

NAMES = ["weight_TK", "expert_TK", "entropy_T", "load_E", "importance_E", "loss_L"]
GRADIENTS = [0, 2, 4, 5]  # the differentiable outputs


def best(key: dict[int, float], count: int) -> list[int]:
    """Ids of the largest finite keys, ties to the smaller id."""
    usable = [i for i in key if key[i] > -math.inf]
    return sorted(usable, key=lambda i: (-key[i], i))[:count]


def logits(call: RouteCall) -> Tensor:
    a = call.score_TE.clone()
    if call.policy == "egs":
        given = call.entropy_TE if call.entropy_TE is not None else call.entropy_E
        H = given.clamp_min(0).expand(a.shape)
        a = torch.where(
            a == -math.inf, a, -H / call.tau if call.tau else (1 / (H + call.entropy_floor)).log()
        )
    elif call.policy == "sigmoid" or call.gate == "sigmoid":
        a = torch.nn.functional.logsigmoid(a)
    return a


def keys(call: RouteCall, a: Tensor, t: int) -> dict[int, float]:
    """Key of every expert for token t; -inf outside the best groups."""
    score = call.score_TE[t].tolist()
    sigmoid = call.policy == "sigmoid" or call.gate == "sigmoid"
    key = dict(enumerate(score))
    if call.policy == "egs":
        given = call.entropy_TE[t] if call.entropy_TE is not None else call.entropy_E
        key = {e: -max(h, 0.0) for e, h in enumerate(given.tolist())}
    elif sigmoid and (call.bias_E is not None or call.policy == "group_limited"):
        bias = [0.0] * len(score) if call.bias_E is None else call.bias_E.tolist()
        key = {e: torch.sigmoid(call.score_TE[t, e]).item() + bias[e] for e in key}
    elif call.noise_TE is not None:
        key = {e: key[e] + call.noise_TE[t, e].item() for e in key}
    key = {e: -math.inf if score[e] == -math.inf else key[e] for e in key}
    if call.policy == "group_limited":
        size = len(key) // call.num_groups
        members = [range(g * size, (g + 1) * size) for g in range(call.num_groups)]
        groups = {}
        for g, ids in enumerate(members):
            top = [key[e] for e in best({e: key[e] for e in ids}, 2 if sigmoid else 1)]
            groups[g] = sum(top) if top else -math.inf
        kept = [e for g in best(groups, call.top_groups) for e in members[g]]
        key = {e: key[e] for e in kept}
    return key


def choose(call: RouteCall, a: Tensor, log_p: Tensor) -> tuple[list[list[int]], list[int]]:
    """Experts of every token before capacity drops, and the load of every expert."""
    T, E = a.shape
    if call.policy == "expert_choice":
        takes = [set(best(dict(enumerate(log_p[:, e].tolist())), call.capacity)) for e in range(E)]
        load = [len(tokens) for tokens in takes]
        chosen = [
            best({e: a[t, e].item() for e in range(E) if t in takes[e]}, call.top_k)
            for t in range(T)
        ]
        return chosen, load
    chosen = [best(keys(call, a, t), call.top_k) for t in range(T)]
    for t, experts in enumerate(chosen):
        keep = len(experts)
        if call.adaptive == "mass":
            p = [log_p[t, e].exp().item() for e in experts]
            keep = next((k for k in range(1, keep) if sum(p[:k]) >= call.mass), keep)
        elif call.adaptive == "bands":
            sureness = gk.entropy(a[t], backend="torch").item()
            keep = min(keep, 1 + sum(sureness > band for band in call.bands))
        del experts[keep:]
    return chosen, [sum(e in experts for experts in chosen) for e in range(E)]


def kept_slots(call: RouteCall, chosen: list[list[int]], log_q: Tensor) -> set[tuple[int, int]]:
    """(token, slot) that fit in their expert's capacity."""
    T, E = log_q.shape
    slots = {(t, k) for t in range(T) for k in range(len(chosen[t]))}
    if call.capacity is None or call.policy == "expert_choice":
        return slots
    order = list(range(T))
    if call.capacity_order == "priority":
        sure = [log_q[t, chosen[t][0]].item() if chosen[t] else -math.inf for t in order]
        order.sort(key=lambda t: (-sure[t], t))
    room, kept = [call.capacity] * E, set()
    for k, t in itertools.product(range(call.top_k), order):
        if (t, k) in slots and room[chosen[t][k]] > 0:
            room[chosen[t][k]] -= 1
            kept.add((t, k))
    return kept


def cv2(values: list[float]) -> float:
    mean = sum(values) / max(len(values), 1)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2 if mean else 0.0


def losses(call: RouteCall, p: Tensor, load: list[int], sureness: Tensor) -> list[float]:
    live = {(t, e) for t, e in (call.score_TE != -math.inf).nonzero().tolist()}
    tokens, experts = sorted({t for t, _ in live}), sorted({e for _, e in live})
    V, importance = max(len(tokens), 1), p.sum(dim=0).tolist()
    share = [n / max(sum(load), 1) for n in load]
    win, z = [0.0] * p.shape[1], 0.0
    for t in tokens:
        ranked = best(keys(call, p, t), call.top_k)
        noisy = keys(call, p, t)
        for e in range(p.shape[1]):
            if call.noise_std and (t, e) in live:
                last = noisy[ranked[-1]] if len(ranked) == call.top_k else -math.inf
                margin = (call.score_TE[t, e].item() - last) / call.noise_std
                win[e] += (1 + math.erf(margin / math.sqrt(2))) / 2 / V
        z += call.score_TE[t].logsumexp(0).item() ** 2 / V
    return [
        len(experts) * sum(s * i for s, i in zip(share, importance, strict=True)) / V,
        cv2([importance[e] for e in experts]),
        cv2([win[e] for e in experts]) if call.noise_std else 0.0,
        0.0 if call.policy == "egs" else z,
        sum(sureness.tolist()) / V,
    ]


def oracle(*args: Any, **options: Any) -> list[Tensor]:
    call = RouteCall(*args, **options)
    (T, E), K = call.score_TE.shape, call.top_k
    a = logits(call)
    noisy = a if call.noise_TE is None else a + call.noise_TE
    log_p, log_q = (x - x.logsumexp(1, keepdim=True).clamp_min(-1e300) for x in (a, noisy))
    chosen, load = choose(call, a, log_p)
    kept = kept_slots(call, chosen, log_q)
    weight, expert = torch.zeros(T, K, dtype=torch.float64), torch.full((T, K), E)
    for t, k in kept:
        e = chosen[t][k]
        expert[t, k] = e
        if call.sums_over == "nothing":
            weight[t, k] = torch.sigmoid(call.score_TE[t, e])
        elif call.sums_over == "experts":
            weight[t, k] = torch.softmax(noisy[t], 0)[e]
        else:
            weight[t, k] = torch.softmax(noisy[t, chosen[t]], 0)[k]
    p = log_p.exp()
    sureness = gk.entropy(a, backend="torch")
    loss = torch.tensor(losses(call, p, load, sureness), dtype=torch.float64)
    return [weight, expert.int(), sureness, torch.tensor(load).int(), p.sum(dim=0), loss]


def assert_same(got: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape), name
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def gradients(args: tuple[Any, ...], out: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Upstream gradients of every differentiable output."""
    random = torch.Generator().manual_seed(5)
    shapes = [out[i].shape for i in GRADIENTS]
    return [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes]
