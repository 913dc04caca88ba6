"""Time of the plan that sorts a batch of slots by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.dispatch import dispatch_reference
from tests import cases
from tests.checks import backends_of


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("dispatch"))
def test_dispatch(benchmark: Any, backend: str) -> None:
    args = cases.DispatchCase(4096, 8, 64).build()
    plan = benchmark(gk.dispatch, *args, backend=backend)
    assert all(map(torch.equal, plan, dispatch_reference(*args)))
