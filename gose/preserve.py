"""Critical parameters: how much each one matters (sensitivity), and which are frozen (KPP).

B images, C classes. A frozen mask is True where the element must not change any more. Masks are
found per tensor, so that no tensor is left without plasticity, and only grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

import gose_kernels as gk
from gose.models import Params, tap_stages

Scores: TypeAlias = dict[str, Tensor]


def fisher(stages: Sequence[Params], x_BD: Tensor, *, generator: torch.Generator) -> list[Scores]:
    """True diagonal Fisher information of every tensor of the chain, per stage.

    F_j = mean over images of (d log p(y | x) / d theta_j)^2 with y drawn from the model's own p:
    no labels are needed, and KL(p_theta || p_theta+d) = 1/2 sum_j F_j d_j^2 + O(d^3). The square is
    taken per image, not of the batch mean [Kirkpatrick et al. 2017; Kunstner et al. 2019].
    """
    # A leaf input makes autograd reach every layer's output without any weight gradient.
    logits_BC, taps = tap_stages(stages, x_BD.detach().clone().requires_grad_())
    with torch.no_grad():
        label_B = torch.multinomial(logits_BC.softmax(-1), 1, generator=generator)
    log_p_B = logits_BC.log_softmax(-1).gather(1, label_B)
    flat = [tap for stage in taps for tap in stage]
    grads = iter(torch.autograd.grad(log_p_B.sum(), [tap.output_BF for tap in flat]))
    found: list[Scores] = []
    for stage in taps:
        scores: Scores = {}
        for tap in stage:
            square_FD, square_F = gk.squared_grad(tap.input_BD.detach(), next(grads))
            scores[f"{tap.layer}.weight"] = square_FD / len(x_BD)
            scores[f"{tap.layer}.bias"] = square_F / len(x_BD)
        found.append(scores)
    return found


def fisher_scores(score: Tensor, generator: torch.Generator) -> Tensor:
    """Most sensitive first."""
    return score


def random_scores(score: Tensor, generator: torch.Generator) -> Tensor:
    """The control: as many elements of the same tensor, drawn without looking at them."""
    return torch.rand(score.shape, generator=generator)


CRITERIA: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "fisher": fisher_scores,
    "random": random_scores,
}


def freeze(
    scores: Scores,
    frozen: Mapping[str, Tensor],
    *,
    fraction: float,
    method: str = "fisher",
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The masks with `fraction` of the free elements of each tensor frozen as well.

    Rounded down; the elements of largest score, ties to the smaller flat index. Method "none"
    freezes nothing.
    """
    if method == "none":
        return dict(frozen)
    if method not in CRITERIA:
        raise ValueError(
            f"preserve.freeze: method must be one of {', '.join([*CRITERIA, 'none'])}, "
            f"got {method!r}"
        )
    return {
        name: _freeze_top(CRITERIA[method](scores[name], generator), mask, fraction)
        for name, mask in frozen.items()
    }


def coverage(scores: Sequence[Scores], frozen: Sequence[Mapping[str, Tensor]]) -> float:
    """Share of the whole sensitivity that the frozen elements hold; 1 if there is none."""
    pairs = [
        (s[name], mask) for s, m in zip(scores, frozen, strict=True) for name, mask in m.items()
    ]
    whole = sum(float(score.sum(dtype=torch.float64)) for score, _ in pairs)
    kept = sum(float(score[mask].sum(dtype=torch.float64)) for score, mask in pairs)
    return kept / whole if whole > 0 else 1.0


def nothing_frozen(params: Params) -> dict[str, Tensor]:
    """Masks of False in the shapes of the tensors."""
    return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in params.items()}


def _freeze_top(score: Tensor, frozen: Tensor, fraction: float) -> Tensor:
    count = int(fraction * int((~frozen).sum()))
    # torch.sort is stable, topk is not; frozen elements go last.
    order = score.masked_fill(frozen, -torch.inf).flatten().sort(descending=True, stable=True)
    mask = frozen.flatten().clone()
    mask[order.indices[:count]] = True
    return mask.view_as(frozen)
