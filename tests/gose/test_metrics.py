from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gose import metrics

NAN = math.nan

# Task 0 falls .9, .6, .5; task 1 has .2 before, .8 when trained, .85 at the end; task 2 ends at .7.
BY_HAND = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.85, 0.7]], dtype=torch.float64)
INITIAL = torch.tensor([0.1, 0.15, 0.05], dtype=torch.float64)


def matrices(min_tasks: int = 1) -> st.SearchStrategy[list[list[float]]]:
    value = st.floats(0, 1)
    return st.integers(min_tasks, 6).flatmap(
        lambda q: st.lists(st.lists(value, min_size=q, max_size=q), min_size=q, max_size=q)
    )


def tensor(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (metrics.average_accuracy(BY_HAND), (0.5 + 0.85 + 0.7) / 3),
        (metrics.learning_accuracy(BY_HAND), (0.9 + 0.8 + 0.7) / 3),
        (metrics.backward_transfer(BY_HAND), ((0.5 - 0.9) + (0.85 - 0.8)) / 2),
        (metrics.backward_transfer(BY_HAND, form="seed"), ((0.5 - 0.9) + (0.85 - 0.8)) / 3),
        (metrics.forward_transfer(BY_HAND, INITIAL), ((0.2 - 0.15) + (0.3 - 0.05)) / 2),
        (metrics.forgetting(BY_HAND), ((0.9 - 0.5) + (0.8 - 0.85)) / 2),
    ],
    ids=["acc", "la", "bwt_gem", "bwt_seed", "fwt", "forgetting"],
)
def test_the_matrix_computed_by_hand(got, wanted):
    assert got == pytest.approx(wanted, abs=1e-15)


@given(matrices(min_tasks=2), st.randoms())
def test_matrix_metrics_are_their_sums(rows, random):
    q = len(rows)
    initial = [random.random() for _ in range(q)]
    acc_QQ = tensor(rows)
    fall = sum(rows[q - 1][j] - rows[j][j] for j in range(q - 1))
    ahead = sum(rows[j - 1][j] - initial[j] for j in range(1, q))
    lost = sum(max(rows[i][j] for i in range(q - 1)) - rows[q - 1][j] for j in range(q - 1))
    for got, wanted in [
        (metrics.average_accuracy(acc_QQ), sum(rows[-1]) / q),
        (metrics.learning_accuracy(acc_QQ), sum(rows[j][j] for j in range(q)) / q),
        (metrics.backward_transfer(acc_QQ), fall / (q - 1)),
        (metrics.backward_transfer(acc_QQ, form="seed"), fall / q),
        (metrics.forward_transfer(acc_QQ, tensor([initial])[0]), ahead / (q - 1)),
        (metrics.forgetting(acc_QQ), lost / (q - 1)),
    ]:
        assert got == pytest.approx(wanted, abs=1e-12)


@given(matrices(min_tasks=2))
def test_nobody_forgets_less_than_the_fall_since_learning(rows):
    # the maximum includes acc[q, q], so forgetting is at least minus the GEM backward transfer
    assert metrics.forgetting(tensor(rows)) >= -metrics.backward_transfer(tensor(rows)) - 1e-12


def test_one_task_has_nothing_to_compare():
    acc_QQ = torch.tensor([[0.75]])
    assert metrics.average_accuracy(acc_QQ) == metrics.learning_accuracy(acc_QQ) == 0.75
    for value in (
        metrics.backward_transfer(acc_QQ),
        metrics.backward_transfer(acc_QQ, form="seed"),
        metrics.forward_transfer(acc_QQ, torch.tensor([0.1])),
        metrics.forgetting(acc_QQ),
    ):
        assert math.isnan(value)


def test_tasks_not_yet_trained_may_be_unmeasured():
    lower = BY_HAND.masked_fill(torch.ones(3, 3).triu(1).bool(), NAN)
    for metric in (
        metrics.average_accuracy,
        metrics.learning_accuracy,
        metrics.backward_transfer,
        metrics.forgetting,
    ):
        assert metric(lower) == metric(BY_HAND)
    assert math.isnan(metrics.forward_transfer(lower, INITIAL))


@pytest.mark.parametrize("place", [(1, 0), (1, 1), (2, 0)])
def test_a_missing_measurement_that_is_read_gives_nan(place):
    holed = BY_HAND.clone()
    holed[place] = NAN
    assert math.isnan(metrics.forgetting(holed))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=9), st.data()
)
def test_accuracy_top_k_ranks_with_ties_to_the_smaller_id(rows, data):
    labels = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    k = data.draw(st.integers(1, 5))
    right = 0
    for row, label in zip(rows, labels, strict=True):
        ranking = sorted(range(5), key=lambda c: (-row[c], c))
        right += label in ranking[:k]
    got = metrics.accuracy_top_k(torch.tensor(rows).float(), torch.tensor(labels), k)
    assert got == pytest.approx(right / len(rows), abs=1e-15)


def test_nan_scores_are_wrong_and_infinite_ones_rank():
    score_BC = torch.tensor([[NAN, 0.0], [0.0, NAN], [-math.inf, 0.0], [math.inf, 0.0]])
    assert metrics.accuracy_top_k(score_BC, torch.tensor([0, 0, 1, 0]), 1) == 0.5
    assert metrics.accuracy_top_k(score_BC, torch.tensor([0, 0, 1, 0]), 2) == 0.5


def test_no_input_has_no_accuracy():
    assert math.isnan(metrics.accuracy_top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.accuracy_top_k(torch.zeros(2, 3), torch.tensor([0, 1]), 0),
            "k must be in .* got 0",
        ),
        (
            lambda: metrics.accuracy_top_k(torch.zeros(2, 3), torch.tensor([0, 1]), 4),
            "k must be in .* got 4",
        ),
        (
            lambda: metrics.accuracy_top_k(torch.zeros(2, 3), torch.tensor([0, 3])),
            r"class ids in \[0, 2\], got 3",
        ),
        (
            lambda: metrics.accuracy_top_k(torch.zeros(2, 3), torch.tensor([0])),
            r"one class id per row of score_BC, \(2,\), got shape \(1,\)",
        ),
        (
            lambda: metrics.average_accuracy(torch.zeros(2, 3)),
            r"must be square .* got shape \(2, 3\)",
        ),
        (lambda: metrics.forgetting(torch.zeros(0, 0)), r"must be square .* got shape \(0, 0\)"),
        (lambda: metrics.learning_accuracy(torch.tensor([[90.0]])), r"in \[0, 1\], got 90"),
        (
            lambda: metrics.forward_transfer(BY_HAND, torch.zeros(2)),
            r"initial_Q must have 3 accuracies, .* got shape \(2,\)",
        ),
        (
            lambda: metrics.backward_transfer(BY_HAND, form="mean"),
            "form must be gem or seed, got 'mean'",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
