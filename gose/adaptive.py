"""Fewer experts for sure tokens: the threshold that gives a wanted saving, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import gose_kernels as gk
from gose import language

_MOST_RUNS = 12
_CLOSE = 0.005  # of the experts' FLOPs


class Point(NamedTuple):
    """One threshold: the share of expert FLOPs that it saves, and what the model then does."""

    mass: float
    saving: float
    expert_flops_per_token: float
    perplexity: float


class Calibration(NamedTuple):
    """The threshold that was found, the model without it, and every threshold tried."""

    chosen: Point
    full: Point
    tried: list[Point]


def run(model: Any, ids_BT: Tensor, mass: float | None) -> Point:
    """One pass with `adaptive_k=mass` (None: all of a token's experts); the model is put back.

    ValueError for a model without a router on which `adaptive_k` can act.
    """
    done = gk.huggingface.replace_moe_layers(model, adaptive_k=mass, router={})
    try:
        with gk.huggingface.watch_routers(model) as watches:
            swapped = {row.name for row in done.rows if row.swapped}
            if not swapped & set(watches):
                reasons = "; ".join(f"{r.name}: {r.how}" for r in done.rows if r.name in watches)
                raise ValueError(f"calibrate: no router of the model can run on route: {reasons}")
            perplexity = language.perplexity(model, ids_BT)
    finally:
        done.restore()
    flops = sum(watch.flops for watch in watches.values())
    full = sum(w.tokens * w.top_k * w.flops_per_slot for w in watches.values())
    return Point(
        1.0 if mass is None else mass, 1 - flops / full, flops / ids_BT.numel(), perplexity
    )


def calibrate(model: Any, ids_BT: Tensor, saving: float) -> Calibration:
    """The mass whose executed expert FLOPs are `saving` less than with every token's top_k experts.

    A saving within 0.005 of the wanted one, else the nearest of 12 bisections: it falls as the
    mass grows. ValueError for a saving that one expert a token does not reach.
    """
    if not 0 < saving < 1:
        raise ValueError(f"calibrate: saving must be between 0 and 1, got {saving}")
    full = run(model, ids_BT, None)
    low, high = 0.0, 1.0
    tried: list[Point] = []
    while len(tried) < _MOST_RUNS:
        mass = (low + high) / 2 if tried else 1e-6
        point = run(model, ids_BT, mass)
        tried.append(point)
        if len(tried) == 1 and point.saving < saving - _CLOSE:
            raise ValueError(
                f"calibrate: saving must be at most {point.saving:.3f}, which is that of one "
                f"expert a token, got {saving}"
            )
        if abs(point.saving - saving) <= _CLOSE:
            break
        low, high = (mass, high) if point.saving > saving else (low, mass)
    chosen = min(tried, key=lambda point: abs(point.saving - saving))
    return Calibration(chosen, full, sorted(tried))
