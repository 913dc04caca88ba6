"""route: every policy against a brute force over Python lists, gradients, traps of entropy routing.

The oracle takes log p from torch, so that ties between tokens are the same ties, and finds choice,
drops, weights and losses by loops.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route import LOSSES, RouteCall, route_backward_reference, route_reference
from tests import cases
from tests.checks import assert_close_to_truth, assert_close_within_ulps, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["weight_TK", "expert_TK", "entropy_T", "load_E", "importance_E", "loss_L"]
GRADIENTS = [0, 2, 4, 5]  # the differentiable outputs


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


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


@pytest.mark.parametrize("case", cases.route, ids=str)
def test_reference_matches_brute_force(case):
    args, options = case.build(torch.float64)
    assert_same(route_reference(*args, **options), oracle(*args, **options))


def exhaustive(E: int) -> Tensor:
    """Every row of E scores out of three values and -inf: all patterns of ties."""
    values = torch.tensor([-torch.inf, 0.0, 0.5, 1.0], dtype=torch.float64)
    return values[torch.cartesian_prod(*[torch.arange(4)] * E).view(-1, E)]


TIES: list[dict[str, Any]] = [
    {},
    {"policy": "egs"},
    {"policy": "sigmoid", "renormalize": True},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 2},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 2, "gate": "sigmoid"},
    {"policy": "group_limited", "num_groups": 4, "top_groups": 3, "gate": "sigmoid"},
    {"policy": "expert_choice", "capacity": 5},
    {"capacity": 40},
    {"capacity": 40, "capacity_order": "priority"},
    {"adaptive": "mass", "mass": 0.5},
]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("options", TIES, ids=str)
def test_every_pattern_of_ties(options, top_k):
    score_TE = exhaustive(4)
    H = score_TE.flip(0).clamp_min(0) if options.get("policy") == "egs" else None
    assert_same(
        route_reference(score_TE, top_k, H, **options), oracle(score_TE, top_k, H, **options)
    )


@pytest.mark.parametrize("options", TIES, ids=str)
@pytest.mark.parametrize("E", [3, 4, 5])
@pytest.mark.parametrize("backend", backends_of("route"))
def test_every_pattern_of_ties_on_every_backend(backend, E, options):
    if options.get("policy") == "group_limited" and E != 4:
        return
    score_TE = exhaustive(E).float()
    if options.get("adaptive") == "mass" or options.get("capacity_order") == "priority":
        # Rows of other numbers have p that differ by rounding alone: one row, many times.
        score_TE = score_TE[len(score_TE) // 3].repeat(100, 1)
    H = score_TE.flip(0).clamp_min(0) if options.get("policy") == "egs" else None
    for top_k in range(1, min(E, 3 if options.get("num_groups") == 4 else E) + 1):
        got = gk.route(score_TE, top_k, H, backend=backend, **options)
        wanted = route_reference(score_TE, top_k, H, **options)
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[3], wanted[3])


def runs_on(backend: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether `backend` takes the call; if not, that it says so is checked here."""
    reason = gk.route.reasons(*args, **options)[backend]
    if reason is not None:
        with pytest.raises(ValueError, match="cannot run this call") as caught:
            gk.route(*args, backend=backend, **options)
        assert reason in str(caught.value)
    return reason is None


@pytest.mark.matrix(keep=200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.route, ids=str)
@pytest.mark.parametrize("backend", backends_of("route"))
def test_route_matches_truth(backend, case, dtype):
    args, options = case.build(dtype)
    if not runs_on(backend, args, options):
        return
    got = gk.route(*args, backend=backend, **options)
    same = route_reference(*args, **options)
    truth = route_reference(*doubled(args), **options)
    assert torch.equal(got[1], same[1])
    assert torch.equal(got[3], same[3])
    if backend != "torch" or torch.equal(same[1], truth[1]):  # rounding may reorder tied tokens
        for i in GRADIENTS[:3]:
            assert_close_to_truth(got[i], same[i], truth[i])
        # A CV^2 near 0 is a difference of float32 numbers near 1: absolute error.
        torch.testing.assert_close(got[5].double(), truth[5], rtol=2e-6, atol=1e-9)


