"""Uncertainty-guided balance between following the teacher and learning from labels."""

from __future__ import annotations

from torch import Tensor

import gose_kernels as gk


def task_weights(teacher_BC: Tensor, *, task_weight: float, span: float) -> Tensor:
    """Weight of the label term for every image: the less sure the teacher, the more its label.

    u[b] = H(softmax(teacher[b])) / log C in [0, 1]
    weight[b] = task_weight + span * (u[b] - mean u), clamped to [0, 1]
    Centred, so that `span` moves weight between images and not the balance as a
    whole. span 0 gives task_weight everywhere. The entropy is a constant of the gradient.
    """
    uncertainty_B = gk.entropy(teacher_BC.detach())
    centred_B: Tensor = uncertainty_B - uncertainty_B.mean()
    return (task_weight + span * centred_B).clamp(0, 1)
