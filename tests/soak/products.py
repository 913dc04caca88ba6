"""Cases of grouped_gemm and expert_mlp: forward, backward, from packed weights, changed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from tests import cases
from tests.soak import bounds
from tests.soak.draw import DTYPES, Draw

# Multiply-adds of a case, about: few are large, since most of the time goes to the float64 truth.
_WORK = (200_000, 200_000, 200_000, 500_000, 3_000_000)


def assert_within(what: str, got: Tensor, truth: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == truth.shape, (
        f"{what}: {got.dtype} {tuple(got.shape)}, not {dtype} {tuple(truth.shape)}"
    )
    if got.numel() == 0:
        return
    error = (got.double() - truth).abs()
    beyond = ~(error <= bound)  # NaN is beyond
    worst = int((error / bound).nan_to_num(torch.inf).argmax())
    assert not bool(beyond.any()), (
        f"{what}: {int(beyond.sum())} of {got.numel()} beyond their bound; element {worst} of "
        f"{tuple(got.shape)} is {got.flatten()[worst]:.9g}, not {truth.flatten()[worst]:.9g}; "
        f"error {error.flatten()[worst]:.3g} > {bound.flatten()[worst]:.3g}"
    )


def assert_same_bits(what: str, got: Tensor, wanted: Tensor) -> None:
    same = got.dtype == wanted.dtype and torch.equal(got, wanted)
    assert same, f"{what}: other bits in {int((got != wanted).sum())} of {got.numel()} elements"


def grouped_gemm(draw: Draw) -> None:
    dtype = draw.random.choice(DTYPES)
    E, D, F = draw.random.randint(0, 12), draw.size(300), draw.size(300)
    if draw.chance(0.03):
        D, F = draw.random.choice([(0, F), (D, 0)])
    N = draw.random.randint(0, 3) if draw.chance(0.1) else draw.size(200)
    N = min(N, 1 + draw.random.choice(_WORK) // max(1, D * F))
    transposed, with_bias = draw.chance(0.5), draw.chance(0.5)
    cuts = sorted(draw.random.randint(0, N) for _ in range(E))
    if cuts and draw.chance(0.7):
        cuts[-1] = N
    offset_E1 = torch.tensor([0, *cuts], dtype=torch.int32)
    x_ND = draw.normal(N, D, dtype=dtype)
    x_ND[int(offset_E1[-1]) :] = torch.nan
    w_EFD = draw.normal(E, *((D, F) if transposed else (F, D)), dtype=dtype)
    bias_EF = draw.normal(E, F, dtype=dtype) if with_bias else None
    grad_NF = draw.normal(N, F, dtype=dtype)
    if draw.chance(0.2) and N and F:
        grad_NF = grad_NF[:1, :1].expand(N, F)
    else:
        grad_NF[int(offset_E1[-1]) :] = torch.nan
        grad_NF = draw.laid_out(grad_NF)
    x_ND, w_EFD = draw.laid_out(x_ND), draw.laid_out(w_EFD)
    bias_EF = None if bias_EF is None else draw.laid_out(bias_EF)

    needs = [draw.chance(0.7) for _ in range(3)]
    with draw.threads():
        plain = gk.grouped_gemm(
            x_ND, w_EFD, offset_E1, bias_EF, transposed=transposed, backend="cpu"
        )
    leaves = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip((x_ND, w_EFD, bias_EF), needs, strict=True)
    ]
    with draw.threads():
        y_NF = gk.grouped_gemm(*leaves[:2], offset_E1, leaves[2], transposed=transposed)
    assert_same_bits("grouped_gemm, packed on the way", y_NF.detach(), plain)
    w = w_EFD.double().mT if transposed else w_EFD.double()
    truth, bound = torch.zeros(N, F).double(), torch.zeros(N, F).double()
    true_x, bound_x = torch.zeros(N, D).double(), torch.zeros(N, D).double()
    true_w, bound_w = torch.zeros(E, F, D).double(), torch.zeros(E, F, D).double()
    true_b, bound_b = torch.zeros(E, F).double(), torch.zeros(E, F).double()
    for e in range(E):
        rows = slice(int(offset_E1[e]), int(offset_E1[e + 1]))
        x, g = x_ND[rows].double(), grad_NF[rows].double()
        b = torch.zeros(F).double() if bias_EF is None else bias_EF[e].double()
        truth[rows] = x @ w[e].mT + b
        bound[rows] = bounds.product(x, w[e].mT) + bounds.summed(b.abs(), D)
        true_x[rows], bound_x[rows] = g @ w[e], bounds.product(g, w[e])
        true_w[e], bound_w[e] = g.mT @ x, bounds.product(g.mT, x)
        true_b[e], bound_b[e] = g.sum(0), bounds.summed(g.abs().sum(0), len(g))

    def check(what: str, got: Tensor, true: Tensor, error: Tensor) -> None:
        assert_within(what, got, true, error + bounds.rounded(true, dtype), dtype)

    check("grouped_gemm", plain, truth, bound)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not wanted:
        return
    with draw.threads():
        found = torch.autograd.grad(y_NF, wanted, grad_NF)
    got = dict(zip(map(id, wanted), found, strict=True))
    if transposed:
        true_w, bound_w = true_w.mT, bound_w.mT
    for name, leaf, true, error in (
        ("x", leaves[0], true_x, bound_x),
        ("w", leaves[1], true_w, bound_w),
        ("bias", leaves[2], true_b, bound_b),
    ):
        if id(leaf) in got:
            check(f"grouped_gemm, gradient of {name}", got[id(leaf)], true, error)


def _experts(draw: Draw, T: int, K: int, E: int) -> Tensor:
    """int32 ids, E is an unused slot."""
    kind = draw.random.choice(("uniform", "uniform", "unused", "one", "few", "repeated"))
    if E == 0:
        return torch.zeros(T, K, dtype=torch.int32)
    if kind == "repeated" or K > E:
        ids_TK = (draw.uniform(T, K) * E).long()
    else:
        ids_TK = draw.uniform(T, E).argsort(dim=1)[:, :K]
    if kind == "one":
        ids_TK = torch.full_like(ids_TK, draw.random.randrange(E))
    elif kind == "few":
        ids_TK = ids_TK // 3 * 3
    elif kind == "unused":
        ids_TK = ids_TK.masked_fill(draw.bools(T, K, share=draw.random.random()), E)
    return ids_TK.int()


def mlp_weights(
    draw: Draw, E: int, D: int, F: int, dtype: torch.dtype, options: dict[str, Any]
) -> list[Tensor | None]:
    """w_up, w_down, bias_up, bias_down."""
    gated = options["activation"] in cases._GATED
    H = 2 * F if gated else F
    up = draw.normal(E, H, D, dtype=dtype, scale=max(D, 1) ** -0.5)
    down = draw.normal(E, D, F, dtype=dtype, scale=max(F, 1) ** -0.5)
    if options.get("transposed", False):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    has_bias = draw.random.choice([(False, False), (True, True), (True, False), (False, True)])
    bias_up = draw.normal(E, H, dtype=dtype) if has_bias[0] else None
    bias_down = draw.normal(E, D, dtype=dtype) if has_bias[1] else None
    return [up, down, bias_up, bias_down]


def mlp_options(draw: Draw) -> dict[str, Any]:
    activation = draw.random.choice([*cases._GATED, *cases._UNGATED])
    options: dict[str, Any] = {"activation": activation, "transposed": draw.chance(0.4)}
    if activation in cases._GATED:
        options["interleaved"] = draw.chance(0.3)
        options["limit"] = draw.random.choice([None, None, 0.5, 1.5, 7.0])
    if activation == "swiglu_oai" and draw.chance(0.5):
        options["alpha"] = 0.75
    return options


def _mlp_case(draw: Draw) -> tuple[list[Any], dict[str, Any]]:
    dtype, options = draw.random.choice(DTYPES), mlp_options(draw)
    E, K = (
        draw.size(64) if draw.chance(0.3) else draw.random.randint(1, 9),
        draw.random.randint(1, 8),
    )
    D, F = draw.size(256), draw.size(256)
    T = draw.size(4) if draw.chance(0.3) else draw.size(150)
    work = draw.random.choice(_WORK)
    T, E = min(T, 1 + work // (K * D * F)), min(E, 1 + work // (D * F))
    if draw.chance(0.05):
        which = draw.random.randrange(5)
        T, K, E, D, F = (0 if i == which else n for i, n in enumerate((T, K, E, D, F)))
    expert_TK = _experts(draw, T, K, E)
    scale = draw.random.choice([1.0, 1.0, 1e-3, 4.0 if dtype == torch.float16 else 30.0])
    x_TD = draw.normal(T, D, dtype=dtype, scale=scale)
    weight_TK = draw.uniform(T, K) - (0.5 if draw.chance(0.1) else 0.0)
    weight_TK[expert_TK == E] = torch.nan
    x_TD[(expert_TK == E).all(dim=1)] = torch.nan
    if draw.chance(0.05) and T and bool((expert_TK < E).all()):
        x_TD = x_TD[:1].expand(T, D)
    weights = mlp_weights(draw, E, D, F, dtype, options)
    if draw.chance(0.05) and E:  # one expert, many times
        weights = [None if w is None else w[:1].expand(w.shape) for w in weights]
    else:
        weights = [None if w is None else draw.laid_out(w) for w in weights]
    if draw.chance(0.3):
        expert_TK = expert_TK.long()
    frozen: list[Tensor | None] = [None, None]
    if draw.chance(0.5):
        frozen[0] = draw.laid_out(draw.bools(E, share=0.4)) if draw.chance(0.7) else None
        share = draw.random.choice([0.05, 0.4, 0.95])
        frozen[1] = draw.laid_out(draw.bools(E, F, share=share)) if draw.chance(0.7) else None
    routed = [draw.laid_out(t) for t in (x_TD, weight_TK, expert_TK)]
    return [*routed, *weights, *frozen], options


def _overlaps(t: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))


_LEAVES = {0: "x", 1: "weight", 3: "up", 4: "down", 5: "bias_up", 6: "bias_down"}


def _forward(draw: Draw, args: list[Any], options: dict[str, Any]) -> Tensor:
    """Twice, on two numbers of threads, and of some of the tokens: the same bits."""
    with draw.threads():
        out_TD = gk.expert_mlp(*args, **options)
    with draw.threads():
        assert_same_bits("expert_mlp, repeated", gk.expert_mlp(*args, **options), out_TD)
    T = len(args[0])
    some = draw.bools(T, share=0.5)
    part = [t[some] for t in args[:3]]
    got = gk.expert_mlp(*part, *args[3:], **options)
    assert_same_bits("expert_mlp, some of the tokens", got, out_TD[some])
    return out_TD


def _packed(draw: Draw, args: list[Any], options: dict[str, Any], out_TD: Tensor) -> None:
    packed_EB = gk.pack_experts(
        *args[3:5],
        gated=options["activation"] in cases._GATED,
        interleaved=options.get("interleaved", False),
        transposed=options["transposed"],
    )
    of_call = {k: v for k, v in options.items() if k != "transposed"}
    hidden = args[4].shape[1 if options["transposed"] else 2]
    got = gk.expert_mlp_packed(*args[:3], packed_EB, hidden, *args[5:7], **of_call)
    assert_same_bits("expert_mlp_packed", got, out_TD)


def expert_mlp(draw: Draw) -> None:
    args, options = _mlp_case(draw)
    dtype, E = args[0].dtype, args[3].shape[0]
    truth = bounds.Mlp(tuple(args), options, dtype)
    true_out, bound_out, true_pre, bound_pre = truth.forward()
    out_TD = _forward(draw, args, options)
    assert_within("expert_mlp", out_TD, true_out, bound_out, dtype)
    if draw.chance(0.2):
        _packed(draw, args, options, out_TD)

    needs = {i: args[i] is not None and draw.chance(0.75) for i in _LEAVES}
    leaves = [a.detach().requires_grad_() if needs.get(i, False) else a for i, a in enumerate(args)]
    with draw.threads():
        trained_TD = gk.expert_mlp(*leaves, **options)
    assert_within("expert_mlp, trained", trained_TD.detach(), true_out, bound_out, dtype)
    if trained_TD.requires_grad:
        _check_gradients(draw, args, options, leaves, trained_TD, truth, (true_pre, bound_pre))
    if draw.chance(0.3) and E and not any(_overlaps(w) for w in args[3:5]):
        with torch.no_grad():  # the copy that was kept is of other weights now
            args[3].mul_(-0.5), args[4].add_(0.125)
            fresh = [*args[:3], args[3].clone(), args[4].clone(), *args[5:]]
            got = gk.expert_mlp(*args, **options)
            assert_same_bits("expert_mlp, changed weights", got, gk.expert_mlp(*fresh, **options))


def _check_gradients(
    draw: Draw,
    args: list[Any],
    options: dict[str, Any],
    leaves: list[Any],
    out_TD: Tensor,
    truth: bounds.Mlp,
    pre: tuple[Tensor, Tensor],
) -> None:
    dtype = args[0].dtype
    (T, D), used = args[0].shape, int((args[2] < args[3].shape[0]).sum())
    grad_TD = draw.normal(T, D, dtype=dtype)
    if draw.chance(0.15) and T and D:
        grad_TD = grad_TD[:1, :1].expand(T, D)
    else:
        grad_TD[(args[2] == args[3].shape[0]).all(dim=1)] = torch.nan  # of no expert: not read
        grad_TD = draw.laid_out(grad_TD)
    wanted = {i: leaves[i] for i in _LEAVES if getattr(leaves[i], "requires_grad", False)}
    with draw.threads():
        found = torch.autograd.grad(
            out_TD, list(wanted.values()), grad_TD, allow_unused=True, retain_graph=True
        )
    with draw.threads():
        again = torch.autograd.grad(
            out_TD, list(wanted.values()), grad_TD, allow_unused=True, retain_graph=True
        )
    _, pre_NH = torch.ops.gose.expert_mlp_train(*args, **options, backend="cpu")
    assert_within("expert_mlp_train, pre", pre_NH[:used], *pre, dtype)
    assert not bool(pre_NH[used:].any()), "expert_mlp_train, pre: rows of unused slots are not 0"
    gradients = truth.backward(pre_NH[:used], grad_TD)
    bounds.freeze(gradients, *args[7:9], options)
    for i, one, two in zip(wanted, found, again, strict=True):
        name = _LEAVES[i]
        assert one is not None, f"expert_mlp: no gradient of {name}"
        assert_same_bits(f"expert_mlp, gradient of {name}, repeated", two, one)
        of = torch.float32 if name == "weight" else dtype
        assert_within(f"expert_mlp, gradient of {name}", one, *gradients[name], of)
    if draw.chance(0.4):
        _check_added(draw, wanted, out_TD, grad_TD, gradients)


def _check_added(
    draw: Draw,
    leaves: dict[int, Any],
    out_TD: Tensor,
    grad_TD: Tensor,
    gradients: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Gradients of the weights, added to what is there; what gets none keeps its bits."""
    before = {i: draw.normal(*w.shape, dtype=w.dtype) for i, w in leaves.items() if i in (3, 4)}
    for i, there in before.items():
        leaves[i].grad = there.clone()
    with draw.threads(), gk.memory.fused_grad_accumulation():
        out_TD.backward(grad_TD)
    for i, there in before.items():
        name, got = _LEAVES[i], leaves[i].grad
        true, bound = gradients[name]
        added = there.double() + true
        reached = bound > bounds.rounded(torch.zeros_like(bound), there.dtype)
        bound = (bound + bounds.rounded(added, there.dtype)).where(reached, 0.0)
        assert_within(f"expert_mlp, added gradient of {name}", got, added, bound, there.dtype)
