"""Closed-form merges: the parameters at which the sites' quadratic losses have their minimum.

P parameters, S sites. Site s moved from the common theta_0 by delta_s and tells how curved its loss
is there, H_s (diagonal). With shares a_s that sum to 1

    theta = argmin sum_s a_s (theta - theta_s)^T H_s (theta - theta_s)
          = theta_0 + (sum_s a_s H_s)^-1 sum_s a_s H_s delta_s

H_s = 1 gives the weighted mean [McMahan et al. 2016, Algorithm 1]; H_s = diagonal Fisher
information gives Fisher merging [Matena and Raffel 2022], here of updates, so that theta_0 is kept
exactly where nobody moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gose.compress import Payload, add_, decode


class Update(NamedTuple):
    """What a site sends about one vector of parameters.

    delta: its change. root_fisher: square root of its diagonal Fisher information, which codes
    better than the information itself (half the decades); None where the method needs none.
    """

    delta: Payload
    root_fisher: Payload | None = None


Merge: TypeAlias = Callable[[Tensor, Sequence[Update], Sequence[float]], Tensor]


def mean_merge(base_P: Tensor, updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
    """base + weighted mean of the updates; the weights are normalized here."""
    merged_P = base_P.clone()
    for update, share in zip(updates, _shares(updates, weights), strict=True):
        add_(merged_P, update.delta, share)
    return merged_P


def fisher_merge(base_P: Tensor, updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
    """base + mean of the updates, each element weighted by share and Fisher information.

    Every site's information is divided by its mean and gets 1e-3 added: only what matters where
    is compared, not how sure a site is on the whole, and elements that matter to nobody take the
    plain mean. Equal information gives the mean up to rounding.
    """
    top_P, total_P = torch.zeros_like(base_P), torch.zeros_like(base_P)
    for update, share in zip(updates, _shares(updates, weights), strict=True):
        if update.root_fisher is None:
            raise ValueError("merge.fisher_merge: every update must carry root_fisher")
        fisher_P = decode(update.root_fisher).square()
        fisher_P = fisher_P / fisher_P.mean().clamp_min(1e-30) + 1e-3
        top_P += share * fisher_P * decode(update.delta)
        total_P += share * fisher_P
    return base_P + top_P / total_P


MERGES: Mapping[str, Merge] = {"mean": mean_merge, "fisher": fisher_merge}
SENDS_FISHER = frozenset({"fisher"})


def _shares(updates: Sequence[Update], weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if len(weights) != len(updates) or not updates or not total > 0 or min(weights) < 0:
        raise ValueError(
            f"merge: wants one non-negative weight per update and a positive sum, "
            f"got {len(updates)} updates and weights {list(weights)}"
        )
    return [weight / total for weight in weights]
