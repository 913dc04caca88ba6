from __future__ import annotations

import pytest
import torch

from gose import training
from gose.models import apply_chain, apply_stage, init_stage, num_macs, tap_stages


def _stage(**ends: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = init_stage(6, 10, 2, generator=generator, **ends)
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in params.items()}


def _norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_stage_is_its_formula():
    params = {k: v.double() for k, v in _stage(num_inputs=5, num_classes=3).items()}
    x = torch.randn(7, 5, dtype=torch.float64)
    h = _norm(x) @ params["embed.weight"].T + params["embed.bias"]
    for b in range(2):
        up = (_norm(h) @ params[f"{b}.up.weight"].T + params[f"{b}.up.bias"]).clamp_min(0)
        h = h + up @ params[f"{b}.down.weight"].T + params[f"{b}.down.bias"]
    logits = _norm(h) @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(apply_stage(params, x), logits)


def test_chain_is_stages_in_order_and_empty_chain_is_the_identity():
    stem, body = _stage(num_inputs=5), _stage()
    x = torch.randn(4, 5)
    assert torch.equal(apply_chain([stem, body], x), apply_stage(body, apply_stage(stem, x)))
    assert apply_chain([], x) is x


def test_taps_do_not_change_the_output_and_name_every_layer():
    stages = [_stage(num_inputs=5), _stage(num_classes=3)]
    x = torch.randn(4, 5)
    output, taps = tap_stages(stages, x)
    assert torch.equal(output, apply_chain(stages, x))
    names = [[tap.layer for tap in stage] for stage in taps]
    blocks = ["0.up", "0.down", "1.up", "1.down"]
    assert names == [["embed", *blocks], [*blocks, "head"]]
    for params, stage in zip(stages, taps, strict=True):
        for tap in stage:
            y = tap.input_BD @ params[f"{tap.layer}.weight"].T + params[f"{tap.layer}.bias"]
            torch.testing.assert_close(tap.output_BF, y)


def test_macs_are_the_hand_formula_and_half_of_torchs_flops():
    stages = [_stage(num_inputs=5), _stage(num_classes=3)]
    by_hand = 5 * 6 + 2 * (6 * 10 + 10 * 6) + 2 * (6 * 10 + 10 * 6) + 6 * 3
    assert num_macs(*stages) == by_hand
    flops = training.counted_flops(lambda: apply_chain(stages, torch.randn(9, 5)))
    assert flops == 2 * 9 * by_hand


def test_init_has_the_stated_variance():
    params = init_stage(200, 300, 1, generator=torch.Generator().manual_seed(0), num_inputs=100)
    for name, variance in (("embed", 1 / 100), ("0.up", 2 / 200), ("0.down", 0.25 / 300)):
        assert float(params[f"{name}.weight"].var()) == pytest.approx(variance, rel=0.05)
        assert not params[f"{name}.bias"].any()
