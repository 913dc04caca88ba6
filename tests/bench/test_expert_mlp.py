"""Time of expert_mlp: inference, and a training step with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.expert_mlp import expert_mlp_reference
from tests import cases
from tests.checks import backends_of

CASE = cases.ExpertMlpCase(T=256, K=2, E=16, D=256, F=128)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_expert_mlp(benchmark: Any, backend: str) -> None:
    args, _ = CASE.build()
    out_TD = benchmark(gk.expert_mlp, *args, backend=backend)
    torch.testing.assert_close(out_TD, expert_mlp_reference(*args))


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_expert_mlp_step(benchmark: Any, backend: str) -> None:
    args, _ = CASE.build()
    inputs = [args[i].requires_grad_() for i in (0, 1, 3, 4)]

    def step(name: str) -> tuple[torch.Tensor, ...]:
        out_TD = gk.expert_mlp(*args, backend=name)
        return torch.autograd.grad(out_TD, inputs, torch.ones_like(out_TD))

    for got, want in zip(benchmark(step, backend), step("torch"), strict=True):
        torch.testing.assert_close(got, want)
