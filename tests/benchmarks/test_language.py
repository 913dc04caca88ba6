"""The small language model: a run that was stopped repeats the whole one; rows say what was run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import gose_kernels as gk
from benchmarks import _language, language


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


def test_files_are_held_out_whole_and_windows_are_theirs() -> None:
    text = _language.cpp_headers(1_000_000)
    assert 0 < text.held_files < text.files
    assert len(text.train_N) + len(text.held_N) <= 1_000_000
    ids_BT = _language.windows(text.train_N, 3, seed=5)
    content = bytes(text.train_N.tolist())
    assert all(bytes(ids_T.tolist()) in content for ids_T in ids_BT)
    assert torch.equal(ids_BT, _language.windows(text.train_N, 3, seed=5))


def test_rows_of_adaptive_and_fixed_k() -> None:
    net = _language.model(seed=0, experts=4, top_k=2).eval()
    train_N = torch.arange(5000).square().remainder(251).to(torch.uint8)
    text = _language.Text(train_N, train_N, 1, 1)
    rows = {row["way"]: row for row in language.adaptive_rows(net, text, 2)}
    loss = _language.loss_of(net, text.held_N, 2)
    assert math.isclose(rows["top 2"]["perplexity"], math.exp(loss), rel_tol=1e-4)
    assert rows["top 2"]["fewer_flops"] == 1 and rows["top 1"]["fewer_flops"] == 2
    assert rows["mass 0.3"]["fewer_flops"] > rows["mass 0.6"]["fewer_flops"] >= 1
    assert all(layer.mlp.gate.top_k == 2 for layer in net.model.layers)
