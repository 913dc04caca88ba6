"""route and route_backward refuse what does not fit together, in the same words on every road."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route import route_reference
from tests.checks import backends_of
from tests.route_oracle import gradients

SCORE = torch.zeros(4, 6)
FLAT = torch.zeros(6)
REFUSALS = [
    ("score_TE must be of 2 dimensions, got shape (6,)", (FLAT, 1), {}),
    ("score_TE must be floating point, got torch.int32", (SCORE.int(), 1), {}),
    ("top_k must be in [1, E=6], got 0", (SCORE, 0), {}),
    ("top_k must be in [1, E=6], got 7", (SCORE, 7), {}),
    ("policy must be one of softmax, sigmoid", (SCORE, 1), {"policy": "hash"}),
    ("entropy_TE must be None, got a tensor", (SCORE, 1, SCORE), {}),
    ("entropy_E must be of shape (6,), got (4, 6)", (SCORE, 1, None, SCORE), {"policy": "egs"}),
    ("entropy_TE must be of shape (4, 6), got (6,)", (SCORE, 1, FLAT), {"policy": "egs"}),
    (
        "exactly one of entropy_TE and entropy_E must be given to policy egs, got 0",
        (SCORE, 1),
        {"policy": "egs"},
    ),
    (
        "exactly one of entropy_TE and entropy_E must be given to policy egs, got 2",
        (SCORE, 1, SCORE, FLAT),
        {"policy": "egs"},
    ),
    ("bias_E must be None, got a tensor", (SCORE, 1, None, None, FLAT), {}),
    (
        "bias_E must be floating point, got torch.int32",
        (SCORE, 1, None, None, FLAT.int()),
        {"policy": "sigmoid"},
    ),
    (
        "noise_TE must be None, got a tensor",
        (SCORE, 1, None, None, None, SCORE),
        {"policy": "sigmoid"},
    ),
    ("noise_TE must be of shape (4, 6)", (SCORE, 1, None, None, None, FLAT), {}),
    ("entropy_floor must be above 0, got 0", (SCORE, 1), {"entropy_floor": 0.0}),
    ("tau must be None, got 0.5: only policy egs reads it", (SCORE, 1), {"tau": 0.5}),
    ("tau must be above 0, got 0", (SCORE, 1, SCORE), {"policy": "egs", "tau": 0.0}),
    ("gate must be softmax or sigmoid, got 'tanh'", (SCORE, 1), {"gate": "tanh"}),
    (
        "num_groups must be a divisor of E=6, got 4",
        (SCORE, 1),
        {"policy": "group_limited", "num_groups": 4},
    ),
    (
        "top_groups must be in [1, num_groups=3], got 4",
        (SCORE, 1),
        {"policy": "group_limited", "num_groups": 3, "top_groups": 4},
    ),
    (
        "top_k must be at most the 2 experts of the top_groups, got 3",
        (SCORE, 3),
        {"policy": "group_limited", "num_groups": 3, "top_groups": 1},
    ),
    ("capacity must be given to policy expert_choice", (SCORE, 1), {"policy": "expert_choice"}),
    ("capacity must be at least 1, got 0", (SCORE, 1), {"capacity": 0}),
    ("capacity_order must be token or priority", (SCORE, 1), {"capacity_order": "random"}),
    ("adaptive must be None, mass or bands, got some", (SCORE, 1), {"adaptive": "some"}),
    (
        "adaptive must be None for expert_choice, got mass",
        (SCORE, 1),
        {"policy": "expert_choice", "capacity": 1, "adaptive": "mass"},
    ),
    ("mass must be in (0, 1], got 0.0", (SCORE, 1), {"adaptive": "mass", "mass": 0.0}),
    ("bands must be ascending and not empty, got []", (SCORE, 1), {"adaptive": "bands"}),
    (
        "bands must be ascending and not empty, got [0.5, 0.5]",
        (SCORE, 1),
        {"adaptive": "bands", "bands": [0.5, 0.5]},
    ),
    ("noise_std must be at least 0, got -1.0", (SCORE, 1), {"noise_std": -1.0}),
    (
        "noise_std must be 0 for sigmoid, got 1.0",
        (SCORE, 1),
        {"noise_std": 1.0, "policy": "sigmoid"},
    ),
]


@pytest.mark.parametrize(("message", "args", "options"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals(message, args, options):
    with pytest.raises(ValueError, match="route: ") as caught:
        gk.route(*args, **options)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="route: "):  # the fake refuses too: torch.compile sees it
        torch.ops.gose.route(
            *(a.to("meta") if isinstance(a, Tensor) else a for a in args), **options
        )


BACKWARD_REFUSALS = [
    (6, torch.zeros(2, 1, dtype=torch.int32), "expert_TK must be torch.int32 of shape (3, 1), got"),
    (6, torch.zeros(3, 1, dtype=torch.int64), "expert_TK must be torch.int32 of shape (3, 1), got"),
    (7, torch.zeros(3, dtype=torch.int32), "load_E must be torch.int32 of shape (4,), got"),
    (8, torch.zeros(4).double(), "importance_E must be torch.float32 of shape (4,), got"),
    (9, torch.zeros(3, 2), "grad_weight_TK must be torch.float32 of shape (3, 1), got"),
    (10, torch.zeros(3, 1), "grad_entropy_T must be torch.float32 of shape (3,), got"),
    (11, torch.zeros(()), "grad_importance_E must be torch.float32 of shape (4,), got"),
    (12, torch.zeros(4), "grad_loss_L must be torch.float32 of shape (5,), got"),
]


@pytest.mark.parametrize(
    ("at", "value", "message"), BACKWARD_REFUSALS, ids=[r[2] for r in BACKWARD_REFUSALS]
)
@pytest.mark.parametrize("backend", backends_of("route_backward"))
def test_backward_refuses_what_route_does_not_return(at, value, message, backend):
    _assert_backward_refuses(at, value, message, backend)


# On a GPU values are trusted: to look at them would wait for it.
@pytest.mark.parametrize("backend", backends_of("route_backward", "torch", "cpu"))
def test_backward_refuses_experts_that_are_none(backend):
    experts = torch.full((3, 1), 5, dtype=torch.int32)
    _assert_backward_refuses(6, experts, "expert_TK must hold experts in [0, E=4]", backend)


def _assert_backward_refuses(at, value, message, backend):
    score_TE = torch.zeros(3, 4)
    out = route_reference(score_TE, 1)
    args = [score_TE, 1, *[None] * 4, out[1], out[3], out[4], *gradients((), out, torch.float32)]
    args[at] = value
    with pytest.raises(ValueError, match="route_backward: ") as caught:
        torch.ops.gose.route_backward(*args, backend=backend)
    assert message in str(caught.value)
