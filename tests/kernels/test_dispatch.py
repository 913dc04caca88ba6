"""dispatch: against a Python loop that fills one bucket per expert."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from tests import cases
from tests.checks import backends_of


def oracle(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Buckets filled in order of t, then k."""
    T, K = expert_TK.shape
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for t, k in itertools.product(range(T), range(K)):
        if expert_TK[t, k] < num_experts:
            buckets[int(expert_TK[t, k])].append((t, k))
    row_TK = torch.full((T, K), -1, dtype=torch.int32)
    token_N = torch.full((T * K,), -1, dtype=torch.int32)
    offset_E1 = torch.zeros(num_experts + 1, dtype=torch.int32)
    n = 0
    for e, bucket in enumerate(buckets):
        for t, k in bucket:
            row_TK[t, k], token_N[n] = n, t
            n += 1
        offset_E1[e + 1] = n
    return row_TK, token_N, offset_E1


def assert_plan(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == torch.int32
        assert g.shape == w.shape
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", cases.dispatch, ids=str)
@pytest.mark.parametrize("backend", backends_of("dispatch"))
def test_dispatch_fills_buckets_in_order(backend, case, dtype):
    expert_TK, num_experts = case.build(dtype)
    assert_plan(
        gk.dispatch(expert_TK, num_experts, backend=backend), oracle(expert_TK, num_experts)
    )


@pytest.mark.parametrize("backend", backends_of("dispatch"))
def test_every_plan_of_a_small_size(backend):
    # Triton's interpreter takes 60 ms a plan: a thirteenth of them, all over the range.
    step = 13 if backend == "triton" else 1
    for T, K, E in ((3, 2, 2), (2, 2, 3), (4, 1, 3)):
        for ids in itertools.islice(itertools.product(range(E + 1), repeat=T * K), 0, None, step):
            expert_TK = torch.tensor(ids, dtype=torch.int32).view(T, K)
            assert_plan(gk.dispatch(expert_TK, E, backend=backend), oracle(expert_TK, E))


@pytest.mark.parametrize("backend", list(backends_of("dispatch")))
@given(st.integers(0, 40), st.integers(0, 4), st.integers(0, 70), st.integers(0, 2**31))
def test_rows_and_tokens_are_inverse(backend, T, K, E, seed):
    random = torch.Generator().manual_seed(seed)
    expert_TK = torch.randint(0, E + 1, (T, K), generator=random, dtype=torch.int32)
    row_TK, token_N, offset_E1 = gk.dispatch(expert_TK, E, backend=backend)
    used_TK = expert_TK < E
    assert torch.equal(row_TK >= 0, used_TK)
    row_U = row_TK[used_TK].long()
    assert torch.equal(row_U.sort().values, torch.arange(int(offset_E1[-1])))
    assert torch.equal(token_N[row_U], used_TK.nonzero()[:, 0].to(torch.int32))
    assert bool((token_N[int(offset_E1[-1]) :] == -1).all())
    load_E = torch.bincount(expert_TK.flatten(), minlength=E + 1)[:E]
    assert torch.equal(offset_E1.diff(), load_E.to(torch.int32))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_same_plan_for_any_number_of_threads(backend):
    expert_TK = torch.randint(0, 41, (30000, 4), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plans.append(gk.dispatch(expert_TK, 40, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert_plan(plans[0], oracle(expert_TK, 40))
    for plan in plans[1:]:
        assert_plan(plan, plans[0])


@pytest.mark.parametrize("backend", backends_of("dispatch"))
@pytest.mark.parametrize("case", cases.dispatch[:8], ids=str)
def test_opcheck(case, backend):
    torch.library.opcheck(torch.ops.gose.dispatch.default, case.build(), {"backend": backend})


@pytest.mark.parametrize("backend", backends_of("dispatch"))
def test_refusals(backend):
    ids = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expert_TK must have 2 dimensions, got shape \(4,\)"):
        gk.dispatch(ids.flatten(), 3, backend=backend)
    with pytest.raises(ValueError, match=r"expert_TK must be int32 or int64, got torch.uint8"):
        gk.dispatch(ids.to(torch.uint8), 3, backend=backend)
    with pytest.raises(ValueError, match=r"num_experts must be at least 0, got -1"):
        gk.dispatch(ids, -1, backend=backend)
    if backend not in ("cpu", "torch"):  # GPUs trust the values: a check would sync
        return
    for wrong in (4, -1):
        ids[1, 0] = wrong
        with pytest.raises(
            ValueError, match=rf"must hold experts in \[0, num_experts=3\].*{wrong}"
        ):
            gk.dispatch(ids, 3, backend=backend)
    with pytest.raises(ValueError, match=r"must hold experts in \[0, num_experts=3\]"):
        gk.dispatch(torch.full((1, 1), 2**32, dtype=torch.int64), 3, backend=backend)
