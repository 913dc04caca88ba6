"""What the routers of a model do with a text: a row per router, and the load as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gose_kernels as gk
from gose.report import svg


class RouterRow(NamedTuple):
    """One router over all tokens of a text.

    busiest    load of the most loaded expert over the mean load; 1 is even
    entropy    mean of the router's distribution in [0, 1]; 1 is even
    used_k     experts that ran per token
    drop_rate  share of the slots that routing gave but a capacity dropped
    dead       experts that no token chose
    """

    name: str
    experts: int
    tokens: int
    busiest: float
    entropy: float
    used_k: float
    drop_rate: float
    dead: tuple[int, ...]


class Inspection(NamedTuple):
    """Rows by router, and each expert's share of its router's load."""

    rows: list[RouterRow]
    share_E: dict[str, list[float]]


@torch.inference_mode()
def inspect(model: Any, ids_BT: Tensor, *, batch: int = 4) -> Inspection:
    """What every router does while the model reads the windows."""
    with gk.huggingface.watch_routers(model) as watches:
        for part_BT in ids_BT.split(batch):
            model(input_ids=part_BT, use_cache=False)
    return of_watches(watches)


def of_watches(watches: Mapping[str, gk.huggingface.RouterWatch]) -> Inspection:
    """The rows of what was watched; a router that saw no token is left out."""
    rows, shares = [], {}
    for name, watch in watches.items():
        if watch.tokens == 0:
            continue
        load, kept = int(watch.load_E.sum()), int(watch.kept_E.sum())
        mean = load / len(watch.load_E)
        rows.append(
            RouterRow(
                name,
                len(watch.load_E),
                watch.tokens,
                float(watch.load_E.max()) / mean if load else 0.0,
                watch.entropy_sum / watch.tokens,
                kept / watch.tokens,
                1 - kept / load if load else 0.0,
                tuple((watch.load_E == 0).nonzero().flatten().tolist()),
            )
        )
        shares[name] = (watch.load_E.double() / max(load, 1)).tolist()
    return Inspection(rows, shares)


def picture(found: Inspection) -> str:
    """An SVG file: a strip of cells per router, darker where an expert gets more; 0 is marked."""
    return svg.alone(
        svg.strips(
            found.share_E,
            title="Share of its router's load that each expert gets",
            form=lambda share: f"{share:.1%}",
        )
    )
