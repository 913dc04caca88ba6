from __future__ import annotations

import pytest
import torch

import gose_kernels as gk


@pytest.mark.bench
def test_distill_loss_forward_and_backward(benchmark):
    student_BC = torch.randn(256, 1000, requires_grad=True)
    teacher_BC, label_B = torch.randn(256, 1000), torch.randint(0, 1000, (256,))

    def step() -> torch.Tensor:
        student_BC.grad = None
        gk.distill_loss(student_BC, teacher_BC, label_B, tau=2.0).backward()
        assert student_BC.grad is not None
        return student_BC.grad

    grad_BC = benchmark(step)
    torch.testing.assert_close(grad_BC.sum(dim=1), torch.zeros(256), atol=1e-6, rtol=0)
