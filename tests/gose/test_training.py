from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy

from gose.models import apply_chain, init_stage, num_macs
from gose.training import fit, flat, flat_mask, unflat

_X = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
_LABEL = torch.arange(40) % 3


def _stages():
    generator = torch.Generator().manual_seed(2)
    return [
        init_stage(6, 8, 1, generator=generator, num_inputs=5),
        init_stage(6, 8, 1, generator=generator, num_classes=3),
    ]


def _loss(stages, index):
    return cross_entropy(apply_chain(stages, _X[index]), _LABEL[index])


def _fit(stages, epochs, **options):
    return fit(
        stages,
        _loss,
        num_images=40,
        batch_size=16,
        epochs=epochs,
        total_epochs=4,
        lr=0.01,
        weight_decay=0.1,
        generator=torch.Generator().manual_seed(epochs.start),
        **options,
    )


def test_fit_follows_torchs_adamw_with_the_stated_schedule():
    fitted = _fit(_stages(), range(2))
    leaves = [{k: v.clone().requires_grad_() for k, v in p.items()} for p in _stages()]
    tensors = [t for p in leaves for t in p.values()]
    adamw = torch.optim.AdamW(tensors, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(2):
        order = torch.randperm(40, generator=generator)
        for step in range(2):
            share = (epoch * 2 + step) / 8
            adamw.param_groups[0]["lr"] = 0.01 * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))
            adamw.zero_grad()
            _loss(leaves, order[step * 16 : step * 16 + 16]).backward()
            adamw.step()
    for got, wanted in zip(fitted.stages, leaves, strict=True):
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name].detach(), rtol=1e-4, atol=1e-6)


def test_flops_are_torchs_count_by_hand():
    stages = _stages()
    fitted = _fit(stages, range(1))
    # forward and weight gradient everywhere; the embedding needs no gradient of its input
    per_image = 6 * num_macs(*stages) - 2 * 5 * 6
    assert fitted.flops == 2 * 16 * per_image
    assert fitted.images == 32


def test_frozen_elements_keep_their_bits_and_the_others_move():
    stages = _stages()
    masks = [
        {name: torch.rand(t.shape, generator=torch.Generator().manual_seed(8)) < 0.5}
        for params in stages
        for name, t in list(params.items())[:1]
    ]
    fitted = _fit(stages, range(3), frozen=masks)
    for before, after, mask in zip(stages, fitted.stages, masks, strict=True):
        for name, tensor in before.items():
            frozen = mask.get(name, torch.zeros_like(tensor, dtype=torch.bool))
            assert torch.equal(after[name][frozen], tensor[frozen])
            assert (after[name][~frozen] != tensor[~frozen]).any()


def test_moments_carry_over_to_the_next_epochs():
    first = _fit(_stages(), range(1))
    assert set(first.moments) == {"exp_avg", "exp_avg_sq", "step"}
    assert float(first.moments["step"]) == 2
    kept = {name: t.clone() for name, t in first.moments.items()}
    second = _fit(first.stages, range(1, 2), moments=first.moments)
    assert float(second.moments["step"]) == 4
    assert all(torch.equal(first.moments[name], kept[name]) for name in kept)
    fresh = _fit(first.stages, range(1, 2))
    assert not torch.equal(fresh.stages[0]["embed.weight"], second.stages[0]["embed.weight"])


def test_flat_and_unflat_are_inverse_and_masks_line_up():
    stages = _stages()
    vector = flat(stages)
    for got, wanted in zip(unflat(vector, stages), stages, strict=True):
        assert list(got) == list(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert flat_mask(stages, None) is None
    masks = [{"embed.bias": torch.ones(6, dtype=torch.bool)}, {}]
    mask = flat_mask(stages, masks)
    assert torch.equal(vector[mask], stages[0]["embed.bias"])
