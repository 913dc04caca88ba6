from __future__ import annotations

import re

import pytest
import torch
from torch.func import grad, vmap

from gose import preserve
from gose.models import apply_chain, init_stage


def _chain():
    generator = torch.Generator().manual_seed(5)
    return [
        init_stage(6, 7, 1, generator=generator, num_inputs=5),
        init_stage(6, 9, 1, generator=generator, num_classes=4),
    ]


def test_fisher_is_the_mean_of_squared_per_image_gradients_of_sampled_labels():
    stages, x = _chain(), torch.randn(50, 5)
    found = preserve.fisher(stages, x, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        p = apply_chain(stages, x).softmax(-1)
    label = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7))[:, 0]

    def log_p(stages, x, label):
        return (apply_chain(stages, x[None])[0].log_softmax(-1) * label).sum()

    grads = vmap(grad(log_p), in_dims=(None, 0, 0))(stages, x, torch.eye(4)[label])
    for scores, per_image in zip(found, grads, strict=True):
        assert list(scores) and set(scores) == set(per_image)
        for name, score in scores.items():
            torch.testing.assert_close(
                score, per_image[name].square().mean(0), rtol=1e-4, atol=1e-8
            )
            batch_mean = per_image[name].mean(0).square()
            assert not torch.allclose(score, batch_mean, rtol=0.1)


def test_fisher_predicts_the_change_of_the_output_distribution():
    stages = [{k: v.double() for k, v in p.items()} for p in _chain()]
    x = torch.randn(4000, 5, dtype=torch.float64)
    scores = preserve.fisher(stages, x, generator=torch.Generator().manual_seed(0))
    p = apply_chain(stages, x).log_softmax(-1)
    for name in ("head.weight", "0.down.bias"):
        moved = [dict(s) for s in stages]
        step = torch.zeros_like(moved[1][name])
        step.view(-1)[3] = 0.02
        moved[1][name] = moved[1][name] + step
        q = apply_chain(moved, x).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        predicted = 0.5 * (scores[1][name] * step.square()).sum()
        assert float(kl) == pytest.approx(float(predicted), rel=0.15)


def test_freeze_takes_the_most_sensitive_free_elements_of_each_tensor():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 2.0]), "b": torch.tensor([[9.0, 8.0], [7.0, 6.0]])}
    frozen = {
        "a": torch.zeros(4, dtype=torch.bool),
        "b": torch.tensor([[True, False], [False, False]]),
    }
    generator = torch.Generator().manual_seed(0)
    masks = preserve.freeze(scores, frozen, fraction=0.5, generator=generator)
    assert masks["a"].tolist() == [True, False, True, False]  # ties to the smaller index
    assert masks["b"].tolist() == [[True, True], [False, False]]  # 1 of 3 free ones
    assert preserve.freeze(scores, frozen, fraction=1.0, generator=generator)["b"].all()
    same = preserve.freeze(scores, frozen, fraction=0.9, method="none", generator=generator)
    assert same == frozen


def test_random_masks_freeze_as_many_but_others():
    scores = {"w": torch.arange(1000.0)}
    frozen = {"w": torch.zeros(1000, dtype=torch.bool)}

    def masks(method, seed):
        generator = torch.Generator().manual_seed(seed)
        return preserve.freeze(scores, frozen, fraction=0.3, method=method, generator=generator)[
            "w"
        ]

    assert int(masks("random", 0).sum()) == int(masks("fisher", 0).sum()) == 300
    assert torch.equal(masks("random", 0), masks("random", 0))
    overlap = int((masks("random", 0) & masks("random", 1)).sum())
    assert 60 < overlap < 120  # 90 expected
    assert torch.equal(masks("fisher", 0), scores["w"] >= 700)


def test_coverage_is_the_share_of_sensitivity_held():
    scores = [{"w": torch.tensor([1.0, 2.0, 5.0])}, {"w": torch.tensor([2.0])}]
    frozen = [{"w": torch.tensor([False, False, True])}, {"w": torch.tensor([True])}]
    assert preserve.coverage(scores, frozen) == 0.7
    assert preserve.coverage([{"w": torch.zeros(2)}], [{"w": torch.zeros(2).bool()}]) == 1.0


def test_freeze_refuses_an_unknown_method():
    message = "preserve.freeze: method must be one of fisher, random, none, got 'magic'"
    with pytest.raises(ValueError, match=re.escape(message)):
        preserve.freeze(
            {"w": torch.ones(2)},
            {"w": torch.zeros(2).bool()},
            fraction=0.5,
            method="magic",
            generator=torch.Generator(),
        )
