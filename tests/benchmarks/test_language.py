"""The small language model: a run that was stopped repeats the whole one; rows say what was run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gose_kernels as gk
from benchmarks import _language, language
from gose import adaptive


def _trained(folder: Path) -> Any:
    net = _language.model(seed=0, experts=4, top_k=2)
    gk.huggingface.replace_moe_layers(net, router={})
    text_N = torch.arange(5000).square().remainder(251).to(torch.uint8)
    steps = gk.optim.MaskedAdamW(net.parameters(), lr=1e-3)
    _language.train(
        net, steps, text_N, steps=2, seed=1, rate=1e-3, folder=folder, tell=print, every=1
    )
    return net


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = _trained(tmp_path).state_dict()
    for name in ("json", "safetensors"):
        (tmp_path / f"step-00000002.{name}").unlink()  # as if stopped after the first step
    again = _trained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_rate_warms_up_and_decays_and_a_shorter_run_starts_like_a_longer_one() -> None:
    rate = _language._share_of_rate
    assert [rate(step, 100, 100) for step in (0, 4, 50, 99)] == pytest.approx(
        [0.2, 1, 0.5, 0.05], abs=0.01
    )
    assert all(rate(step, 64, 100) == rate(step, 100, 100) for step in range(57))
    assert rate(60, 64, 100) == pytest.approx(rate(60, 100, 100) / 2)
    assert 0 < rate(63, 64, 100) < 0.05


def test_files_are_held_out_whole_and_windows_are_theirs() -> None:
    text = _language.cpp_headers(2_000_000)
    assert min(text.validation_files, text.test_files) > 0
    assert text.train_files > text.validation_files + text.test_files
    assert sum(len(part_N) for part_N in text[:3]) <= 2_000_000
    content = bytes(text.train_N.tolist())
    ids_BT = _language.windows(text.train_N, 3, seed=5)
    assert all(bytes(ids_T.tolist()) in content for ids_T in ids_BT)
    assert torch.equal(ids_BT, _language.windows(text.train_N, 3, seed=5))
    most = _language.spread(text.test_N, 1 << 30)
    assert torch.equal(most.flatten(), text.test_N[: most.numel()].long())
    assert len(text.test_N) - most.numel() < _language.LENGTH
    assert torch.equal(
        _language.spread(text.test_N, 3), most[[i * len(most) // 3 for i in (0, 1, 2)]]
    )


def test_rows_of_adaptive_and_fixed_k(tmp_path: Path) -> None:
    net = _language.model(seed=0, experts=4, top_k=2).eval()
    text_N = torch.arange(5000).square().remainder(251).to(torch.uint8)
    validation_BT, test_BT = _language.spread(text_N[:600], 2), _language.spread(text_N[600:], 2)
    keep = language.keep_in(tmp_path)
    found = language.adaptive_rows(net, validation_BT, test_BT, keep)
    rows = {row["way"]: row for row in found}
    full = math.exp(_language.loss_of(net, test_BT))
    assert math.isclose(rows["top 2"]["perplexity"], full, rel_tol=1e-4)
    assert rows["top 2"]["fewer_flops"] == 1 and rows["top 1"]["fewer_flops"] == 2
    assert rows["mass 0.3"]["fewer_flops"] > rows["mass 0.6"]["fewer_flops"] >= 1
    assert all(layer.mlp.gate.top_k == 2 for layer in net.model.layers)
    (chosen,) = (row for row in found if row["chosen"])
    fits = [r for r in found if "mass" in r["way"] and r["validation_rise"] <= 0.008]
    assert chosen["fewer_flops"] == max(row["fewer_flops"] for row in fits)
    point = adaptive.run(net, validation_BT, 0.3)
    stock = adaptive.run(net, validation_BT, None)
    want = point.perplexity / stock.perplexity - 1
    assert math.isclose(rows["mass 0.3"]["validation_rise"], want, abs_tol=1e-9)


def test_rows_that_are_kept_are_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows"
    assert language.keep_in(path)("a", lambda: {"value": 1.5}) == {"value": 1.5}
    keep = language.keep_in(path)
    assert keep("a", lambda: {"value": 2.0}) == {"value": 1.5}
    assert keep("b", lambda: {"value": 3.0}) == {"value": 3.0}
