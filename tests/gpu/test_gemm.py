"""The expert GEMMs as compiled for sm_80, in the PTX machine: right, without a fault, with the same
bits in every order of blocks, and counting what their closed forms say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_gemm
from gose_kernels.ops.expert_mlp import (
    BackwardCall,
    MlpCall,
    expert_mlp_backward_reference,
    expert_mlp_train_reference,
)
from gose_kernels.ops.grouped_gemm import (
    grouped_gemm_backward_reference,
    grouped_gemm_reference,
)
from tests import cases
from tests.checks import assert_chain_close_to_truth
from tests.expert_mlp_oracle import double, output_grad
from tests.gpu import triton_host
from tests.gpu.gemm_ops import OPS
from tests.gpu.ops import same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MLP = cases.ExpertMlpCase


def _ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _check(got: Any, same: Any, truth: Any, *, gradient: bool = False) -> None:
    parts = ((p,) if isinstance(p, Tensor) else p for p in (got, same, truth))
    for g, s, t in zip(*parts, strict=True):
        # Three products of tf32 leave some ulp of an element that outweighs the others.
        slack = t.abs() * 4 * 2.0**-23 if g.dtype == torch.float32 else 0 * t
        moved = t + (g.double() - t).clamp(-slack, slack).nan_to_num(0.0, 0.0, 0.0)
        assert_chain_close_to_truth(g, s, moved, gradient=gradient)


def _in_any_order(launcher: Any, *args: Any) -> Any:
    got = triton_host.run_on_ptx(launcher, *args, count=False)[0]
    again = triton_host.run_on_ptx(launcher, *args, count=False, order="reverse")[0]
    assert same_bits(got, again)
    return got


# One for each number of rows of a tile: 16, 32, 64, 128; empty groups, rows of none, odd sizes.
GEMMS = [
    cases.GroupedGemmCase(37, 5, 19, 23, "empty-experts", bias=True, unused=5),
    cases.GroupedGemmCase(40, 3, 136, 64, transposed=True),
    cases.GroupedGemmCase(130, 2, 24, 72, bias=True, strided=True),
    cases.GroupedGemmCase(700, 1, 40, 80, unused=3),
]


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_grouped_gemm(case: cases.GroupedGemmCase, dtype: torch.dtype) -> None:
    args, options = case.build(dtype)
    got = _in_any_order(lambda *a: OPS["grouped_gemm"].triton("grouped_gemm")(*a, **options), *args)
    truth = grouped_gemm_reference(*double(args), **options)
    _check(got, grouped_gemm_reference(*args, **options), truth)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GEMMS[:3], ids=str)
def test_grouped_gemm_backward(case: cases.GroupedGemmCase, dtype: torch.dtype) -> None:
    (x_ND, _, offset_E1, _), options = case.build(dtype)
    grad_NF = torch.randn(case.N, case.F, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_NF[case.N - case.unused :] = torch.nan
    args = (grad_NF, x_ND, offset_E1)
    launcher = OPS["grouped_gemm_backward"].triton("grouped_gemm_backward")
    got = _in_any_order(lambda *a: launcher(*a, bias=True, **options), *args)
    truth = grouped_gemm_backward_reference(*double(args), bias=True, **options)
    same = grouped_gemm_backward_reference(*args, bias=True, **options)
    _check(got, same, truth)


# The three forms of pre, every phi, unused slots, frozen experts and units, strided rows.
LAYERS = [
    MLP("swiglu", T=9, D=20, F=12, kind="unused", bias=True, frozen=True),
    MLP("swiglu_oai", T=9, D=16, F=8, bias=True, options={"transposed": True, "interleaved": True}),
    MLP("gelu", T=9, D=16, F=24, kind="empty-experts", strided=True, frozen=True),
    MLP("geglu_tanh", T=40, K=2, E=2, D=16, F=24, scale=4, options={"limit": 1.5}),
    MLP("relu2", T=70, K=1, E=1, D=8, F=8, kind="one-expert", bias=True),
]


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_forward_and_backward(case: cases.ExpertMlpCase, dtype: torch.dtype) -> None:
    args, options = case.build(dtype)
    call = MlpCall(*args, **options)
    train = OPS["expert_mlp_train"].triton("expert_mlp_train")
    got = _in_any_order(train, call)
    same = expert_mlp_train_reference(*args, **options)
    truth = expert_mlp_train_reference(*double(args), **options)
    _check(got, same, truth)
    grad_TD = output_grad(case, dtype)
    needs = {"need_bias_up": case.bias, "need_bias_down": case.bias}
    back = BackwardCall(got[1], grad_TD, **needs)
    gradients = _in_any_order(OPS["expert_mlp_backward"].triton("expert_mlp_backward"), call, back)
    own = expert_mlp_backward_reference(*args, same[1], grad_TD, **options, **needs)
    exact = expert_mlp_backward_reference(
        *double(args), truth[1], grad_TD.double(), **options, **needs
    )
    _check(gradients, own, exact, gradient=True)


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("case", LAYERS[:3], ids=str)
def test_inference_gives_the_bits_of_training(case: cases.ExpertMlpCase) -> None:
    args, options = case.build(torch.bfloat16)
    call = MlpCall(*args, **options)
    train = OPS["expert_mlp_train"].triton("expert_mlp_train")
    kept = triton_host.run_on_ptx(train, call, count=False)[0][0]
    infer = OPS["expert_mlp_train"].triton("expert_mlp")
    assert torch.equal(triton_host.run_on_ptx(infer, call, count=False)[0], kept)


def _balanced(N: int, E: int, F: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    offset_E1 = torch.arange(0, N + 1, N // E, dtype=torch.int32)
    x_ND, w_EFD = (torch.randn(s, generator=random).to(dtype) for s in ((N, D), (E, F, D)))
    return x_ND, w_EFD, offset_E1


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("rows", [16, 40, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_ids)
def test_closed_forms_are_what_is_counted(dtype: torch.dtype, rows: int) -> None:
    """Tensor-core FLOPs exactly; bytes, each once, but for the map of tiles."""
    E, F, D = 2, 128, 256
    x_ND, w_EFD, offset_E1 = args = _balanced(E * rows, E, F, D, dtype)
    launcher = OPS["grouped_gemm"].triton("grouped_gemm")
    _, counts = triton_host.run_on_ptx(launcher, *args)
    work = gpu_gemm.grouped_gemm([rows] * E, F, D, dtype)
    assert counts.mma_flops == work.mma_flops
    assert counts.launches == work.launches
    assert work.bytes <= counts.bytes <= work.bytes + gpu_gemm.map_bytes(E * rows, E, dtype)
    _, counts = triton_host.run_on_ptx(
        OPS["grouped_gemm_backward"].triton("grouped_gemm_backward"),
        x_ND @ w_EFD[0].mT,
        x_ND,
        offset_E1,
    )
    work = gpu_gemm.weight_grad([rows] * E, F, D, dtype)
    assert counts.mma_flops == work.mma_flops
    assert counts.bytes == work.bytes + 4 * (E + 1)


def test_main_loop_is_mostly_products_and_copies() -> None:
    """Instructions that a step of the sum adds, by the difference between two widths. The rest is
    addresses: every copy and every fragment has its own. The assembler renames what PTX moves."""
    launcher, counted = OPS["grouped_gemm"].triton("grouped_gemm"), []
    for D in (256, 512):
        args = _balanced(128, 2, 128, D, torch.bfloat16)
        counted.append(triton_host.run_on_ptx(launcher, *args)[1])
    work = counted[1].opcodes - counted[0].opcodes
    useful = sum(work[op] for op in ("mma", "ldmatrix", "cp.async"))
    assert work["mma"] == 2 * 128 * 128 * 256 // (2 * 16 * 8 * 16)
    assert useful >= 0.6 * (sum(work.values()) - work["mov"]), work
    assert counted[1].bank_conflicts == counted[0].bank_conflicts
