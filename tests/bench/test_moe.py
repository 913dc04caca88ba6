"""Time of a whole mixture-of-experts layer at inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.moe import moe_reference
from tests import cases
from tests.checks import backends_of

CASE = cases.MoeCase(T=256, E=16, D=256, F=128)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("moe"))
def test_moe(benchmark: Any, backend: str) -> None:
    args, _ = CASE.build()
    outputs = benchmark(gk.moe, *args, backend=backend)
    for got, want in zip(outputs, moe_reference(*args), strict=True):
        torch.testing.assert_close(got, want)
