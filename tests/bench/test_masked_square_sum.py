from __future__ import annotations

import pytest
import torch

import gose_kernels as gk


@pytest.mark.bench
@pytest.mark.parametrize("masks", ["none", "rows", "elements"])
def test_sum_of_four_tensors(benchmark, masks):
    grad = [torch.randn(256, 256) for _ in range(4)]
    drawn = torch.rand(256, 1 if masks == "rows" else 256) < 0.5
    frozen = [] if masks == "none" else [drawn] * 4
    got = benchmark(gk.masked_square_sum, grad, frozen)
    torch.testing.assert_close(got, gk.masked_square_sum(grad, frozen, backend="torch"))
