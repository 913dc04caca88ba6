"""Time of entropy and its gradient on the class scores of a batch of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.entropy import entropy_backward_reference, entropy_reference
from tests import cases
from tests.checks import backends_of

CASE = cases.LogitsCase((512, 8, 100))


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_entropy(benchmark: Any, backend: str) -> None:
    logits_BMC = CASE.build()
    entropy_BM = benchmark(gk.entropy, logits_BMC, backend=backend)
    torch.testing.assert_close(entropy_BM, entropy_reference(logits_BMC))


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("entropy_backward"))
def test_entropy_backward(benchmark: Any, backend: str) -> None:
    logits_BMC, grad_BM = CASE.build(), torch.ones(CASE.shape[:-1])
    grad = benchmark(torch.ops.gose.entropy_backward, grad_BM, logits_BMC, backend=backend)
    torch.testing.assert_close(grad, entropy_backward_reference(grad_BM, logits_BMC))
