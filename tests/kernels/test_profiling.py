"""profiling.record: calls, tokens, bytes, FLOPs and seconds by op and backend, counted once."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.backends import reference
from gose_kernels.registry import Cost, register


def _inner_reference(x_P: Tensor) -> Tensor:
    time.sleep(0.02)
    return x_P.clone()


def _outer_reference(x_P: Tensor) -> Tensor:
    return torch.ops.gose.test_inner(x_P) + 1


for _name, _run in (("inner", _inner_reference), ("outer", _outer_reference)):
    register(
        f"test_{_name}(Tensor x_P, *, str? backend=None) -> Tensor",
        reference(_run),
        fake=lambda x_P, backend=None: torch.empty_like(x_P),
        cost=lambda x_P: Cost(x_P.shape[0], 8 * x_P.shape[0], x_P.shape[0]),
        example=lambda device, dtype: (torch.ones(3, device=device, dtype=dtype),),
    )


def test_counts_equal_the_declared_costs() -> None:
    y_ND = torch.randn(8, 5)
    weight_TK = torch.rand(4, 2, requires_grad=True)
    row_TK = torch.arange(8, dtype=torch.int32).view(4, 2)
    with gk.profiling.record() as counts:
        for _ in range(3):
            gk.combine(y_ND, weight_TK, row_TK, backend="torch").sum().backward()
    count = counts.table["combine", "torch"]
    assert (count.calls, count.tokens, count.flops) == (3, 12, 3 * 2 * 8 * 5)
    assert count.bytes == 3 * (12 * 5 * 4 + 8 * 8)
    assert counts.table["combine_backward", "torch"].calls == 3
    gk.combine(y_ND, weight_TK, row_TK)
    assert counts.table["combine", "torch"].calls == 3, "the block has ended"


def test_an_op_inside_an_op_is_part_of_it() -> None:
    start = time.perf_counter()
    with gk.profiling.record() as counts:
        torch.ops.gose.test_outer(torch.ones(3))
    elapsed = time.perf_counter() - start
    assert list(counts.table) == [("test_outer", "torch")]
    assert 0.02 <= counts.wall_seconds <= elapsed


def test_blocks_nest_and_survive_errors() -> None:
    x_P = torch.ones(3)
    with gk.profiling.record() as outer:
        try:
            with gk.profiling.record() as inner:
                torch.ops.gose.test_inner(x_P)
                raise KeyError("stop")
        except KeyError:
            pass
        torch.ops.gose.test_inner(x_P)
    assert inner.table["test_inner", "torch"].calls == 1
    assert outer.table["test_inner", "torch"].calls == 1


def test_trace_emits_profiler_ranges() -> None:
    with torch.profiler.profile() as profile, gk.profiling.record(trace=True):
        torch.ops.gose.test_inner(torch.ones(3))
    assert "gose::test_inner[torch]" in {event.name for event in profile.events()}


def test_a_block_can_force_a_backend() -> None:
    y_ND, weight_TK = torch.randn(4, 3), torch.rand(2, 2)
    row_TK = torch.arange(4, dtype=torch.int32).view(2, 2)
    with gk.profiling.record(backend="torch") as counts:
        gk.combine(y_ND, weight_TK, row_TK)
    assert list(counts.table) == [("combine", "torch")]
    with (
        pytest.raises(ValueError, match="cuda: takes tensors on cuda, got one on cpu"),
        gk.profiling.record(backend="cuda"),
    ):
        gk.combine(y_ND, weight_TK, row_TK)
