"""grouped_gemm against its formula in float64, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gose_kernels as gk
from gose_kernels.ops.grouped_gemm import (
    grouped_gemm_backward_reference,
    grouped_gemm_reference,
)
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def _double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if a is not None and a.is_floating_point() else a for a in args)


def _oracle(
    x_ND: Tensor, w_EFD: Tensor, offset_E1: Tensor, bias_EF: Tensor | None, transposed: bool
) -> Tensor:
    """The contract's index loop, a row at a time."""
    w_EFD = w_EFD.mT if transposed else w_EFD
    y_NF = x_ND.new_zeros(x_ND.shape[0], w_EFD.shape[1])
    for e in range(w_EFD.shape[0]):
        for n in range(int(offset_E1[e]), int(offset_E1[e + 1])):
            y_NF[n] = (w_EFD[e] * x_ND[n]).sum(dim=1) + (0 if bias_EF is None else bias_EF[e])
    return y_NF


def _backward_oracle(
    grad_NF: Tensor, x_ND: Tensor, offset_E1: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    E = offset_E1.numel() - 1
    grad_w_EFD = x_ND.new_zeros(E, grad_NF.shape[1], x_ND.shape[1])
    grad_bias_EF = x_ND.new_zeros(E, grad_NF.shape[1])
    for e in range(E):
        for n in range(int(offset_E1[e]), int(offset_E1[e + 1])):
            grad_w_EFD[e] += grad_NF[n, :, None] * x_ND[n, None, :]
            grad_bias_EF[e] += grad_NF[n]
    return grad_w_EFD.mT if transposed else grad_w_EFD, grad_bias_EF


def _grad(case: cases.GroupedGemmCase, dtype: torch.dtype) -> Tensor:
    """Output gradients, NaN in the rows that belong to no group."""
    grad_NF = torch.randn(case.N, case.F, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_NF[case.N - case.unused :] = torch.nan
    return grad_NF


@pytest.mark.parametrize("case", cases.grouped_gemm, ids=str)
def test_reference_is_the_formula(case: cases.GroupedGemmCase) -> None:
    args, options = case.build(torch.float64)
    x_ND, _, offset_E1, _ = args
    want = _oracle(*args, **options)
    torch.testing.assert_close(grouped_gemm_reference(*args, **options), want)
    grad_NF = _grad(case, torch.float64)
    got = grouped_gemm_backward_reference(grad_NF, x_ND, offset_E1, bias=True, **options)
    for one, wanted in zip(got, _backward_oracle(grad_NF, x_ND, offset_E1, **options), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.grouped_gemm, ids=str)
@pytest.mark.parametrize("backend", backends_of("grouped_gemm", interpreted=12))
def test_matches_reference(case: cases.GroupedGemmCase, dtype: torch.dtype, backend: str) -> None:
    args, options = case.build(dtype)
    got = gk.grouped_gemm(*args, **options, backend=backend)
    truth = _oracle(*_double(args), **options)
    assert_chain_close_to_truth(got, grouped_gemm_reference(*args, **options), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.grouped_gemm, ids=str)
@pytest.mark.parametrize("backend", backends_of("grouped_gemm_backward", interpreted=12))
def test_backward_matches_reference(
    case: cases.GroupedGemmCase, dtype: torch.dtype, backend: str
) -> None:
    (x_ND, _, offset_E1, _), options = case.build(dtype)
    args = (_grad(case, dtype), x_ND, offset_E1)
    got = torch.ops.gose.grouped_gemm_backward(*args, bias=True, **options, backend=backend)
    same = grouped_gemm_backward_reference(*args, bias=True, **options)
    for one, own, truth in zip(got, same, _backward_oracle(*_double(args), **options), strict=True):
        assert_chain_close_to_truth(one, own, truth)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 2.6e-3)])
