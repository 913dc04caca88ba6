from __future__ import annotations

import pytest
import torch
from torch import nn

import gose_kernels as gk


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["MaskedAdamW", "MaskedSGD", "MaskedLion"])
@pytest.mark.parametrize("masks", ["none", "rows", "elements"])
def test_step_of_four_tensors(benchmark, kind, masks):
    params = [nn.Parameter(torch.randn(256, 256)) for _ in range(4)]
    drawn = torch.rand(256, 1 if masks == "rows" else 256) < 0.5
    frozen = {} if masks == "none" else dict.fromkeys(params, drawn)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(256, 256)
    optimizer = getattr(gk.optim, kind)(params, lr=1e-3, frozen=frozen)
    benchmark(optimizer.step)
    for p, old in zip(params, start, strict=True):
        moved = (p.detach() != old).any(dim=1)
        assert bool(moved.any())
        if masks == "rows":
            assert torch.equal(moved, ~drawn[:, 0])
