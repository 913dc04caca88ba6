"""Time of grouped_gemm and of its weight gradient on one layer's worth of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.grouped_gemm import grouped_gemm_reference
from tests import cases
from tests.checks import backends_of

CASE = cases.GroupedGemmCase(512, 16, 256, 256, bias=True)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("grouped_gemm"))
def test_grouped_gemm(benchmark: Any, backend: str) -> None:
    args, _ = CASE.build()
    y_NF = benchmark(gk.grouped_gemm, *args, backend=backend)
    torch.testing.assert_close(y_NF, grouped_gemm_reference(*args))


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("grouped_gemm_backward"))
def test_grouped_gemm_backward(benchmark: Any, backend: str) -> None:
    x_ND, _, offset_E1, _ = CASE.build()[0]
    grad_NF = torch.ones(CASE.N, CASE.F)
    grad_w_EFD, _ = benchmark(
        torch.ops.gose.grouped_gemm_backward, grad_NF, x_ND, offset_E1, backend=backend
    )
    rows = slice(0, int(offset_E1[1]))
    torch.testing.assert_close(grad_w_EFD[0], grad_NF[rows].mT @ x_ND[rows])
