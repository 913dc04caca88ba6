"""route where scores tie: the smaller id wins, on every backend, for every pattern of ties.

A row's pattern of ties is a weak order of its experts, its lowest class available or not. All of
them are tried for E <= 6; for E = 7, 8 a sample drawn by the matrix seed of the run.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route import route_reference
from tests.checks import backends_of
from tests.route_oracle import assert_same, oracle


def exhaustive(E: int) -> Tensor:
    """Every row of E scores out of three values and -inf: all patterns of ties."""
    values = torch.tensor([-torch.inf, 0.0, 0.5, 1.0], dtype=torch.float64)
    return values[torch.cartesian_prod(*[torch.arange(4)] * E).view(-1, E)]


TIES: list[dict[str, Any]] = [
    {},
    {"policy": "egs"},
    {"policy": "sigmoid", "renormalize": True},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 2},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 2, "gate": "sigmoid"},
    {"policy": "group_limited", "num_groups": 4, "top_groups": 3, "gate": "sigmoid"},
    {"policy": "expert_choice", "capacity": 5},
    {"capacity": 40},
    {"capacity": 40, "capacity_order": "priority"},
    {"adaptive": "mass", "mass": 0.5},
]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("options", TIES, ids=str)
def test_every_pattern_of_ties(options, top_k):
    score_TE = exhaustive(4)
    H = score_TE.flip(0).clamp_min(0) if options.get("policy") == "egs" else None
    assert_same(
        route_reference(score_TE, top_k, H, **options), oracle(score_TE, top_k, H, **options)
    )


ROWS = 32  # T of a call

# A choice that looks at one token, then choices that look at all.
BY_TOKEN: list[dict[str, Any]] = [
    {},
    {"renormalize": True},
    {"softmax_before": False, "capacity": 9},
    {"policy": "egs"},
    {"policy": "sigmoid", "capacity": 5},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 1},
    {"policy": "group_limited", "num_groups": 2, "top_groups": 2, "gate": "sigmoid"},
]
BY_ALL: list[dict[str, Any]] = [
    {"policy": "expert_choice", "capacity": 5},
    {"capacity": 3, "capacity_order": "priority"},
    {"capacity": 7, "capacity_order": "priority", "renormalize": True},
    {"adaptive": "mass", "mass": 0.55},
    {"adaptive": "bands", "bands": [0.3, 0.8], "capacity": 6},
]


@pytest.fixture
def matrix_seed(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--matrix-seed"))


def weak_orders(E: int) -> list[tuple[int, ...]]:
    """Every way in which E numbers tie: the rank of each, ranks without a gap."""
    ranks = itertools.product(range(E), repeat=E)
    return [r for r in ranks if set(r) == set(range(max(r) + 1))]


def drawn_orders(E: int, count: int, draw: random.Random) -> list[tuple[int, ...]]:
    orders = []
    for _ in range(count):
        raw = [draw.randrange(draw.randint(1, E)) for _ in range(E)]
        orders.append(tuple(sorted(set(raw)).index(r) for r in raw))
    return orders


def rows_of(orders: list[tuple[int, ...]]) -> Tensor:
    """Scores of the patterns, each once with its lowest class and once with that at -inf."""
    rank = torch.tensor(orders, dtype=torch.float64)
    score = rank / 2
    return torch.stack([score, score.masked_fill(rank == 0, -torch.inf)], dim=1).flatten(0, 1)


def check_ties(score_TE: Tensor, options: dict[str, Any], top_k: int, backend: str) -> None:
    H = (3.5 - score_TE).clamp_max(9) / 4 if options.get("policy") == "egs" else None
    wanted = oracle(score_TE, top_k, H, **options)
    low = None if H is None else H.float()
    got = gk.route(score_TE.float(), top_k, low, **options, backend=backend)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[3], wanted[3])
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-6)


def fits(options: dict[str, Any], E: int, top_k: int) -> bool:
    groups = options.get("num_groups", 1)
    return E % groups == 0 and top_k <= options.get("top_groups", 1) * (E // groups)


@pytest.mark.matrix(keep=40)
@pytest.mark.parametrize("options", BY_TOKEN, ids=str)
@pytest.mark.parametrize("E", range(1, 7))
@pytest.mark.parametrize("backend", backends_of("route", interpreted=3))
def test_every_weak_order_of_a_row(backend, E, options, matrix_seed):
    orders = weak_orders(E)
    if backend == "triton" and len(orders) > 600:  # what an interpreter does in some seconds
        orders = random.Random(matrix_seed).sample(orders, 600)
    score_TE = rows_of(orders)
    for top_k in range(1, E + 1):
        if fits(options, E, top_k):
            for rows in score_TE.split(ROWS):
                check_ties(rows, options, top_k, backend)


@pytest.mark.matrix(keep=20)
@pytest.mark.parametrize("options", BY_TOKEN, ids=str)
@pytest.mark.parametrize("E", [7, 8])
@pytest.mark.parametrize("backend", backends_of("route", interpreted=3))
def test_drawn_weak_orders_of_a_row(backend, E, options, matrix_seed):
    draw = random.Random(f"{matrix_seed} {E}")
    for _ in range(20):
        top_k = draw.randint(1, E)
        if fits(options, E, top_k):
            orders = drawn_orders(E, draw.randint(1, ROWS // 2), draw)
            check_ties(rows_of(orders), options, top_k, backend)


@pytest.mark.matrix(keep=40)
@pytest.mark.parametrize("options", BY_ALL, ids=str)
@pytest.mark.parametrize("E", range(1, 9))
@pytest.mark.parametrize("backend", backends_of("route", interpreted=3))
def test_drawn_ties_between_tokens(backend, E, options, matrix_seed):
    # Tokens tie if their rows are equal; the scales keep p of other rows apart, as rows of the same
    # numbers in another order have p that differ by rounding alone.
    draw = random.Random(f"{matrix_seed} {E}")
    for _ in range(10 if backend == "triton" else 40):  # an interpreter runs it
        kinds = rows_of(drawn_orders(E, 2, draw))[[0, 3]] * torch.tensor([[1.0], [1.37]])
        picks = [draw.randrange(2) for _ in range(draw.randint(1, ROWS))]
        check_ties(kinds[picks], options, draw.randint(1, E), backend)
