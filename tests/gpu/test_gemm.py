"""The expert GEMMs as compiled for sm_80, in the PTX machine: right, without a fault, with the same
bits in every order of blocks, and counting what their closed forms say."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import gpu_gemm
from gose_kernels.ops.expert_mlp_packed import bind_packed
from gose_kernels.ops.mlp_call import MlpCall
from tests import cases
from tests.gpu import triton_host
from tests.gpu.gemm_ops import (
    GEMMS,
    LAYERS,
    OPS,
    SQUARES,
    WHOLE_LAYERS,
    check_backward,
    check_forward,
    check_gemm,
    check_gemm_backward,
    check_moe,
    check_packed,
    check_squares,
)
from tests.gpu.ops import same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _in_any_order(launcher: Any, *args: Any) -> Any:
    got = triton_host.run_on_ptx(launcher, *args, count=False)[0]
    again = triton_host.run_on_ptx(launcher, *args, count=False, order="reverse")[0]
    assert same_bits(got, again)
    return got


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_grouped_gemm(case: cases.GroupedGemmCase, dtype: torch.dtype) -> None:
    check_gemm(_in_any_order, case, dtype)


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("add", [False, True], ids=["", "added"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_grouped_gemm_backward(case: cases.GroupedGemmCase, dtype: torch.dtype, add: bool) -> None:
    check_gemm_backward(_in_any_order, case, dtype, add)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_forward_and_backward(case: cases.ExpertMlpCase, dtype: torch.dtype) -> None:
    pre_NH = check_forward(_in_any_order, case, dtype)
    check_backward(_in_any_order, case, dtype, pre_NH)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients_that_are_added(case: cases.ExpertMlpCase, dtype: torch.dtype) -> None:
    check_backward(_in_any_order, case, dtype, add=True)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", SQUARES, ids=str)
def test_squared_grad(case: cases.SquaredGradCase, dtype: torch.dtype) -> None:
    check_squares(_in_any_order, case, dtype)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_packed_layer(case: cases.ExpertMlpCase, dtype: torch.dtype, weights: str | None) -> None:
    check_packed(_in_any_order, case, dtype, weights)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", WHOLE_LAYERS, ids=str)
def test_whole_layer(case: cases.MoeCase, dtype: torch.dtype) -> None:
    check_moe(_in_any_order, case, dtype)


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("router_dtype", [torch.float64, *DTYPES], ids=_ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
def test_scores(dtype: torch.dtype, router_dtype: torch.dtype) -> None:
    """Sums of float32, whatever the two dtypes; FLOPs and bytes are those of the closed form."""
    random = torch.Generator().manual_seed(4)
    x_TD = torch.randn(20, 256, generator=random).to(dtype)
    router_ED = torch.randn(24, 256, generator=random).to(router_dtype)
    score_TE, counts = triton_host.run_on_ptx(OPS["moe"].triton("moe"), x_TD, router_ED)
    truth = x_TD.double() @ router_ED.double().mT
    sizes = x_TD.double().abs() @ router_ED.double().abs().mT
    assert ((score_TE - truth).abs() <= 1e-6 * sizes).all()
    work = gpu_gemm.scores(20, 24, 256, dtype, router_dtype)
    assert (counts.mma_flops, counts.bytes) == (work.mma_flops, work.bytes)
    assert counts.launches == work.launches


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_ids)
def test_packed_weights_are_read_once(dtype: torch.dtype, weights: str | None) -> None:
    """16 rows an expert: the bytes of a layer are those of its closed form, but for the plan."""
    case = cases.ExpertMlpCase(T=32, K=1, E=2, D=128, F=128)
    (x_TD, weight_TK, _, up, down, *_), _ = case.build(dtype)
    expert_TK = (torch.arange(32, dtype=torch.int32) % 2).view(32, 1)
    packed_EB = (
        gk.quantize_experts(up, down, weights=weights) if weights else gk.pack_experts(up, down)
    )
    launcher = OPS["expert_mlp_packed"].triton("expert_mlp_packed")
    args = bind_packed(x_TD, weight_TK, expert_TK, packed_EB, case.F, weights=weights)
    _, counts = triton_host.run_on_ptx(launcher, *args)
    work = gpu_gemm.packed_layer([16, 16], case.F, case.D, dtype, weights)
    assert counts.mma_flops == work.mma_flops
    assert work.bytes <= counts.bytes <= 1.02 * work.bytes


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
    _, added = triton_host.run_on_ptx(
        OPS["grouped_gemm_backward_add_"].triton("grouped_gemm_backward_add_"),
        *(x_ND @ w_EFD[0].mT, x_ND, offset_E1, w_EFD.clone()),
    )
    assert added.mma_flops == counts.mma_flops
    assert added.bytes == counts.bytes + w_EFD.nbytes


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("samples", [None, [1, 39, 16, 8]], ids=["rows", "samples"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_ids)
def test_closed_form_of_squares_is_what_is_counted(
    dtype: torch.dtype, samples: list[int] | None
) -> None:
    E, F, D, rows = 2, 64, 128, [40, 24]
    random = torch.Generator().manual_seed(3)
    x_ND, grad_NF = (torch.randn(64, size, generator=random).to(dtype) for size in (D, F))
    offset_E1 = torch.tensor([0, 40, 64], dtype=torch.int32)
    sample_N = None
    if samples is not None:
        sample_N = torch.arange(4).repeat_interleave(torch.tensor(samples)).int()
    launcher = OPS["squared_grad"].triton("squared_grad")
    _, counts = triton_host.run_on_ptx(launcher, x_ND, grad_NF, sample_N, offset_E1)
    work = gpu_gemm.squared_grad(rows, F, D, dtype, samples)
    assert len(rows) == E
    assert (counts.mma_flops, counts.bytes) == (work.mma_flops, work.bytes)
    assert counts.launches == work.launches


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


def _declared(launcher: Any, *args: Any) -> Counter[str]:
    """The sums of what the launches of a call declare."""
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to("sm_80", launched.append):
        launcher(*args)
    total: Counter[str] = Counter()
    for one in launched:
        assert one.declared["name"] == one.compiled.metadata.name
        total.update({k: v for k, v in one.declared.items() if k != "name"})
    return total


def test_profilers_are_told_the_closed_forms() -> None:
    """Of a GEMM bytes and products; of a layer the products that the op declares."""
    args = _balanced(128, 2, 128, 256, torch.bfloat16)
    declared = _declared(OPS["grouped_gemm"].triton("grouped_gemm"), *args)
    work = gpu_gemm.grouped_gemm([64] * 2, 128, 256, torch.bfloat16)
    assert declared["flops16"] == work.flops
    map_bytes = gpu_gemm.map_bytes(128, 2, torch.bfloat16)
    assert work.bytes <= declared["bytes"] <= work.bytes + map_bytes
    launcher = OPS["squared_grad"].triton("squared_grad")
    for label, args in islice(OPS["squared_grad"].tiles(torch.bfloat16), 2):
        declared = _declared(launcher, *args)
        cost = gk.OPS["squared_grad"].cost_of(*args)
        of_bias = args[1].numel()
        of_squares = {"flops16": cost.flops, "flops32": of_bias}
        if label.startswith("rows"):  # their squares are float32
            of_squares = {"flops32": cost.flops + of_bias}
        assert {k: v for k, v in declared.items() if k != "bytes"} == of_squares
        assert declared["bytes"] >= cost.bytes
    for name in ("expert_mlp_train", "expert_mlp_backward"):
        _, launch = next(OPS[name].tiles(torch.float16))
        given = {k: v for part in launch for k, v in part._asdict().items() if k != "limit"}
        tensors = [v for v in given.values() if v is None or isinstance(v, Tensor)]
        options = {k: v for k, v in given.items() if isinstance(v, (bool, str))}
        cost = gk.OPS[name].cost_of(*tensors, **options)
        declared = _declared(OPS[name].triton(name), *launch)
        assert declared["flops16"] == cost.flops
        assert declared["bytes"] >= cost.bytes
