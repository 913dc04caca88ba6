"""route: every policy against a brute force, gradients, traps of entropy routing, properties."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route import route_backward_reference, route_reference
from gose_kernels.ops.route_call import LOSSES
from tests import cases
from tests.checks import assert_close_to_truth, assert_close_within_ulps, backends_of
from tests.route_oracle import GRADIENTS, assert_same, gradients, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@pytest.mark.parametrize("case", cases.route, ids=str)
def test_reference_matches_brute_force(case):
    args, options = case.build(torch.float64)
    assert_same(route_reference(*args, **options), oracle(*args, **options))


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
@pytest.mark.parametrize("backend", backends_of("route", "cpu", "torch"))
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


# What opcheck looks at does not grow with tokens, and it runs an op many times.
@pytest.mark.parametrize("backend", backends_of("route", interpreted=3))
@pytest.mark.parametrize("case", [c for c in cases.route[::7] if c.T < 1000], ids=str)
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
