"""expert_mlp and its gradients against its formula in float64, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gose_kernels as gk
from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.ops.expert_mlp import (
    expert_mlp_backward_reference,
    expert_mlp_reference,
    expert_mlp_train_reference,
)
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
# Relative L2 error of the reference, whose intermediate results have the dtype of x.
REFERENCE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "reglu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda g: functional.relu(g) ** 2,
}


def _act(
    pre_H: Tensor, activation: str, interleaved: bool, limit: float | None, alpha: float
) -> Tensor:
    if activation not in cases._GATED:
        return PHI[activation](pre_H)
    F = pre_H.shape[0] // 2
    gate, up = (pre_H[::2], pre_H[1::2]) if interleaved else (pre_H[:F], pre_H[F:])
    limit = 7.0 if limit is None and activation == "swiglu_oai" else limit
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return PHI[activation](gate) * up


def _oracle(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    bias_up_EH: Tensor | None,
    bias_down_ED: Tensor | None,
    *_frozen: Tensor | None,
    activation: str = "swiglu",
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
) -> Tensor:
    """The contract, a slot at a time; differentiable."""
    if transposed:
        up_EHD, down_EDF = up_EHD.mT, down_EDF.mT
    out = []
    for t in range(x_TD.shape[0]):
        token = torch.zeros(x_TD.shape[1], dtype=x_TD.dtype)
        for k in range(weight_TK.shape[1]):
            e = int(expert_TK[t, k])
            if e == up_EHD.shape[0]:
                continue
            pre = up_EHD[e] @ x_TD[t] + (0 if bias_up_EH is None else bias_up_EH[e])
            y = down_EDF[e] @ _act(pre, activation, interleaved, limit, alpha)
            token = token + weight_TK[t, k] * (y + (0 if bias_down_ED is None else bias_down_ED[e]))
        out.append(token)
    return torch.stack(out) if out else torch.zeros_like(x_TD)


def _double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if a is not None and a.is_floating_point() else a for a in args)


def _underflows(case: cases.ExpertMlpCase, dtype: torch.dtype) -> bool:
    """Products of two tiny numbers are subnormal in float16."""
    return dtype == torch.float16 and case.scale < 1


def _output_grad(case: cases.ExpertMlpCase, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.T, case.D, generator=torch.Generator().manual_seed(1)).to(dtype)


def _gradients(
    function: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any], grad: Tensor
) -> list[Tensor]:
    """Gradients of the floating-point arguments, zeros where there is none."""
    leaves = [
        a.detach().requires_grad_() if a is not None and a.is_floating_point() else a for a in args
    ]
    out = function(*leaves, **options)
    wanted = [a for a in leaves if a is not None and a.requires_grad]
    if not out.requires_grad:
        return [torch.zeros_like(a) for a in wanted]
    got = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for g, a in zip(got, wanted, strict=True)]


def _freeze(case: cases.ExpertMlpCase, args: tuple[Any, ...], gradients: list[Tensor]) -> None:
    """Zero the gradients of what is frozen, by its definition."""
    frozen_E, frozen_EF = args[7:]
    if frozen_E is None:
        return
    transposed = case.options.get("transposed", False)
    up_EHD, down_EDF = (g.mT if transposed else g for g in gradients[2:4])
    frozen_EF = frozen_EF | frozen_E[:, None]
    frozen_EH = frozen_EF
    if case.activation in cases._GATED:
        frozen_EH = torch.cat([frozen_EF, frozen_EF], dim=1)
        if case.options.get("interleaved", False):
            frozen_EH = frozen_EF.repeat_interleave(2, dim=1)
    up_EHD[frozen_EH] = 0
    down_EDF.mT[frozen_EF] = 0
    if case.bias:
        gradients[4][frozen_EH] = 0
        gradients[5][frozen_E] = 0


def _true_gradients(
    case: cases.ExpertMlpCase, args: tuple[Any, ...], options: dict[str, Any], grad: Tensor
) -> list[Tensor]:
    gradients = _gradients(_oracle, _double(args), options, grad.double())
    _freeze(case, args, gradients)
    return gradients


@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
def test_reference_is_the_formula(case: cases.ExpertMlpCase) -> None:
    args, options = case.build(torch.float64)
    torch.testing.assert_close(expert_mlp_reference(*args, **options), _oracle(*args, **options))
    grad_TD = _output_grad(case, torch.float64)
    got = _gradients(gk.expert_mlp, args, {**options, "backend": "torch"}, grad_TD)
    for one, truth in zip(got, _true_gradients(case, args, options, grad_TD), strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_matches_reference(case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str) -> None:
    args, options = case.build(dtype)
    got = gk.expert_mlp(*args, **options, backend=backend)
    truth = _oracle(*_double(args), **options)
    same = expert_mlp_reference(*args, **options)
    assert_chain_close_to_truth(got, same, truth)
    if not _underflows(case, dtype):
        assert (same - truth).norm() <= REFERENCE_ERROR[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_gradients_match_reference(
    case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str
) -> None:
    args, options = case.build(dtype)
    grad_TD = _output_grad(case, dtype)
    got = _gradients(gk.expert_mlp, args, {**options, "backend": backend}, grad_TD)
    same = _gradients(gk.expert_mlp, args, {**options, "backend": "torch"}, grad_TD)
    truths = _true_gradients(case, args, options, grad_TD)
    for one, own, truth in zip(got, same, truths, strict=True):
        assert_chain_close_to_truth(one, own, truth, gradient=True)
        # pre rounds across a clamp's edge now and then: one element of a derivative jumps.
        if not _underflows(case, dtype):
            assert (own - truth).norm() <= 4 * REFERENCE_ERROR[dtype] * truth.norm()


def test_reference_rounds_where_the_contract_says() -> None:
    """Widths of 1 make every sum one product: pre, a, y and out are rounded, nothing else."""
    (x_TD, weight_TK, expert_TK, up_EHD, down_EDF, *_), _ = cases.ExpertMlpCase(
        T=400, K=1, E=3, D=1, F=1
    ).build(torch.bfloat16)
    e_T = expert_TK[:, 0].long()
    pre_TH = (x_TD.double() * up_EHD.double()[e_T, :, 0]).bfloat16().double()
    a_T = (functional.silu(pre_TH[:, 0]) * pre_TH[:, 1]).bfloat16().double()
    y_T = (a_T * down_EDF.double()[e_T, 0, 0]).bfloat16().double()
    want_T = (weight_TK[:, 0].double() * y_T).bfloat16()
    got_TD = expert_mlp_reference(x_TD, weight_TK, expert_TK, up_EHD, down_EDF)
    # Rounding float64 to float32 first can move a tie: a few in ten thousand.
    assert int((got_TD[:, 0] != want_T).sum()) <= 1


@pytest.mark.parametrize("case", [c for c in cases.expert_mlp if c.kind == "unused"], ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_train"))
def test_training_keeps_pre_in_dispatch_order_and_zeros(
    case: cases.ExpertMlpCase, backend: str
) -> None:
    args, options = case.build(torch.float32)
    x_TD, _, expert_TK, up_EHD, _, bias_up_EH = args[:6]
    row_TK, _, _ = gk.dispatch(expert_TK, case.E)
    want_NH = torch.zeros(expert_TK.numel(), case.hidden)
    for t, k in (row_TK >= 0).nonzero().tolist():
        e = int(expert_TK[t, k])
        want_NH[row_TK[t, k]] = up_EHD[e] @ x_TD[t] + bias_up_EH[e]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        pre_NH = torch.ops.gose.expert_mlp_train(*args, **options, backend=backend)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(pre_NH, want_NH)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_derivatives_and_finite(name: str) -> None:
    act, alpha = ACTIVATIONS[name], 1.3
    g = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(act.phi(g, alpha).sum(), g)
    torch.testing.assert_close(act.slope(g.detach(), alpha), slope)
    for dtype in (torch.float32, torch.float64):
        extreme = torch.tensor([-1e38, -1e20, -30.0, -0.0, 1e-38, 30.0, 1e18], dtype=dtype)
        assert act.slope(extreme, alpha).isfinite().all()
        want = torch.tensor([0.0, 0, 0], dtype=dtype)
        torch.testing.assert_close(act.slope(extreme[:3], alpha), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "gelu"])
def test_gradients_are_exact(activation: str) -> None:
    case = cases.ExpertMlpCase(activation, 4, 2, 3, 3, 2, kind="unused", bias=True)
    args, options = case.build(torch.float64)
    args = tuple(a.nan_to_num() if a is not None and a.is_floating_point() else a for a in args)
    inputs = [a.requires_grad_() for i, a in enumerate(args[:7]) if i != 2]

    def layer(x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = gk.expert_mlp(x, weight, args[2], *weights, **options)
        return out

    assert torch.autograd.gradcheck(layer, inputs)


@given(st.integers(0, 12), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_permuting_tokens_permutes_outputs_and_gradients(T: int, K: int, seed: int) -> None:
    case = cases.ExpertMlpCase(T=T, K=K, kind="unused", bias=True)
    (x, weight, expert, *weights), _ = case.build(torch.float64)
    grad_TD = _output_grad(case, torch.float64)
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    args, moved = (
        (x, weight, expert, *weights),
        (x[order_T], weight[order_T], expert[order_T], *weights),
    )
    torch.testing.assert_close(gk.expert_mlp(*moved), gk.expert_mlp(*args)[order_T])
    want = _gradients(gk.expert_mlp, args, {}, grad_TD)
    got = _gradients(gk.expert_mlp, moved, {}, grad_TD[order_T])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b[order_T] if i < 2 else b)


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_every_expert_on_every_token_is_a_dense_sum(backend: str) -> None:
    case = cases.ExpertMlpCase("gelu", T=9, K=5, E=5, bias=True)
    (x, weight, _, up, down, bias_up, bias_down, *_), options = case.build()
    expert_TK = torch.arange(5).expand(9, 5)
    got = gk.expert_mlp(
        x, weight, expert_TK, up, down, bias_up, bias_down, **options, backend=backend
    )
    pre_TEH = torch.einsum("td,ehd->teh", x, up) + bias_up
    y_TED = torch.einsum("tef,edf->ted", functional.gelu(pre_TEH), down) + bias_down
    torch.testing.assert_close(got, torch.einsum("te,ted->td", weight, y_TED))


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_an_unused_expert_changes_no_bit(backend: str) -> None:
    """An expert of NaN without tokens: outputs and gradients equal, its own gradient exactly 0."""
    case = cases.ExpertMlpCase(kind="unused", bias=True)
    args, _ = case.build()
    expert_TK = torch.where(args[2] == case.E, case.E + 1, args[2])
    more = [torch.cat([a, torch.full_like(a[:1], torch.nan)]) for a in args[3:7]]
    grad_TD, options = _output_grad(case, torch.float32), {"backend": backend}
    wider = (*args[:2], expert_TK, *more, None, None)
    assert torch.equal(gk.expert_mlp(*wider, **options), gk.expert_mlp(*args, **options))
    want = _gradients(gk.expert_mlp, args, options, grad_TD)
    got = _gradients(gk.expert_mlp, wider, options, grad_TD)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a[:-1], b)
        assert torch.equal(a[-1], torch.zeros_like(a[-1]))


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_tokens_without_experts_are_not_read(backend: str) -> None:
    """They hold NaN, so do the weights of unused slots; they give 0 and get gradient 0."""
    args, _ = cases.ExpertMlpCase(kind="unused").build()
    alone_T = (args[2] == 5).all(dim=1)
    assert args[0][alone_T].isnan().all()
    assert alone_T.any()
    grad_TD = torch.ones_like(args[0])
    grad_TD[alone_T] = torch.nan
    out_TD = gk.expert_mlp(*args, backend=backend)
    assert out_TD.isfinite().all()
    assert torch.equal(out_TD[alone_T], torch.zeros_like(out_TD[alone_T]))
    gradients = _gradients(gk.expert_mlp, args, {"backend": backend}, grad_TD)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][alone_T].any()
    assert not gradients[1][args[2] == 5].any()


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_a_nan_stays_in_its_token(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(K=1).build()
    grad_TD, options = torch.ones_like(args[0]), {"backend": backend}
    sound_T = torch.arange(13) != 4
    ill_TD = torch.where(sound_T[:, None], args[0], torch.nan)
    ill = (ill_TD, *args[1:])
    out_TD, want_TD = (gk.expert_mlp(*a, **options) for a in (ill, args))
    assert torch.equal(out_TD[sound_T], want_TD[sound_T])
    assert out_TD[4].isnan().all()
    got, want = (_gradients(gk.expert_mlp, a, options, grad_TD) for a in (ill, args))
    assert torch.equal(got[0][sound_T], want[0][sound_T])
    assert got[0][4].isnan().all()
    for e in set(range(5)) - {int(args[2][4, 0])}:
        assert torch.equal(got[2][e], want[2][e])
        assert torch.equal(got[3][e], want[3][e])


@pytest.mark.parametrize("case", [c for c in cases.expert_mlp if c.frozen], ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_freezing_zeroes_its_gradients_and_no_other(
    case: cases.ExpertMlpCase, backend: str
) -> None:
    # The compiled kernels have no float64.
    dtype = torch.float64 if backend == "torch" else torch.float32
    args, options = case.build(dtype)
    grad_TD = _output_grad(case, dtype)
    options = {**options, "backend": backend}
    got = _gradients(gk.expert_mlp, args, options, grad_TD)
    free = _gradients(gk.expert_mlp, (*args[:7], None, None), options, grad_TD)
    assert torch.equal(gk.expert_mlp(*args, **options), gk.expert_mlp(*args[:7], **options))
    for a, b in zip(got[:2], free[:2], strict=True):
        assert torch.equal(a, b)
    _freeze(case, args, free)
    for a, b in zip(got, free, strict=True):
        torch.testing.assert_close(a, b)
        assert not a[b == 0].any()


def test_frozen_experts_cost_no_product() -> None:
    """FLOPs of the products that the backward makes, counted by torch."""
    T, K, E, D, F = 32, 2, 4, 16, 8
    args = cases.ExpertMlpCase(T=T, K=K, E=E, D=D, F=F).build()[0]
    args = (*args[:2], torch.arange(T * K, dtype=torch.int32).view(T, K) % E, *args[3:7])
    pre_NH = expert_mlp_train_reference(*args)[1]
    each = 2 * T * K * D * F  # a product with F; those with H = 2F count twice

    def flops(frozen_E: Tensor | None, frozen_EF: Tensor | None = None, **needs: bool) -> float:
        tensors = (*args, frozen_E, frozen_EF, pre_NH, torch.ones(T, D))
        with FlopCounterMode(display=False) as counter:
            expert_mlp_backward_reference(*tensors, **needs)
        declared = gk.OPS["expert_mlp_backward"].cost_of(*tensors, **needs).flops
        if frozen_E is None and frozen_EF is None:
            assert declared == counter.get_total_flops()
        return counter.get_total_flops() / each

    three = torch.tensor([True, True, False, True])
    half_EF = (torch.arange(F) % 2 == 0).expand(E, F)
    assert flops(None) == 3 + 3
    assert flops(torch.ones(E, dtype=torch.bool)) == 3
    assert flops(three) == 3 + 3 / 4
    assert flops(None, half_EF) == 3 + 3 / 2
    assert flops(None, need_x=False) == 4
    assert flops(None, need_up=False, need_down=False) == 3
    assert flops(None, need_x=False, need_up=False, need_weight=False) == 1
    cost = gk.expert_mlp.cost_of(*args)
    with FlopCounterMode(display=False) as counter:
        expert_mlp_reference(*args)
    assert cost.flops == counter.get_total_flops() == 3 * each


def test_backward_keeps_x_and_the_pre_activation_only() -> None:
    case = cases.ExpertMlpCase(T=32, K=4, D=16, F=8, bias=True)
    args, _ = case.build()
    for a in args[:7]:
        a.requires_grad_(a.is_floating_point())
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out_TD = gk.expert_mlp(*args)
    assert out_TD.grad_fn is not None
    given = {a.data_ptr() for a in args[:7]}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == [(32 * 4, 2 * 8)]


def test_only_needed_gradients_are_made() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    pre_NH = expert_mlp_train_reference(*args)[1]
    needs = ("need_x", "need_weight", "need_up", "need_down", "need_bias_up", "need_bias_down")
    grad_TD = torch.ones_like(args[0])
    every = torch.ops.gose.expert_mlp_backward(
        *args, pre_NH, grad_TD, **dict.fromkeys(needs, True), backend="torch"
    )
    for i, need in enumerate(needs):
        one = torch.ops.gose.expert_mlp_backward(
            *args, pre_NH, grad_TD, **{n: n == need for n in needs}, backend="torch"
        )
        assert torch.equal(one[i], every[i])
        assert all(g.shape == (0,) for j, g in enumerate(one) if j != i)


def test_layouts_hold_the_same_numbers() -> None:
    (x, weight, expert, up, down, *rest), _ = cases.ExpertMlpCase().build(torch.float64)
    want = gk.expert_mlp(x, weight, expert, up, down, *rest)
    turned = gk.expert_mlp(x, weight, expert, up.mT, down.mT, *rest, transposed=True)
    torch.testing.assert_close(turned, want)
    pairs = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)
    torch.testing.assert_close(
        gk.expert_mlp(x, weight, expert, pairs, down, *rest, interleaved=True), want
    )
    wide = gk.expert_mlp(x, weight, expert.long(), up, down, *rest)
    assert torch.equal(wide, want)


def test_expanded_gradients_and_strided_outputs() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build(torch.float64)
    want = _gradients(gk.expert_mlp, args, {}, torch.full_like(args[0], 2.0))
    expanded = _gradients(gk.expert_mlp, args, {}, torch.tensor(2.0).double().expand(args[0].shape))
    turned = _gradients(gk.expert_mlp, args, {}, torch.full_like(args[0].mT, 2.0).mT)
    for a, b, c in zip(want, expanded, turned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    grad_TD = torch.ones_like(args[0])

    def checkpointed(*a: Any) -> Tensor:
        out: Tensor = checkpoint(gk.expert_mlp, *a, use_reentrant=False)
        return out

    got, want = (_gradients(f, args, {}, grad_TD) for f in (checkpointed, gk.expert_mlp))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_second_derivative() -> None:
    args, _ = cases.ExpertMlpCase().build()
    args[0].requires_grad_()
    (grad_TD,) = torch.autograd.grad(gk.expert_mlp(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp can be differentiated once, not twice"):
        grad_TD.sum().backward()


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_without_gradients_nothing_is_kept(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    args[3].requires_grad_()
    with torch.inference_mode(), gk.profiling.record() as counts:
        out_TD = gk.expert_mlp(*args, backend=backend)
    assert ("expert_mlp", backend) in counts.table
    assert "expert_mlp_train" not in {name for name, _ in counts.table}
    with gk.profiling.record() as counts:
        trained_TD = gk.expert_mlp(*args, backend=backend)
    assert "expert_mlp" not in {name for name, _ in counts.table}
    assert ("expert_mlp_train", backend) in counts.table
    torch.testing.assert_close(out_TD.clone(), trained_TD.detach())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_opcheck(backend: str, grad: bool) -> None:
    args, options = cases.ExpertMlpCase("geglu", bias=True, frozen=True).build()
    for a in args:
        if a.is_floating_point():
            a.requires_grad_(grad)
    options["backend"] = backend
    torch.library.opcheck(torch.ops.gose.expert_mlp.default, args, options)
    if grad:
        torch.library.opcheck(torch.ops.gose.expert_mlp_train.default, args, options)


@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_opcheck_backward(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(bias=True, frozen=True).build()
    pre_NH = expert_mlp_train_reference(*args)[1]
    torch.library.opcheck(
        torch.ops.gose.expert_mlp_backward.default,
        (*args, pre_NH, torch.ones_like(args[0])),
        {"need_bias_up": True, "backend": backend},
    )


def test_autocast_casts_tokens_and_weights_but_not_gates() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    leaves = [a.requires_grad_() for i, a in enumerate(args[:7]) if i != 2]
    with torch.autocast("cpu", torch.bfloat16):
        out_TD = gk.expert_mlp(*args)
    x, weight, expert, *weights = (a if a is None else a.detach() for a in args)
    half = [a if a is None else a.bfloat16() for a in weights]
    assert torch.equal(out_TD, gk.expert_mlp(x.bfloat16(), weight, expert, *half))
    out_TD.float().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in leaves)


def test_compiles_whole_with_gradients() -> None:
    args, options = cases.ExpertMlpCase("swiglu_oai", bias=True, frozen=True).build()
    inputs = [a.requires_grad_() for a in args if a.is_floating_point()]

    def loss(*a: Tensor) -> Tensor:
        out: Tensor = gk.expert_mlp(*a, **options)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args)
    eager = loss(*args)
    torch.testing.assert_close(compiled, eager)
    for got, want in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


def _call(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Valid arguments (T=3, K=2, E=4, D=5, F=6) with some changed."""
    tensors = {
        "x_TD": torch.zeros(3, 5),
        "weight_TK": torch.zeros(3, 2),
        "expert_TK": torch.zeros(3, 2, dtype=torch.int32),
        "w_up_EHD": torch.zeros(4, 12, 5),
        "w_down_EDF": torch.zeros(4, 5, 6),
        "bias_up_EH": torch.zeros(4, 12),
        "bias_down_ED": torch.zeros(4, 5),
        "frozen_E": torch.zeros(4, dtype=torch.bool),
        "frozen_EF": torch.zeros(4, 6, dtype=torch.bool),
    }
    options = {k: v for k, v in changes.items() if k not in tensors}
    return tuple({**tensors, **changes}[k] for k in tensors), options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "activation must be one of swiglu, .*relu2, got 'swish'"),
        (
            {"activation": "gelu", "interleaved": True},
            "interleaved must be unset for gelu, got True",
        ),
        ({"activation": "gelu", "limit": 7.0}, "limit must be unset for gelu, got 7.0"),
        ({"limit": 0.0}, "limit must be above 0, got 0.0"),
        ({"x_TD": torch.zeros(5)}, r"x_TD must be of 2 dimensions, got shape \(5,\)"),
        ({"x_TD": torch.zeros(3, 5).int()}, "x_TD must be floating point, got torch.int32"),
        ({"w_up_EHD": torch.zeros(12, 5)}, "w_up_EHD must be of 3 dimensions, got shape"),
        ({"w_down_EDF": torch.zeros(5, 6)}, "w_down_EDF must be of 3 dimensions, got shape"),
        (
            {"activation": "silu"},
            r"w_up_EHD must be of shape \(4, 6, 5\) with transposed=False, activation='silu', "
            r"to fit w_down_EDF, got \(4, 12, 5\)",
        ),
        (
            {"transposed": True},
            r"w_up_EHD must be of shape \(4, 6, 10\) with transposed=True, activation='swiglu', "
            r"to fit w_down_EDF, got \(4, 12, 5\)",
        ),
        ({"x_TD": torch.zeros(3, 7)}, "x_TD must be of width D = 5 as w_down_EDF .*, got 7"),
        ({"weight_TK": torch.zeros(6)}, r"weight_TK must be of shape \[T=3, K\], got \(6,\)"),
        (
            {"expert_TK": torch.zeros(3, 1).int()},
            r"expert_TK must be of shape \(3, 2\), got \(3, 1\)",
        ),
        ({"bias_up_EH": torch.zeros(4, 6)}, r"bias_up_EH must be of shape \(4, 12\), got \(4, 6\)"),
        ({"bias_down_ED": torch.zeros(5)}, r"bias_down_ED must be of shape \(4, 5\), got \(5,\)"),
        ({"frozen_E": torch.zeros(3).bool()}, r"frozen_E must be of shape \(4,\), got \(3,\)"),
        (
            {"frozen_EF": torch.zeros(4, 12).bool()},
            r"frozen_EF must be of shape \(4, 6\), got \(4, 12\)",
        ),
        (
            {"weight_TK": torch.zeros(3, 2).half()},
            "weight_TK must be torch.float32 for x_TD of torch.float32, got torch.float16",
        ),
        (
            {"w_up_EHD": torch.zeros(4, 12, 5).half()},
            "w_up_EHD must be torch.float32 as x_TD, got torch.float16",
        ),
        (
            {"bias_down_ED": torch.zeros(4, 5).double()},
            "bias_down_ED must be torch.float32 as x_TD, got torch.float64",
        ),
        ({"frozen_E": torch.zeros(4)}, "frozen_E must be bool, got torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_refusals(changes: dict[str, Any], message: str, backend: str) -> None:
    args, options = _call(**changes)
    with pytest.raises(ValueError, match=f"expert_mlp: {message}"):
        gk.expert_mlp(*args, **options, backend=backend)


@pytest.mark.parametrize("expert", [-1, 5])
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_refuses_an_expert_that_does_not_exist(expert: int, backend: str) -> None:
    args, _ = _call(expert_TK=torch.full((3, 2), expert, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expert_TK must hold experts in \[0, num_experts=4\]"):
        gk.expert_mlp(*args, backend=backend)


@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_backward_refusals(backend: str) -> None:
    args, _ = _call()
    backward = torch.ops.gose.expert_mlp_backward
    with pytest.raises(ValueError, match=r"pre_NH must be of shape \(6, 12\), got \(6, 6\)"):
        backward(*args, torch.zeros(6, 6), torch.zeros(3, 5), backend=backend)
    with pytest.raises(ValueError, match=r"grad_TD must be of shape \(3, 5\), got \(5,\)"):
        backward(*args, torch.zeros(6, 12), torch.zeros(5), backend=backend)
    with pytest.raises(ValueError, match=r"grad_TD must be torch\.float32 as x_TD, got"):
        backward(*args, torch.zeros(6, 12), torch.zeros(3, 5).half(), backend=backend)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_width_that_packs_to_the_same_size_is_refused(transposed: bool) -> None:
    """30 and 32 columns fill the same panels; the first, right call keeps the packed weights."""
    x_TD, weight_TK = torch.randn(5, 32), torch.rand(5, 2)
    expert_TK = torch.zeros(5, 2, dtype=torch.int32)
    up, down = torch.randn(3, 96, 32), torch.randn(3, 32, 48)
    weights = (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)
    gk.expert_mlp(x_TD, weight_TK, expert_TK, *weights, transposed=transposed)
    with pytest.raises(ValueError, match="x_TD must be of width D = 32"):
        gk.expert_mlp(x_TD[:, :30], weight_TK, expert_TK, *weights, transposed=transposed)
