"""Weight gradients that are added to what is there: the sum, once rounded; nothing else touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import gose_kernels as gk
from gose_kernels import memory
from tests import cases
from tests.checks import backends_of
from tests.expert_mlp_oracle import DTYPES, NAMES, REFERENCE_ERROR, output_grad, true_gradients

_FUSED = pytest.mark.parametrize("backend", backends_of("expert_mlp_backward_add_"))
# A block of rows beyond any cache, which an interpreter would take minutes for.
_LARGE = cases.ExpertMlpCase(T=64, K=2, E=3, D=1024, F=1024)
# Sizes that nothing divides; frozen; unused; turned.
_CASES = [
    *[c for c in cases.expert_mlp if c.frozen or c.kind in ("one", "unused")][::3],
    cases.ExpertMlpCase("geglu", T=5, E=9, options={"transposed": True}),
]


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, weights as parameters, contiguous."""
    return [
        Parameter(a.contiguous()) if i in (3, 4) and a is not None else a
        for i, a in enumerate(args)
    ]


def _step(
    args: list[Any], options: dict[str, Any], grad_TD: Tensor, op: Callable[..., Tensor]
) -> None:
    op(*args, **options).backward(grad_TD)


def _check_sum(case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str) -> None:
    given, options = case.build(dtype)
    args, grad_TD = _leaves(given), output_grad(case, dtype)
    before = [torch.randn(args[i].shape).to(dtype) for i in (3, 4)]
    for i, b in zip((3, 4), before, strict=True):
        args[i].grad = b.clone()
    held, versions = [args[i].grad for i in (3, 4)], [args[i].grad._version for i in (3, 4)]
    with memory.fused_grad_accumulation():
        _step(args, {**options, "backend": backend}, grad_TD, gk.expert_mlp)
    truths = true_gradients(case, given, options, grad_TD)
    own = [torch.zeros_like(b) for b in before]  # by the usual way, from nothing
    for i, o in zip((3, 4), own, strict=True):
        args[i].grad = o
    _step(args, {**options, "backend": backend}, grad_TD, gk.expert_mlp)
    for i, at in enumerate((2, 3)):
        assert held[i]._version > versions[i]
        truth = before[i].double() + truths[at]
        scale = REFERENCE_ERROR[dtype] * (before[i].double().norm() + truths[at].norm())
        assert (held[i].double() - truth).norm() <= 4 * scale
        untouched = own[i] == 0
        assert torch.equal(held[i][untouched], before[i][untouched])