def test_reference_rounds_once(dtype: torch.dtype, allowed: float) -> None:
    args, options = cases.GroupedGemmCase(256, 5, 64, 512, bias=True).build(dtype)
    truth = _oracle(*_double(args), **options)
    error = (grouped_gemm_reference(*args, **options) - truth).norm() / truth.norm()
    assert error <= allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_exact(transposed: bool, bias: bool) -> None:
    """First and second derivatives by finite differences, an empty group and unused rows too."""
    case = cases.GroupedGemmCase(9, 4, 3, 2, "empty-experts", bias=bias, transposed=transposed)
    (x_ND, w_EFD, offset_E1, bias_EF), options = case.build(torch.float64)
    inputs = [t.requires_grad_() for t in (x_ND, w_EFD, bias_EF) if t is not None]

    def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = gk.grouped_gemm(x, w, offset_E1.clamp_max(7), b, **options)
        return y

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("backend", backends_of("grouped_gemm"))
def test_what_belongs_to_no_group_is_not_read(backend: str) -> None:
    """NaN in unused rows and in the weights of an empty group reaches nothing."""
    case = cases.GroupedGemmCase(10, 4, 6, 8, "empty-experts", unused=3, bias=True)
    (x_ND, w_EFD, offset_E1, bias_EF), _ = case.build()
    assert bias_EF is not None
    assert int(offset_E1[1]) == int(offset_E1[2])
    w_EFD[1], bias_EF[1] = torch.nan, torch.nan
    inputs = [t.requires_grad_() for t in (x_ND, w_EFD, bias_EF)]
    y_NF = gk.grouped_gemm(x_ND, w_EFD, offset_E1, bias_EF, backend=backend)
    assert torch.equal(y_NF[7:], torch.zeros(3, 6))
    assert y_NF.isfinite().all()
    grad_NF = torch.ones_like(y_NF)
    grad_NF[7:] = torch.nan
    grad_x_ND, grad_w_EFD, grad_bias_EF = torch.autograd.grad(y_NF, inputs, grad_NF)
    assert grad_x_ND.isfinite().all()
    assert grad_w_EFD.isfinite().all()
    assert torch.equal(grad_x_ND[7:], torch.zeros(3, 8))
    assert torch.equal(grad_w_EFD[1], torch.zeros(6, 8))
    assert torch.equal(grad_bias_EF[1], torch.zeros(6))


def test_only_needed_gradients_are_made() -> None:
    (x_ND, w_EFD, offset_E1, bias_EF), _ = cases.GroupedGemmCase(9, 2, 4, 5, bias=True).build()
    y_NF = gk.grouped_gemm(x_ND, w_EFD.requires_grad_(), offset_E1, bias_EF)
    with gk.profiling.record() as counts:
        y_NF.sum().backward()
    assert {name for name, _ in counts.table} == {"grouped_gemm_backward"}
    grad_w, grad_bias = torch.ops.gose.grouped_gemm_backward(torch.ones(9, 4), x_ND, offset_E1)
    assert grad_bias.shape == (0,)
    torch.testing.assert_close(grad_w, w_EFD.grad)


def test_declared_work_is_the_work() -> None:
    args, options = cases.GroupedGemmCase(40, 3, 7, 11).build()
    with FlopCounterMode(display=False) as counter:
        grouped_gemm_reference(*args, **options)
    cost = gk.grouped_gemm.cost_of(*args, **options)
    assert cost.flops == counter.get_total_flops() == 2 * 40 * 7 * 11
    assert cost.bytes == 4 * (40 * 11 + 3 * 7 * 11 + 40 * 7 + 4)
    backward = gk.OPS["grouped_gemm_backward"].cost_of(torch.ones(40, 7), args[0], args[2])
    assert backward.flops == cost.flops


@pytest.mark.parametrize("backend", backends_of("grouped_gemm"))
def test_opcheck(backend: str) -> None:
    case = cases.GroupedGemmCase(9, 3, 4, 5, bias=True, unused=2)
    (x_ND, w_EFD, offset_E1, bias_EF), _ = case.build()
    assert bias_EF is not None
    x_ND.nan_to_num_()
    args = (x_ND.requires_grad_(), w_EFD.requires_grad_(), offset_E1, bias_EF.requires_grad_())
    torch.library.opcheck(torch.ops.gose.grouped_gemm.default, args, {"backend": backend})


@pytest.mark.parametrize("backend", backends_of("grouped_gemm_backward"))
def test_opcheck_backward(backend: str) -> None:
    x_ND, _, offset_E1, _ = cases.GroupedGemmCase(9, 3, 4, 5).build()[0]
    args = (torch.ones(9, 4, requires_grad=True), x_ND.requires_grad_(), offset_E1)
    torch.library.opcheck(
        torch.ops.gose.grouped_gemm_backward.default, args, {"bias": True, "backend": backend}
    )


@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_one_group_is_a_linear_layer_and_groups_do_not_meet(N: int, E: int, seed: int) -> None:
    """Rows of a group do not depend on the others; a single group is torch's own product."""
    random = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, 6, generator=random, dtype=torch.float64)
    w_EFD = torch.randn(E, 5, 6, generator=random, dtype=torch.float64)
    edge = torch.randint(0, N + 1, (E - 1,), generator=random).sort().values
    offset_E1 = torch.cat([torch.zeros(1), edge, torch.full((1,), N)]).int()
    whole = gk.grouped_gemm(x_ND, w_EFD, offset_E1)
    for e in range(E):
        rows = slice(int(offset_E1[e]), int(offset_E1[e + 1]))
        torch.testing.assert_close(whole[rows], x_ND[rows] @ w_EFD[e].mT)


