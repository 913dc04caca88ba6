"""Time of routing a batch of tokens, of routing one, and of the gradient of weights and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.ops.route import route_backward_reference, route_reference
from tests import cases
from tests.checks import backends_of

BATCH = cases.RouteCase(2048, 64, 8, options={"renormalize": True})
TOKEN = cases.RouteCase(1, 64, 8, options={"renormalize": True})


@pytest.mark.bench
@pytest.mark.parametrize("case", [BATCH, TOKEN], ids=str)
@pytest.mark.parametrize("backend", backends_of("route"))
def test_route(benchmark: Any, backend: str, case: cases.RouteCase) -> None:
    args, options = case.build()
    outputs = benchmark(gk.route, *args, backend=backend, **options)
    for got, want in zip(outputs, route_reference(*args, **options), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.bench
@pytest.mark.parametrize("backend", backends_of("route_backward"))
def test_route_backward(benchmark: Any, backend: str) -> None:
    args, options = BATCH.build()
    weight_TK, expert_TK, _, load_E, importance_E, loss_L = route_reference(*args, **options)
    up = (torch.ones_like(weight_TK), None, None, torch.ones_like(loss_L))
    full = (*args, expert_TK, load_E, importance_E, *up)
    grad = benchmark(torch.ops.gose.route_backward, *full, backend=backend, **options)
    torch.testing.assert_close(grad, route_backward_reference(*full, **options))
