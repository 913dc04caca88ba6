"""Cases of route and moe: every policy, capacity, adaptive number, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.moe import moe_reference
from gose_kernels.ops.route import route_backward_reference, route_reference
from tests.route_oracle import gradients
from tests.soak import bounds
from tests.soak.draw import DTYPES, Draw
from tests.soak.products import assert_same_bits, assert_within, mlp_options, mlp_weights

_STATISTICS = {0: "weight", 2: "entropy", 4: "importance", 5: "loss"}


def route_options(draw: Draw, E: int) -> tuple[int, dict[str, Any]]:
    """top_k and options that route takes."""
    policy = draw.random.choice(("softmax", "softmax", "sigmoid", "group_limited", "egs"))
    if draw.chance(0.15):
        policy = "expert_choice"
    options: dict[str, Any] = {"policy": policy}
    most = E
    if policy == "group_limited":
        groups = draw.random.choice([g for g in range(1, E + 1) if E % g == 0])
        best = draw.random.randint(1, groups)
        options |= {"num_groups": groups, "top_groups": best}
        options["gate"] = draw.random.choice(("softmax", "sigmoid"))
        most = best * (E // groups)
    if policy == "expert_choice":
        options["capacity"] = draw.size(40)
    elif draw.chance(0.3):
        options["capacity"] = draw.size(40)
        options["capacity_order"] = draw.random.choice(("token", "priority"))
    if policy == "egs":
        options |= {"tau": 0.3} if draw.chance(0.4) else {"entropy_floor": 0.1}
    if policy != "expert_choice" and draw.chance(0.3):
        adaptive = draw.random.choice(("mass", "bands"))
        options["adaptive"] = adaptive
        options |= {"mass": draw.random.random() or 1.0} if adaptive == "mass" else {}
        options |= {"bands": [0.3, 0.8, 0.95]} if adaptive == "bands" else {}
    options["renormalize"], options["softmax_before"] = draw.chance(0.5), draw.chance(0.7)
    if policy == "softmax" and draw.chance(0.2):
        options["noise_std"] = 0.5
    return draw.random.randint(1, min(most, draw.random.choice((2, 8, E)))), options


def _rankings(draw: Draw, T: int, E: int, options: dict[str, Any]) -> list[Tensor | None]:
    """entropy_TE, entropy_E, bias_E, noise_TE as the policy reads them."""
    entropy_TE = entropy_E = bias_E = noise_TE = None
    policy = options["policy"]
    if policy == "egs":
        if draw.chance(0.6):
            entropy_TE = draw.laid_out(draw.uniform(T, E))
        else:
            entropy_E = draw.uniform(E)
    sigmoid = policy == "sigmoid" or options.get("gate") == "sigmoid"
    if sigmoid and draw.chance(0.4):
        bias_E = draw.normal(E, dtype=torch.float32)
    if policy == "softmax" and (options.get("noise_std", 0) or draw.chance(0.2)):
        noise_TE = draw.laid_out(draw.normal(T, E, dtype=torch.float32, scale=0.5))
    return [entropy_TE, entropy_E, bias_E, noise_TE]


def _double(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def _is_a_draw(args: list[Any], options: dict[str, Any], error: float) -> bool:
    """Whether scores that differ by no more than roundings would be routed otherwise."""
    random = torch.Generator().manual_seed(0)

    def moved(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.numel() == 0:
            return a
        size = a.double().abs().nan_to_num(0, 0, 0).amax()
        noise = torch.rand(a.shape, generator=random, dtype=torch.float64) - 0.5
        return (a.double() + 2 * error * noise * size).float()

    wanted = route_reference(*[a.float() if isinstance(a, Tensor) else a for a in args], **options)
    for _ in range(20):
        if not torch.equal(route_reference(*map(moved, args), **options)[1], wanted[1]):
            return True
    return False


def _truth(
    got: tuple[Tensor, ...], args: list[Any], options: dict[str, Any], error: float = 1e-6
) -> tuple[Tensor, ...] | None:
    """What `got` of route must be close to: outputs of the reference in float64, of that in float32
    where numbers that are 0 or 1 in float32 decide the choice; None where its rounding may."""
    exact, single = (route_reference(*of, **options) for of in (_double(args), args))
    for truth in (exact, single):
        if torch.equal(got[1], truth[1]):
            assert torch.equal(got[3], truth[3]), "route: other loads"
            return tuple(t.double() for t in truth)
    decided = torch.equal(exact[1], single[1]) and not _is_a_draw(args, options, error)
    assert not decided, f"route: experts {got[1].tolist()}, not {exact[1].tolist()}"
    return None


def _check_statistics(got: Any, truth: Any, largest: float, std: float) -> None:
    """Relative errors grow with the scores, whose differences are rounded before exp."""
    share = 4e-6 + 2.0**-21 * largest
    slack = {0: 1e-7, 2: share, 4: 1e-6, 5: 1e-6 + share}
    for i, name in _STATISTICS.items():
        factor = 8 / min(std, 1.0) if i == 5 and std else 8 if i == 5 else 1
        bound = factor * (share * truth[i].abs() + slack[i])
        assert_within(f"route, {name}", got[i], truth[i], bound, got[i].dtype)


def route(draw: Draw) -> None:
    E = draw.size(130) if draw.chance(0.5) else draw.random.randint(1, 9)
    T = draw.size(300) if draw.chance(0.8) else draw.random.randint(0, 3)
    T = min(T, 1 + draw.random.choice((1_000, 1_000, 12_000)) // E)
    top_k, options = route_options(draw, E)
    dtype = draw.random.choice(DTYPES)
    scale = draw.random.choice((1.0, 1.0, 3.0, 0.01, 30.0))
    score_TE = draw.normal(T, E, dtype=dtype, scale=scale)
    if draw.chance(0.2):  # experts that some tokens, or none, may have
        score_TE = score_TE.masked_fill(draw.bools(T, E, share=0.2), -torch.inf)
        if draw.chance(0.5):
            score_TE[:, draw.random.randrange(E)] = -torch.inf
    args = [draw.laid_out(score_TE), top_k, *_rankings(draw, T, E, options)]
    with draw.threads():
        got = gk.route(*args, **options, backend="cpu")
    with draw.threads():
        for one, two in zip(got, gk.route(*args, **options), strict=True):
            assert_same_bits("route, repeated", one, two)
    if (truth := _truth(got, args, options)) is None:
        return
    finite = score_TE.float().masked_fill(score_TE == -torch.inf, 0)
    largest = float(finite.abs().amax()) if finite.numel() else 0.0
    _check_statistics(got, truth, largest, options.get("noise_std", 0.0))

    if not torch.equal(route_reference(*_double(args), **options)[1], got[1]):
        return
    up = gradients(tuple(args), got, torch.float32)
    given = [u if draw.chance(0.8) else None for u in up]
    full = [*args, got[1], got[3], got[4], *given]
    with draw.threads():
        grad = torch.ops.gose.route_backward(*full, **options, backend="cpu")
    with draw.threads():
        again = torch.ops.gose.route_backward(*full, **options, backend="cpu")
    assert_same_bits("route_backward, repeated", again, grad)
    true = route_backward_reference(*_double(full), **options)
    same = route_backward_reference(*full, **options)
    if true.numel():
        size = true.abs().amax() + sum(u.abs().amax() for u in given if u is not None and u.numel())
        own = (same.double() - true).abs().amax()
        bound = 4 * own + bounds.rounded(true, grad.dtype) + (2e-6 + 2.0**-22 * largest) * size
        assert_within("route_backward", grad, true, bound, grad.dtype)


def moe(draw: Draw) -> None:
    dtype, of_mlp = draw.random.choice(DTYPES), mlp_options(draw)
    E = draw.random.randint(1, 12) if draw.chance(0.8) else draw.size(64)
    D, F = draw.size(200), draw.size(100)
    E = min(E, 1 + draw.random.choice((200_000, 200_000, 2_000_000)) // (D * F))
    top_k, of_route = route_options(draw, E)
    top_k = min(top_k, 8)
    T = draw.random.randint(0, 2) if draw.chance(0.2) else draw.size(80)
    T = min(T, 1 + draw.random.choice((200_000, 200_000, 2_000_000)) // (top_k * D * F))
    x_TD = draw.laid_out(draw.normal(T, D, dtype=dtype))
    weights = mlp_weights(draw, E, D, F, dtype, of_mlp)
    weights = [None if w is None else draw.laid_out(w) for w in weights]
    rankings = _rankings(draw, T, E, of_route)
    score = draw.random.choice(("router", "logits"))
    if of_route["policy"] == "egs" and draw.chance(0.5):
        score = "none"
    router = logits = None
    if score == "router":
        of = draw.random.choice((dtype, dtype, torch.float32))
        router = draw.laid_out(draw.normal(E, D, dtype=of, scale=D**-0.5))
    elif score == "logits":
        logits = draw.laid_out(draw.normal(T, E, dtype=draw.random.choice((dtype, torch.float32))))
    args = [x_TD, *weights[:2], top_k, router, logits, *weights[2:], None, None, *rankings]
    options = {**of_mlp, **of_route}
    with draw.threads():
        got = gk.moe(*args, **options, backend="cpu")
    with draw.threads():
        again = [gk.moe(*args, **options) for _ in range(2)]  # learned, then repeated
    for one, two, three in zip(got, *again, strict=True):
        assert_same_bits("moe, learned", two, one)
        assert_same_bits("moe, repeated", three, one)
    exact = bounds.Mlp((x_TD, got[1], got[2], *weights), of_mlp, dtype)
    true_out, bound_out, *_ = exact.forward()
    assert_within("moe", got[0], true_out, bound_out, dtype)
    score_TE = torch.zeros(T, E).double()
    if router is not None:
        score_TE = x_TD.double() @ router.double().mT
    elif logits is not None:
        score_TE = logits.double()
    of_score = [score_TE.float(), top_k, *rankings]
    if (truth := _truth(got[1:], of_score, of_route, error=3e-6)) is None:
        return
    largest = 40 * float(score_TE.abs().amax()) if score_TE.numel() else 0.0
    _check_statistics(got[1:], truth, largest, of_route.get("noise_std", 0.0))
    _check_training(draw, args, options, got)


def _check_training(
    draw: Draw, args: list[Any], options: dict[str, Any], got: tuple[Tensor, ...]
) -> None:
    """Through autograd: routed as the one call is, gradients near the reference's."""

    def leaf(a: Any, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.detach().to(dtype or a.dtype).requires_grad_()

    leaves = [leaf(a) for a in args]
    with draw.threads():
        outputs = gk.moe(*leaves, **options)
    grad_TD = draw.normal(*got[0].shape, dtype=got[0].dtype)
    inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    with draw.threads():
        found = torch.autograd.grad(outputs[0], inputs, grad_TD, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in found if g is not None), "moe: gradients"
    # Where rounding does not decide: slopes jump at the kinks, scores of another product may tie.
    smooth = options["activation"] not in ("relu", "reglu") and options.get("limit") is None
    if grad_TD.dtype != torch.float32 or not smooth or options["activation"] == "swiglu_oai":
        return
    exact = [leaf(a, torch.float64) for a in args]
    truth = moe_reference(*exact, **options)
    if not torch.equal(truth[2], got[2]) or not torch.equal(outputs[2], got[2]):
        return
    inputs = [a for a in exact if isinstance(a, Tensor) and a.requires_grad]
    wanted = torch.autograd.grad(truth[0], inputs, grad_TD.double(), allow_unused=True)
    for one, true in zip(found, wanted, strict=True):
        assert (one is None) == (true is None), "moe: gradients of other inputs"
        if one is None or true is None:
            continue
        error = (one.double() - true).norm()
        assert bool(error <= 3e-4 * true.norm() + 1e-4 * grad_TD.double().norm() + 1e-6), (
            f"moe, a gradient of shape {tuple(one.shape)}: relative error {error / true.norm():.3g}"
        )
