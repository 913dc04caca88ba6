from __future__ import annotations

import math

import torch

from gose.plasticity import task_weights


def test_less_sure_teachers_give_more_weight_to_the_label():
    logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    p = logits.double().softmax(-1)
    u = -(p * p.log()).sum(-1) / math.log(3)
    weight = task_weights(logits, task_weight=0.5, span=0.4)
    torch.testing.assert_close(weight.double(), 0.5 + 0.4 * (u - u.mean()), rtol=1e-5, atol=1e-6)
    assert weight[0] < weight[1] < weight[2]
    assert float(weight.mean()) == 0.5
    assert task_weights(logits, task_weight=0.3, span=0.0).tolist() == [0.30000001192092896] * 3


def test_weights_stay_between_0_and_1_and_carry_no_gradient():
    logits = torch.tensor([[50.0, 0.0], [0.0, 0.0]], requires_grad=True)
    weight = task_weights(logits, task_weight=0.1, span=1.0)
    assert weight.tolist() == [0.0, 0.6000000238418579]
    assert not weight.requires_grad