@_FUSED
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_the_sum_of_both(case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str) -> None:
    _check_sum(case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward_add_", "cpu"))
def test_the_sum_of_a_large_layer(backend: str, dtype: torch.dtype) -> None:
    _check_sum(_LARGE, dtype, backend)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    if gk.native.why_not() is not None:
        pytest.skip(gk.native.why_not())
    args, options = _LARGE.build(torch.bfloat16)
    leaves, grad_TD = _leaves(args), output_grad(_LARGE, torch.bfloat16)
    found, before = [], torch.get_num_threads()
    for n in (1, threads):
        torch.set_num_threads(n)
        for i in (3, 4):
            leaves[i].grad = torch.full_like(leaves[i], 0.3)
        with memory.fused_grad_accumulation():
            _step(leaves, options, grad_TD, gk.expert_mlp)
        found.append([leaves[i].grad for i in (3, 4)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", backends_of("grouped_gemm_backward_add_"))
def test_grouped_gemm(backend: str, transposed: bool, dtype: torch.dtype) -> None:
    N, E, D, F = 37, 4, 33, 65
    x_ND, grad_NF = torch.randn(N, D).to(dtype), torch.randn(N, F).to(dtype)
    w = Parameter(torch.randn(E, *((D, F) if transposed else (F, D))).to(dtype))
    bias = Parameter(torch.randn(E, F).to(dtype))
    offset_E1 = torch.tensor([0, 11, 11, 36, N], dtype=torch.int32)
    before = torch.randn_like(w)
    w.grad, bias.grad = before.clone(), None
    with memory.fused_grad_accumulation():
        gk.grouped_gemm(x_ND, w, offset_E1, bias, transposed=transposed, backend=backend).backward(
            grad_NF
        )
    truth = before.double()
    for e in range(E):
        rows = slice(int(offset_E1[e]), int(offset_E1[e + 1]))
        made = grad_NF[rows].double().mT @ x_ND[rows].double()
        truth[e] += made.mT if transposed else made
    assert (w.grad.double() - truth).norm() <= 2 * REFERENCE_ERROR[dtype] * truth.norm()
    assert torch.equal(w.grad[1], before[1])
    assert bias.grad is not None and bias.grad.shape == bias.shape


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that a backward runs from now on."""
    found: list[str] = []

    class Watch:
        def call(self, op: Any, picked: Any, args: Any, options: Any) -> Any:
            found.append(op.name)
            return picked.run(*args, **options)

    from gose_kernels import registry

    monkeypatch.setattr(registry, "observers", [Watch()])
    return found


def _small() -> tuple[list[Any], dict[str, Any]]:
    args, options = cases.ExpertMlpCase().build()
    return _leaves(args), options


def test_micro_batches_of_a_layer_are_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = gk.MoE(width=12, hidden=9, num_experts=5, top_k=2)
    batches = torch.randn(3, 13, 12).unbind()
    layer(torch.cat(batches))[0].sum().backward()
    whole = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    ran = _calls(monkeypatch)
    for batch in batches:
        with memory.fused_grad_accumulation():
            layer(batch)[0].sum().backward()
    assert ran.count("expert_mlp_backward") == 1 and ran.count("expert_mlp_backward_add_") == 2
    for name, p in layer.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name])


@pytest.mark.parametrize("what", ["outside", "hook", "post hook", "other dtype", "create_graph"])
def test_where_gradients_take_their_usual_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = _small()
    for i in (3, 4):
        args[i].grad = torch.zeros_like(args[i])
    if what == "hook":
        args[3].register_hook(lambda g: 2 * g)
    elif what == "post hook":
        args[4].register_post_accumulate_grad_hook(lambda p: None)
    ran = _calls(monkeypatch)
    out = gk.expert_mlp(*args, **options)
    if what == "outside":
        out.sum().backward()
    elif what == "create_graph":
        usual = pytest.warns(UserWarning, match="create_graph")
        with memory.fused_grad_accumulation(), usual:
            out.sum().backward(create_graph=True)
    elif what == "other dtype":
        doubled = [a.double() if i in (0, 1, 3, 4) else a for i, a in enumerate(args)]
        with memory.fused_grad_accumulation():
            gk.expert_mlp(*doubled, **options).sum().backward()
    else:
        with memory.fused_grad_accumulation():
            out.sum().backward()
    assert "expert_mlp_backward" in ran and "expert_mlp_backward_add_" not in ran
    assert all(bool(args[i].grad.any()) for i in (3, 4))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda up: up.double(), "grad_up must be contiguous, torch.float32 of shape"),
        (lambda up: up[:, 1:], "grad_up must be contiguous"),
        (lambda up: up.mT.contiguous().mT, "grad_up must be contiguous"),
    ],
)
@_FUSED
def test_wrong_gradients_are_refused_untouched(
    backend: str, wrong: Callable[[Tensor], Tensor], words: str
) -> None:
    args, options = cases.ExpertMlpCase().build()
    pre_NH = torch.ops.gose.expert_mlp_train(*args, **options)[1]
    up, down = wrong(torch.ones_like(args[3])), torch.ones_like(args[4])
    with pytest.raises(ValueError, match=words):
        gk.OPS["expert_mlp_backward_add_"](
            *args, pre_NH, torch.ones_like(args[0]), up, down, **options, backend=backend
        )
    assert bool((up == 1).all()) and bool((down == 1).all())