_X, _WEIGHT, _OFFSET = torch.zeros(6, 4), torch.zeros(2, 5, 4), torch.tensor([0, 3, 6]).int()


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((_X[0], _WEIGHT, _OFFSET), {}, r"x_ND must have 2 dimensions, got shape \(4,\)"),
        ((_X, _WEIGHT[0], _OFFSET), {}, r"w_EFD must have 3 dimensions, got shape \(5, 4\)"),
        (
            (_X, _WEIGHT, _OFFSET),
            {"transposed": True},
            r"w_EDF must have D = 4 as x_ND, got shape \(2, 5, 4\) with transposed=True",
        ),
        (
            (_X, _WEIGHT.half(), _OFFSET),
            {},
            "w_EFD must be torch.float32 as x_ND, got torch.float16",
        ),
        (
            (_X, _WEIGHT, _OFFSET.long()),
            {},
            r"offset_E1 must be int32 of shape \[E \+ 1\], got torch.int64 of shape \(3,\)",
        ),
        ((_X, _WEIGHT, _OFFSET[:2]), {}, r"offset_E1 must have E \+ 1 = 3 entries, got 2"),
        (
            (_X, _WEIGHT, _OFFSET, torch.zeros(2, 4)),
            {},
            r"bias_EF must have shape \(2, 5\), got \(2, 4\)",
        ),
        (
            (_X, _WEIGHT, _OFFSET, torch.zeros(2, 5).double()),
            {},
            "bias_EF must be torch.float32 as x_ND, got torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("backend", backends_of("grouped_gemm"))
def test_refusals(
    args: tuple[Tensor, ...], options: dict[str, Any], message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=f"grouped_gemm: {message}"):
        gk.grouped_gemm(*args, **options, backend=backend)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.zeros(5, 5), _X, _OFFSET),
            r"grad_NF and x_ND must be matrices with as many rows, "
            r"got shapes \(5, 5\) and \(6, 4\)",
        ),
        ((_X.half(), _X, _OFFSET), "grad_NF must be torch.float32 as x_ND, got torch.float16"),
        ((_X, _X, _OFFSET[None]), r"offset_E1 must be int32 of shape \[E \+ 1\], got torch.int32"),
    ],
)
@pytest.mark.parametrize("backend", backends_of("grouped_gemm_backward"))
def test_backward_refusals(args: tuple[Tensor, ...], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"grouped_gemm_backward: {message}"):
        torch.ops.gose.grouped_gemm_backward(*args, backend=backend)


@pytest.mark.parametrize("offset", [[1, 4, 7], [0, 4, 3]])
@pytest.mark.parametrize("backend", backends_of("grouped_gemm", "cpu", "torch"))
def test_refuses_offsets_that_are_none(offset: list[int], backend: str) -> None:
    offset_E1 = torch.tensor(offset, dtype=torch.int32)
    message = rf"offset_E1 must ascend from 0 to at most N=6, got \[{str(offset)[1:-1]}\]"
    with pytest.raises(ValueError, match=f"grouped_gemm: {message}"):
        gk.grouped_gemm(_X, _WEIGHT, offset_E1, backend=backend)
    with pytest.raises(ValueError, match=f"grouped_gemm_backward: {message}"):
        torch.ops.gose.grouped_gemm_backward(_X, _X, offset_E1, backend=backend)


def test_autocast_casts_tokens_and_weights() -> None:
    (x_ND, w_EFD, offset_E1, bias_EF), _ = cases.GroupedGemmCase(20, 3, 6, 8, bias=True).build()
    w_EFD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y_NF = gk.grouped_gemm(x_ND, w_EFD, offset_E1, bias_EF)
    half = [t.bfloat16() for t in (x_ND, w_EFD.detach(), bias_EF) if t is not None]
    assert torch.equal(y_NF, gk.grouped_gemm(half[0], half[1], offset_E1, half[2]))
    y_NF.float().sum().backward()
    assert w_EFD.grad is not None
    assert w_EFD.grad.dtype == torch.float32


def test_compiles_whole_with_gradients() -> None:
    (x_ND, w_EFD, offset_E1, bias_EF), _ = cases.GroupedGemmCase(20, 3, 6, 8, bias=True).build()
    assert bias_EF is not None
    inputs = [t.requires_grad_() for t in (x_ND, w_EFD, bias_EF)]

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y: Tensor = gk.grouped_gemm(x, w, offset_E1, b)
        return y.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    eager = loss(*inputs)
    torch.testing.assert_close(compiled, eager)
    for got, want in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(got, want)
