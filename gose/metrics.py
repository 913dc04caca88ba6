"""Accuracy, and what an accuracy matrix says about learning one task after another.

B inputs, C classes, Q tasks. acc_QQ[i, j]: accuracy on task j after training task i, in [0, 1].
Entries above the diagonal (tasks not yet trained) may be NaN where a metric does not read them.
A metric that compares tasks is NaN for Q = 1: there is nothing to compare, and 0 would claim that
nothing was forgotten.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def accuracy_top_k(score_BC: Tensor, label_B: Tensor, k: int = 1) -> float:
    """Share of inputs whose label is among the k classes of highest score; NaN for B = 0.

    Ties go to the smaller class id. An input with a NaN score counts as wrong.
    """
    num_inputs, num_classes = score_BC.shape
    if not 1 <= k <= num_classes:
        raise ValueError(f"accuracy_top_k: k must be in [1, {num_classes}], the classes, got {k}")
    if label_B.shape != (num_inputs,):
        raise ValueError(
            f"accuracy_top_k: label_B must have one class id per row of score_BC, ({num_inputs},), "
            f"got shape {tuple(label_B.shape)}"
        )
    wrong = label_B[(label_B < 0) | (label_B >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"accuracy_top_k: label_B must hold class ids in [0, {num_classes - 1}], "
            f"got {wrong[0].item()}"
        )
    if num_inputs == 0:
        return math.nan
    own_B1 = score_BC.gather(1, label_B.unsqueeze(1))
    smaller_id_BC = torch.arange(num_classes, device=score_BC.device) < label_B.unsqueeze(1)
    ahead_B = ((score_BC > own_B1) | ((score_BC == own_B1) & smaller_id_BC)).sum(dim=1)
    right_B = (ahead_B < k) & ~score_BC.isnan().any(dim=1)
    return right_B.double().mean().item()


def average_accuracy(acc_QQ: Tensor) -> float:
    """Mean accuracy over all tasks after the last one: ACC.

    1/Q * sum_q acc[Q-1, q]  [Lopez-Paz & Ranzato 2017]
    """
    return _matrix("average_accuracy", acc_QQ)[-1].mean().item()


def learning_accuracy(acc_QQ: Tensor) -> float:
    """Mean accuracy on each task just after training it.

    1/Q * sum_q acc[q, q]  [Riemer et al. 2019, LA]
    """
    return _matrix("learning_accuracy", acc_QQ).diagonal().mean().item()


def backward_transfer(acc_QQ: Tensor, *, form: Literal["gem", "seed"] = "gem") -> float:
    """Mean change of task accuracy between learning it and the end; negative is forgetting.

    NaN for Q = 1.
    gem:  1/(Q-1) * sum_{q<Q-1} (acc[Q-1, q] - acc[q, q])  [Lopez-Paz & Ranzato 2017]
    seed: the same sum divided by Q (its last term is zero).
    """
    if form not in ("gem", "seed"):
        raise ValueError(f"backward_transfer: form must be gem or seed, got {form!r}")
    acc_QQ = _matrix("backward_transfer", acc_QQ)
    num_tasks = len(acc_QQ)
    if num_tasks == 1:
        return math.nan
    change_Q = (acc_QQ[-1] - acc_QQ.diagonal())[:-1]
    return change_Q.sum().item() / (num_tasks - 1 if form == "gem" else num_tasks)


def forward_transfer(acc_QQ: Tensor, initial_Q: Tensor) -> float:
    """Mean gain on a task before training it, over the untrained model; NaN for Q = 1.

    1/(Q-1) * sum_{q>0} (acc[q-1, q] - initial[q])  [Lopez-Paz & Ranzato 2017]
    initial_Q: accuracy of the model before the first task.
    """
    acc_QQ = _matrix("forward_transfer", acc_QQ)
    if initial_Q.shape != acc_QQ.shape[:1]:
        raise ValueError(
            f"forward_transfer: initial_Q must have {len(acc_QQ)} accuracies, one per task, "
            f"got shape {tuple(initial_Q.shape)}"
        )
    if len(acc_QQ) == 1:
        return math.nan
    return (acc_QQ.diagonal(1) - initial_Q[1:].to(acc_QQ)).mean().item()


def forgetting(acc_QQ: Tensor) -> float:
    """Mean fall of task accuracy from its best before the last task to the end; NaN for Q = 1.

    1/(Q-1) * sum_{q<Q-1} (max_{l<Q-1} acc[l, q] - acc[Q-1, q])  [Chaudhry et al. 2018]
    The last row takes no part in the maximum, so a task that improved to the end counts negative.
    Entries above the diagonal take part where they are measured; NaN there is left out.
    """
    acc_QQ = _matrix("forgetting", acc_QQ)
    if len(acc_QQ) == 1:
        return math.nan
    above_QQ = torch.ones_like(acc_QQ).triu(1).bool()
    best_Q = acc_QQ.masked_fill(above_QQ & acc_QQ.isnan(), -math.inf)[:-1].amax(dim=0)
    return (best_Q - acc_QQ[-1])[:-1].mean().item()


def _matrix(name: str, acc_QQ: Tensor) -> Tensor:
    if acc_QQ.dim() != 2 or acc_QQ.shape[0] != acc_QQ.shape[1] or not len(acc_QQ):
        raise ValueError(
            f"{name}: acc_QQ must be square with a row and a column per task, "
            f"got shape {tuple(acc_QQ.shape)}"
        )
    wrong = acc_QQ[(acc_QQ < 0) | (acc_QQ > 1)]
    if len(wrong):
        raise ValueError(f"{name}: acc_QQ must hold accuracies in [0, 1], got {wrong[0].item()}")
    return acc_QQ.double()
