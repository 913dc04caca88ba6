"""A layer, its optimizer and its packed weights made anew from plain dicts, one entry an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk

D, F, K, CAPACITY = 16, 24, 2, 8
MOMENTS = {
    gk.optim.MaskedAdamW: ("exp_avg", "exp_avg_sq"),
    gk.optim.MaskedSGD: ("momentum_buffer",),
}
OPTIONS: dict[Any, dict[str, float]] = {
    gk.optim.MaskedAdamW: {"lr": 1e-2, "weight_decay": 0.1},
    gk.optim.MaskedSGD: {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
}
Book = dict[str, dict[str, Any]]  # expert -> what it is, apart from every other


def new_layer(num_experts: int) -> gk.MoE:
    seed = torch.Generator().manual_seed(num_experts)
    return gk.MoE(D, F, num_experts, K, bias=True, renormalize=True, generator=seed)


def stacked(moe: gk.MoE) -> dict[str, torch.nn.Parameter]:
    return dict(moe.named_parameters())


def dense_state(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """Moments and step counts with a row per slot, zeros where the optimizer keeps none."""
    state = optimizer.state.get(p, {})
    found: dict[str, Tensor] = {}
    for name in MOMENTS[type(optimizer)] if state else ():
        rows = state[name] if name in state else torch.zeros_like(p)
        if "row" in state:
            dense = torch.zeros(p.shape)
            row = state["row"].tolist()
            units = dense.view(len(row), -1)
            for unit, at in enumerate(row):
                if at >= 0:
                    units[unit] = state[name][at]
            rows = dense
        found[name] = rows
    if "step" in state:
        count = state["step"]
        if count.dim() == 0:
            mask = optimizer.frozen.get(p)
            count = count.expand(p.shape[0]) if mask is None else torch.where(mask, 0.0, count)
        found["step"] = count.reshape(-1).expand(p.shape[0])
    return found


def record(moe: gk.MoE, optimizer: Any, name: str, slot: int, before: dict[str, Any]) -> Any:
    """The book's entry of the expert in a slot; flags stay as they are."""
    entry: dict[str, Any] = {**before, "rows": {}, "state": {}}
    for key, p in stacked(moe).items():
        entry["rows"][key] = p.detach()[slot].clone()
        entry["state"][key] = {k: v[slot].clone() for k, v in dense_state(optimizer, p).items()}
    return entry


def rebuilt(book: Book, slots: list[str | None], kind: Any) -> tuple[gk.MoE, Any]:
    """The layer of the book with an optimizer of a kind, from new tensors alone."""
    moe = new_layer(CAPACITY)
    live = [name is not None and book[name]["awake"] for name in slots]
    frozen = [name is not None and book[name]["frozen"] for name in slots]
    columns = [name is not None and book[name]["column_frozen"] for name in slots]
    moe.gate.register_buffer("live_E", torch.tensor(live))
    moe.experts.register_buffer("frozen_E", torch.tensor(frozen))
    optimizer = kind(moe.parameters(), **OPTIONS[kind])
    for key, p in stacked(moe).items():
        still = columns if key == "gate.weight" else frozen
        mask_E = torch.tensor([s or not a for s, a in zip(still, live, strict=True)])
        optimizer.set_frozen(p, mask_E.view(-1, *[1] * (p.dim() - 1)))
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            p.zero_()
            for slot, name in enumerate(slots):
                if name is None:
                    continue
                p[slot] = book[name]["rows"][key]
                for k, row in book[name]["state"][key].items():
                    size = (CAPACITY, *[1] * (p.dim() - 1)) if k == "step" else p.shape
                    state.setdefault(k, torch.zeros(size))[slot] = row
        if state:
            optimizer.state[p] = state
    return moe, optimizer


def train_step(moe: gk.MoE, optimizer: Any, seed: int) -> None:
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(seed))
    out, _ = moe(x)
    optimizer.zero_grad()
    (out - x).square().mean().backward()
    optimizer.step()
