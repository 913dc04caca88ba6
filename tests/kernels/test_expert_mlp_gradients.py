"""The gradients of expert_mlp against those of its formula in float64, on every backend here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
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
from tests.expert_mlp_oracle import (
    DTYPES,
    NAMES,
    REFERENCE_ERROR,
    freeze,
    gradients_of,
    output_grad,
    true_gradients,
    underflows,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward", interpreted=10))
def test_gradients_match_reference(
    case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str
) -> None:
    args, options = case.build(dtype)
    grad_TD = output_grad(case, dtype)
    got = gradients_of(gk.expert_mlp, args, {**options, "backend": backend}, grad_TD)
    same = gradients_of(gk.expert_mlp, args, {**options, "backend": "torch"}, grad_TD)
    truths = true_gradients(case, args, options, grad_TD)
    for one, own, truth in zip(got, same, truths, strict=True):
        assert_chain_close_to_truth(
            one, own, truth, gradient=True, rounded_parts=backend == "triton"
        )
        # pre rounds across a clamp's edge now and then: one element of a derivative jumps.
        if not underflows(case, dtype):
            assert (own - truth).norm() <= 4 * REFERENCE_ERROR[dtype] * truth.norm()


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


@pytest.mark.parametrize("case", [c for c in cases.expert_mlp if c.frozen], ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_freezing_zeroes_its_gradients_and_no_other(
    case: cases.ExpertMlpCase, backend: str
) -> None:
    # The compiled kernels have no float64.
    dtype = torch.float64 if backend == "torch" else torch.float32
    args, options = case.build(dtype)
    grad_TD = output_grad(case, dtype)
    options = {**options, "backend": backend}
    got = gradients_of(gk.expert_mlp, args, options, grad_TD)
    free = gradients_of(gk.expert_mlp, (*args[:7], None, None), options, grad_TD)
    assert torch.equal(gk.expert_mlp(*args, **options), gk.expert_mlp(*args[:7], **options))
    for a, b in zip(got[:2], free[:2], strict=True):
        assert torch.equal(a, b)
    freeze(case, args, free)
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


def test_expanded_gradients_and_strided_outputs() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build(torch.float64)
    want = gradients_of(gk.expert_mlp, args, {}, torch.full_like(args[0], 2.0))
    expanded = gradients_of(
        gk.expert_mlp, args, {}, torch.tensor(2.0).double().expand(args[0].shape)
    )
    turned = gradients_of(gk.expert_mlp, args, {}, torch.full_like(args[0].mT, 2.0).mT)
    for a, b, c in zip(want, expanded, turned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    grad_TD = torch.ones_like(args[0])

    def checkpointed(*a: Any) -> Tensor:
        out: Tensor = checkpoint(gk.expert_mlp, *a, use_reentrant=False)
        return out

    got, want = (gradients_of(f, args, {}, grad_TD) for f in (checkpointed, gk.expert_mlp))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_second_derivative() -> None:
    args, _ = cases.ExpertMlpCase().build()
    args[0].requires_grad_()
    (grad_TD,) = torch.autograd.grad(gk.expert_mlp(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp can be differentiated once, not twice"):
        grad_TD.sum().backward()


@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_opcheck_backward(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(bias=True, frozen=True).build()
    pre_NH = expert_mlp_train_reference(*args)[1]
    torch.library.opcheck(
        torch.ops.gose.expert_mlp_backward.default,
        (*args, pre_NH, torch.ones_like(args[0])),
        {"need_bias_up": True, "backend": backend},
    )


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