def differentiable(args: tuple[Any, ...]) -> int:
    """Index of the argument that route_backward differentiates."""
    return next(i for i in (2, 3, 0) if args[i] is not None)


# In the other kinds the choice changes under a small step, or differences drown in rounding.
SMOOTH = [
    dataclasses.replace(c, T=min(c.T, 9))
    for c in cases.route
    if c.T <= 37 and c.kind in ("normal", "masked")
]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradient_of_the_reference_is_the_derivative(case):
    args, options = case.build(torch.float64)
    at = differentiable(args)
    gone = args[at] == -torch.inf
    variable = args[at].masked_fill(gone, 0).requires_grad_()

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        moved = (*args[:at], x.masked_fill(gone, -torch.inf), *args[at + 1 :])
        out = gk.route(*moved, backend="torch", **options)
        return tuple(out[i] for i in GRADIENTS)

    assert torch.autograd.gradcheck(outputs, (variable,), eps=1e-7)


def gradients(args: tuple[Any, ...], out: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Upstream gradients of every differentiable output."""
    random = torch.Generator().manual_seed(5)
    shapes = [out[i].shape for i in GRADIENTS]
    return [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.matrix(keep=200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.route, ids=str)
@pytest.mark.parametrize("backend", backends_of("route_backward"))
def test_gradient_matches_truth(backend, case, dtype):
    args, options = case.build(dtype)
    out = route_reference(*args, **options)
    up = gradients(args, out, torch.float32)
    full = (*args, out[1], out[3], out[4], *up)
    reason = gk.OPS["route_backward"].reasons(*full, **options)[backend]
    if reason is not None:
        assert reason == gk.route.reasons(*args, **options)[backend]
        return
    got = torch.ops.gose.route_backward(*full, backend=backend, **options)
    assert bool(got.isfinite().all())
    assert_close_within_ulps(
        got,
        route_backward_reference(*full, **options),
        route_backward_reference(*doubled(full), **options),
    )


@pytest.mark.parametrize("backend", backends_of("route"))
def test_autograd_reaches_what_ranks(backend):
    for case in (cases.RouteCase(9, 6, 2), *(c for c in cases.route if c.entropy)):
        args, options = case.build()
        if not runs_on(backend, args, options):
            continue
        at = differentiable(args)
        variable = args[at].detach().clone().requires_grad_()
        out = gk.route(*args[:at], variable, *args[at + 1 :], backend=backend, **options)
        up = gradients(args, out, torch.float32)
        torch.autograd.backward([out[i] for i in GRADIENTS], up)
        wanted = route_backward_reference(*args, out[1], out[3], out[4], *up, **options)
        torch.testing.assert_close(variable.grad, wanted, rtol=1e-4, atol=1e-6)
        assert not out[1].requires_grad


@pytest.mark.parametrize("backend", backends_of("route"))
def test_one_loss_alone_has_its_gradient(backend):
    score_TE = cases.RouteCase(37, 12, 3).build()[0][0].requires_grad_()
    gk.route(score_TE, 3, backend=backend)[5][LOSSES.index("z")].backward()
    p_TE, total_T = score_TE.detach().softmax(1), score_TE.detach().logsumexp(1)
    torch.testing.assert_close(score_TE.grad, 2 * total_T[:, None] * p_TE / 37)


# ---- the traps of entropy routing ----


@pytest.mark.parametrize("backend", backends_of("route"))
@pytest.mark.parametrize("zero", [0.0, -0.0, -1e-8], ids=str)
@pytest.mark.parametrize("options", [{}, {"tau": 0.3}], ids=str)
def test_zero_entropy_gives_finite_weights_and_gradients(backend, zero, options):
    # 1/H is infinite at 0 and its normalization NaN; log-softmax forms give -0.0 and -1e-8.
    H = torch.tensor([[zero, 0.3, zero, 1.0]], requires_grad=True)
    weight, expert, *_ = gk.route(torch.zeros(1, 4), 3, H, policy="egs", backend=backend, **options)
    assert expert.tolist() == [[0, 2, 1]]  # below zero counts as zero: ties to the smaller id
    assert weight.sum().item() == pytest.approx(1)
    assert weight[0, 0] == weight[0, 1] > weight[0, 2] > 0
    (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert bool(H.grad.isfinite().all())


@pytest.mark.parametrize("backend", backends_of("route"))
def test_several_perfect_specialists_tie_to_the_smaller_id(backend):
    H = torch.tensor([0.4, 0.0, 0.0, 0.2, 0.0, 0.0])
    for top_k, wanted in ((1, [1]), (3, [1, 2, 4]), (5, [1, 2, 4, 5, 3])):
        _, expert, *_ = gk.route(torch.zeros(2, 6), top_k, None, H, policy="egs", backend=backend)
        assert expert.tolist() == [wanted, wanted]


@pytest.mark.parametrize("backend", backends_of("route"))
def test_the_floor_is_a_temperature_with_known_weights(backend):
    H = torch.tensor([[0.0, 1e-8, 0.3, 1.0]])
    for floor, wanted, digit in (
        (1e-3, [0.499, 0.499, 0.002, 0.0005], 5e-4),
        (0.1, [0.43, 0.43, 0.11, 0.04], 5e-3),
    ):
        weight, *_ = gk.route(
            torch.zeros(1, 4), 4, H, policy="egs", entropy_floor=floor, backend=backend
        )
        torch.testing.assert_close(weight[0], torch.tensor(wanted), rtol=0, atol=digit)


@pytest.mark.parametrize("backend", backends_of("route"))
def test_tau_bounds_the_gradient_where_the_floor_does_not(backend):
    # d w / d H: at most 1 / (4 tau) for softmax(-H / tau), up to 1 / (4 floor) for 1 / (H + floor).
    slope = {}
    for name, options in (("tau", {"tau": 0.5}), ("floor", {"entropy_floor": 1e-3})):
        H = torch.tensor([[0.0, 1e-8, 0.3, 1.0]], requires_grad=True)
        weight, *_ = gk.route(torch.zeros(1, 4), 4, H, policy="egs", backend=backend, **options)
        weight[0, 0].backward()
        slope[name] = H.grad.abs().max().item()
    assert slope["tau"] <= 1 / (4 * 0.5)
    assert 200 < slope["floor"] <= 1 / (4 * 1e-3)


@pytest.mark.parametrize("backend", backends_of("route"))
def test_static_entropies_serve_every_input_alike(backend):
    # The literal formula: module entropies alone, so the choice cannot depend on the input.
    score = cases.RouteCase(37, 12, 3).build()[0][0]
    H = torch.linspace(1, 0, 12)
    weight, expert, *_ = gk.route(score, 3, None, H, policy="egs", backend=backend)
    assert expert.tolist() == [[11, 10, 9]] * 37
    floor = 0.05
    wanted = torch.tensor([1 / (H[e] + floor) for e in (11, 10, 9)])
    torch.testing.assert_close(weight, (wanted / wanted.sum()).expand(37, 3))


# ---- properties ----


@pytest.mark.parametrize("backend", list(backends_of("route")))
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["softmax", "egs"]),
    st.integers(0, 9999),
)
def test_permuting_tokens_permutes_outputs(backend, T, E, policy, seed):
    random = torch.Generator().manual_seed(seed)
    score = torch.randn(T, E, generator=random)
    H = torch.rand(T, E, generator=random) if policy == "egs" else None
    top_k, order = 1 + seed % E, torch.randperm(T, generator=random)
    before = gk.route(score, top_k, H, policy=policy, backend=backend)
    after = gk.route(
        score[order], top_k, None if H is None else H[order], policy=policy, backend=backend
    )
    assert torch.equal(after[1], before[1][order])
    assert torch.equal(after[3], before[3])
    torch.testing.assert_close(after[0], before[0][order])
    torch.testing.assert_close(after[2], before[2][order])
    torch.testing.assert_close(after[4:], before[4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", list(backends_of("route")))
@given(st.integers(1, 20), st.integers(2, 20), st.integers(0, 9999))
def test_permuting_experts_renames_them(backend, T, E, seed):
    random = torch.Generator().manual_seed(seed)
    score = torch.rand(T, E, generator=random).argsort(dim=1) / 4  # no ties
    order = torch.randperm(E, generator=random)
    top_k = 1 + seed % E
    weight, expert, entropy, load, importance, loss = gk.route(score, top_k, backend=backend)
    moved = gk.route(score[:, order], top_k, backend=backend)
    assert torch.equal(order[moved[1].long()], expert.long())
    assert torch.equal(moved[3], load[order])
    for got, wanted in zip(
        (moved[0], moved[2], moved[4], moved[5]),
        (weight, entropy, importance[order], loss),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends_of("route"))
@pytest.mark.parametrize("options", [{}, {"renormalize": True}], ids=str)
def test_all_experts_is_the_dense_router(backend, options):
    score = cases.RouteCase(37, 12, 12, "ties").build()[0][0]
    weight, expert, *_ = gk.route(score, 12, backend=backend, **options)
    dense = torch.zeros(37, 12).scatter(1, expert.long(), weight)
    torch.testing.assert_close(dense, score.softmax(dim=1))


@pytest.mark.parametrize("backend", backends_of("route"))
@pytest.mark.parametrize("policy", ["softmax", "egs"])
def test_an_unavailable_expert_changes_no_number(backend, policy):
    score = cases.RouteCase(37, 12, 3).build()[0][0]
    wide = torch.cat([score, torch.full((37, 5), -torch.inf)], dim=1)
    H = score.sigmoid() if policy == "egs" else None
    wide_H = None if H is None else torch.cat([H, torch.zeros(37, 5)], dim=1)
    got = gk.route(wide, 3, wide_H, policy=policy, backend=backend)
    wanted = gk.route(score, 3, H, policy=policy, backend=backend)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[3], torch.cat([wanted[3], torch.zeros(5, dtype=torch.int32)]))
    torch.testing.assert_close(got[4][:12], wanted[4])
    assert got[4][12:].tolist() == [0.0] * 5
    for i in (0, 2, 5):
        torch.testing.assert_close(got[i], wanted[i])


@pytest.mark.parametrize("backend", backends_of("route"))
def test_nan_stays_in_its_token_and_ids_stay_valid(backend):
    score = cases.RouteCase(37, 12, 3).build()[0][0]
    clean = gk.route(score, 3, backend=backend)
    score = score.clone()
    score[5] = torch.nan
    score[7, 2] = torch.nan
    weight, expert, entropy, *_ = gk.route(score, 3, backend=backend)
    assert expert[5].tolist() == [12] * 3
    assert 2 not in expert[7].tolist()
    assert int(expert[7].min()) >= 0 and int(expert[7].max()) < 12
    assert entropy.isnan().nonzero().flatten().tolist() == [5, 7]
    others = [t for t in range(37) if t not in (5, 7)]
    assert torch.equal(expert[others], clean[1][others])
    assert torch.equal(weight[others], clean[0][others])


@pytest.mark.parametrize("backend", backends_of("route"))
def test_drops_are_the_surplus_over_capacity(backend):
    score = cases.RouteCase(37, 12, 3).build()[0][0]
    for order in ("token", "priority"):
        _, expert, _, load, *_ = gk.route(
            score, 3, capacity=4, capacity_order=order, backend=backend
        )
        kept = torch.bincount(expert.flatten(), minlength=13)[:12]
        assert torch.equal((load - kept).clamp_min(0), (load - 4).clamp_min(0).long())


@pytest.mark.parametrize("backend", backends_of("route"))
def test_priority_keeps_the_surest_tokens(backend):
    # Two tokens want expert 0, there is room for one: the second is surer.
    score = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    options = {"capacity": 1, "backend": backend}
    _, in_order, *_ = gk.route(score, 1, **options)
    _, by_priority, *_ = gk.route(score, 1, capacity_order="priority", **options)
    assert in_order.tolist() == [[0], [2]]
    assert by_priority.tolist() == [[2], [0]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_std": 0.5},
        {"policy": "sigmoid"},
        {"policy": "expert_choice", "capacity": 600},
        {"capacity": 300, "capacity_order": "priority", "adaptive": "mass"},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", backends_of("route"))
def test_the_same_bits_for_any_number_of_threads(backend, options):
    score = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = gk.route(score, 4, backend=backend, **options)
            up = gradients((score, 4), out, torch.float32)
            full = (score, 4, *[None] * 4, out[1], out[3], out[4], *up)
            grad = torch.ops.gose.route_backward(*full, backend=backend, **options)
            results.append([*out, grad])
    finally:
        torch.set_num_threads(before)
    if backend == "torch":  # torch's own sums follow the thread count
        results = [r[:4] for r in results]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", backends_of("route"))
@pytest.mark.parametrize("case", cases.route[::7], ids=str)
def test_opcheck(case, backend):
    args, options = case.build()
    if not runs_on(backend, args, options):
        return
    options = {**options, "backend": backend}
    out = gk.route(*args, **options)
    up = gradients(args, out, torch.float32)
    full = (*args, out[1], out[3], out[4], *up)
    torch.library.opcheck(torch.ops.gose.route.default, args, options)
    options["backend"] = None
    torch.library.opcheck(torch.ops.gose.route_backward.default, full, options)
    at = differentiable(args)
    variable = args[at].detach().clone().requires_grad_()
    args = (*args[:at], variable, *args[at + 1 :])
    torch.library.opcheck(torch.ops.gose.route.default, args, options)


# ---- refusals ----

SCORE = torch.zeros(4, 6)
FLAT = torch.zeros(6)
REFUSALS = [
    ("score_TE must be of 2 dimensions, got shape (6,)", (FLAT, 1), {}),
    ("score_TE must be floating point, got torch.int32", (SCORE.int(), 1), {}),
    ("top_k must be in [1, E=6], got 0", (SCORE, 0), {}),
    ("top_k must be in [1, E=6], got 7", (SCORE, 7), {}),
    ("policy must be one of softmax, sigmoid", (SCORE, 1), {"policy": "hash"}),
    ("entropy_TE must be None, got a tensor", (SCORE, 1, SCORE), {}),
    ("entropy_E must be of shape (6,), got (4, 6)", (SCORE, 1, None, SCORE), {"policy": "egs"}),
    ("entropy_TE must be of shape (4, 6), got (6,)", (SCORE, 1, FLAT), {"policy": "egs"}),
    (
        "exactly one of entropy_TE and entropy_E must be given to policy egs, got 0",
        (SCORE, 1),
        {"policy": "egs"},
    ),
    (
        "exactly one of entropy_TE and entropy_E must be given to policy egs, got 2",
        (SCORE, 1, SCORE, FLAT),
        {"policy": "egs"},
    ),
    ("bias_E must be None, got a tensor", (SCORE, 1, None, None, FLAT), {}),
    (
        "bias_E must be floating point, got torch.int32",
        (SCORE, 1, None, None, FLAT.int()),
        {"policy": "sigmoid"},
    ),
    (
        "noise_TE must be None, got a tensor",
        (SCORE, 1, None, None, None, SCORE),
        {"policy": "sigmoid"},
    ),
    ("noise_TE must be of shape (4, 6)", (SCORE, 1, None, None, None, FLAT), {}),
    ("entropy_floor must be above 0, got 0", (SCORE, 1), {"entropy_floor": 0.0}),
    ("tau must be None, got 0.5: only policy egs reads it", (SCORE, 1), {"tau": 0.5}),
    ("tau must be above 0, got 0", (SCORE, 1, SCORE), {"policy": "egs", "tau": 0.0}),
    ("gate must be softmax or sigmoid, got 'tanh'", (SCORE, 1), {"gate": "tanh"}),
    (
        "num_groups must be a divisor of E=6, got 4",
        (SCORE, 1),
        {"policy": "group_limited", "num_groups": 4},
    ),
    (
        "top_groups must be in [1, num_groups=3], got 4",
        (SCORE, 1),
        {"policy": "group_limited", "num_groups": 3, "top_groups": 4},
    ),
    (
        "top_k must be at most the 2 experts of the top_groups, got 3",
        (SCORE, 3),
        {"policy": "group_limited", "num_groups": 3, "top_groups": 1},
    ),
    ("capacity must be given to policy expert_choice", (SCORE, 1), {"policy": "expert_choice"}),
    ("capacity must be at least 1, got 0", (SCORE, 1), {"capacity": 0}),
    ("capacity_order must be token or priority", (SCORE, 1), {"capacity_order": "random"}),
    ("adaptive must be None, mass or bands, got some", (SCORE, 1), {"adaptive": "some"}),
    (
        "adaptive must be None for expert_choice, got mass",
        (SCORE, 1),
        {"policy": "expert_choice", "capacity": 1, "adaptive": "mass"},
    ),
    ("mass must be in (0, 1], got 0.0", (SCORE, 1), {"adaptive": "mass", "mass": 0.0}),
    ("bands must be ascending and not empty, got []", (SCORE, 1), {"adaptive": "bands"}),
    (
        "bands must be ascending and not empty, got [0.5, 0.5]",
        (SCORE, 1),
        {"adaptive": "bands", "bands": [0.5, 0.5]},
    ),
    ("noise_std must be at least 0, got -1.0", (SCORE, 1), {"noise_std": -1.0}),
    (
        "noise_std must be 0 for sigmoid, got 1.0",
        (SCORE, 1),
        {"noise_std": 1.0, "policy": "sigmoid"},
    ),
]


@pytest.mark.parametrize(("message", "args", "options"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals(message, args, options):
    with pytest.raises(ValueError, match="route: ") as caught:
        gk.route(*args, **options)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="route: "):  # the fake refuses too: torch.compile sees it
        torch.ops.gose.route(
            *(a.to("meta") if isinstance(a, Tensor) else a for a in args), **options
        )


BACKWARD_REFUSALS = [
    (6, torch.zeros(2, 1, dtype=torch.int32), "expert_TK must be torch.int32 of shape (3, 1), got"),
    (6, torch.zeros(3, 1, dtype=torch.int64), "expert_TK must be torch.int32 of shape (3, 1), got"),
    (6, torch.full((3, 1), 5, dtype=torch.int32), "expert_TK must hold experts in [0, E=4]"),
    (7, torch.zeros(3, dtype=torch.int32), "load_E must be torch.int32 of shape (4,), got"),
    (8, torch.zeros(4).double(), "importance_E must be torch.float32 of shape (4,), got"),
    (9, torch.zeros(3, 2), "grad_weight_TK must be torch.float32 of shape (3, 1), got"),
    (10, torch.zeros(3, 1), "grad_entropy_T must be torch.float32 of shape (3,), got"),
    (11, torch.zeros(()), "grad_importance_E must be torch.float32 of shape (4,), got"),
    (12, torch.zeros(4), "grad_loss_L must be torch.float32 of shape (5,), got"),
]


@pytest.mark.parametrize(
    ("at", "value", "message"), BACKWARD_REFUSALS, ids=[r[2] for r in BACKWARD_REFUSALS]
)
@pytest.mark.parametrize("backend", backends_of("route_backward"))
def test_backward_refuses_what_route_does_not_return(at, value, message, backend):
    score_TE = torch.zeros(3, 4)
    out = route_reference(score_TE, 1)
    args = [score_TE, 1, *[None] * 4, out[1], out[3], out[4], *gradients((), out, torch.float32)]
    args[at] = value
    with pytest.raises(ValueError, match="route_backward: ") as caught:
        torch.ops.gose.route_backward(*args, backend=backend)
    assert message in str(caught.value)
