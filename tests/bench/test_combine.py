"""Time of the weighted gather-sum of a batch of tokens, and of its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.combine import combine_backward_reference, combine_reference
from tests import cases
from tests.checks import assert_close_to_truth, backends_of

CASE = cases.CombineCase("bench", T=2048, K=2, D=512)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("combine"))
def test_combine(benchmark: Any, backend: str) -> None:
    args = CASE.build(torch.bfloat16)
    out_TD = benchmark(gk.combine, *args, backend=backend)
    truth = combine_reference(args[0].double(), args[1].double(), args[2])
    assert_close_to_truth(out_TD, combine_reference(*args), truth)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("combine_backward"))
def test_combine_backward(benchmark: Any, backend: str) -> None:
    args = CASE.build(torch.float32)
    grad_TD = CASE.draw(CASE.T, CASE.D)
    grads = benchmark(torch.ops.gose.combine_backward, grad_TD, *args, backend=backend)
    for got, wanted in zip(grads, combine_backward_reference(grad_TD, *args), strict=True):
        torch.testing.assert_close(got, wanted)
