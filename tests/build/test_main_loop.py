"""What a step of the expert GEMMs issues on sm_80 beside products of matrices and asynchronous
copies: counted in the machine code of the main loop, after ptxas has folded what PTX spells out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.build.reports import COPIES, PRODUCTS, main_loop
from tests.gpu import triton_host
from tests.gpu.gemm_ops import GEMM_KERNELS, OPS, mlp_backward_call, mlp_call

# Rows of a tile -> tokens of 2 experts each over 8 experts.
TOKENS = {128: 4096, 64: 256, 32: 64, 16: 16}
# The share of other instructions that is reached: a quarter is wanted. Tiles of few rows wait for
# memory, and have few products for an address. Backward, weights do not lie along the sum, so that
# every copy of them has its own 64-bit address.
FORWARD = {128: 0.15, 64: 0.23, 32: 0.33, 16: 0.36}
BACKWARD = {"_hidden_grad_kernel": 0.34, "_grouped_gemm_kernel": 0.26, "_weight_grad_kernel": 0.25}


def _others(loop: Counter[str]) -> float:
    return 1 - sum(loop[op] for op in (*PRODUCTS, *COPIES)) / loop.total()


def _loops(name: str, folder: Path, *args: object) -> Iterator[tuple[str, Counter[str]]]:
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to("sm_80", launched.append):
        OPS[name].triton(name)(*args)
    for one in launched:
        if (kernel := one.compiled.metadata.name) in GEMM_KERNELS:
            yield kernel, main_loop(one.compiled, folder)


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("rows", TOKENS)
def test_forward(rows: int, tmp_path: Path) -> None:
    call = mlp_call(TOKENS[rows], torch.bfloat16)
    seen = set()
    for kernel, loop in _loops("expert_mlp_train", tmp_path, call):
        assert _others(loop) <= FORWARD[rows], f"{kernel}: {loop}"
        assert loop["LDGSTS"] > 0 and loop["LDG"] == loop["STS"] == 0
        seen.add(kernel)
    assert seen == {"_up_kernel", "_grouped_gemm_kernel"}


def test_backward(tmp_path: Path) -> None:
    seen = set()
    for kernel, loop in _loops(
        "expert_mlp_backward", tmp_path, *mlp_backward_call(mlp_call(4096, torch.bfloat16))
    ):
        assert _others(loop) <= BACKWARD[kernel], f"{kernel}: {loop}"
        assert loop["LDGSTS"] > 0
        assert loop["LDG"] == loop["STS"] == 0
        seen.add(kernel)
    assert seen == BACKWARD.keys()


def test_others_are_seen() -> None:
    assert _others(Counter({"HMMA": 2, "LDS RZ": 1, "IADD3": 1})) == 0.25


@pytest.mark.parametrize("name", ["expert_mlp_train", "expert_mlp_backward"])
def test_products_run_ahead_on_sm_90(name: str) -> None:
    """A step's products are waited for while those of the next one run."""
    call = mlp_call(4096, torch.bfloat16)
    args = mlp_backward_call(call) if name == "expert_mlp_backward" else (call,)
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to("sm_90", launched.append):
        OPS[name].triton(name)(*args)
    gemms = [one for one in launched if one.compiled.metadata.name in GEMM_KERNELS]
    assert len(gemms) == {"expert_mlp_train": 2, "expert_mlp_backward": 4}[name]
    for one in gemms:
        pending = re.findall(r"wgmma\.wait_group\S* (\d+)", one.compiled.asm["ptx"])
        assert max(map(int, pending)) >= 1, one.compiled.metadata.name
