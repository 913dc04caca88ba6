"""Time of squared_grad: one token per sample, and several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from tests import cases
from tests.checks import backends_of


@pytest.mark.bench
@pytest.mark.parametrize("samples", ["rows", "runs"])
@pytest.mark.parametrize("backend", backends_of("squared_grad"))
def test_squared_grad(benchmark: Any, backend: str, samples: str) -> None:
    args = cases.SquaredGradCase(512, 256, 128, samples).build()
    square_FD, _ = benchmark(gk.squared_grad, *args, backend=backend)
    x_ND, grad_NF, sample_N, _ = (a if a is None else a.double() for a in args)
    sample_N = torch.arange(512) if sample_N is None else sample_N
    want_F = torch.zeros(128, dtype=torch.float64)
    for b in sample_N.unique():
        rows = sample_N == b
        want_F += (grad_NF[rows].mT @ x_ND[rows, 5]).square()
    torch.testing.assert_close(square_FD[:, 5].double(), want_F, rtol=1e-4, atol=1e-3)
