from __future__ import annotations

import pytest
import torch

import gose_kernels as gk


@pytest.mark.bench
def test_low_rank(benchmark):
    x_MN, q_NR = torch.randn(512, 512), torch.randn(512, 4)
    p_MR, q_NR, left_MN = benchmark(gk.low_rank, x_MN, q_NR, torch.zeros(512, 512))
    torch.testing.assert_close(p_MR @ q_NR.T + left_MN, x_MN)
