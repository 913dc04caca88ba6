"""Norms of the gradients of live elements, and clipping by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gose_kernels import masks, shards
from gose_kernels.masks import Frozen, Importance
from gose_kernels.ops.masked_square_sum import masked_square_sum


def mask_lists(
    frozen: Sequence[Frozen | None], device: torch.device
) -> tuple[list[Tensor], list[float]]:
    """`frozen` and `threshold` of an op for parameters with these masks."""
    if all(f is None for f in frozen):
        return [], []
    free = torch.zeros((), dtype=torch.bool, device=device)
    scores = any(f is not None and f.mask.dtype == torch.float32 for f in frozen)
    return (
        [free if f is None else f.mask for f in frozen],
        [0.0 if f is None else f.threshold for f in frozen] if scores else [],
    )


def _square_norm(params: Iterable[Tensor], frozen: Mapping[Tensor, Frozen]) -> Tensor:
    """Sum of squares of all live gradient elements, over all shards, float64."""
    alike: dict[Any, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            alike.setdefault((p.device, p.dtype, *shards.layout(p)), []).append(p)
    total: Tensor | None = None  # not a zero on the CPU: its way to a GPU would be waited for
    for group in alike.values():
        found = [frozen.get(p) for p in group]
        grads = [shards.local(cast(Tensor, p.grad)) for p in group]
        mask, threshold = mask_lists(found, group[0].device)
        own = masked_square_sum(grads, mask, threshold=threshold).sum()
        own = shards.sum_over(group[0], own)
        total = own if total is None else total.to(own.device) + own
    return torch.zeros((), dtype=torch.float64) if total is None else total


def live_norm(
    params: Sequence[Tensor], frozen: Mapping[Tensor, Frozen], norm_type: float
) -> Tensor:
    """The norm of all live gradient elements."""
    if norm_type == 2.0:
        widest = any(p.dtype == torch.float64 for p in params)
        return _square_norm(params, frozen).sqrt().to(torch.float64 if widest else torch.float32)
    grads = []
    for p in params:
        if p.grad is not None:
            mask = frozen[p].spread(shards.local(p).shape) if p in frozen else None
            live = p.grad if mask is None else torch.where(shards.like(p, mask), 0, p.grad)
            grads.append(live)
    return shards.whole(torch.nn.utils.get_total_norm(grads, norm_type))


@torch.no_grad()
def clip_grad_norm_(
    params: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    frozen: Mapping[Any, Tensor | Importance] | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Norm of all live gradient elements before they are scaled to at most max_norm, in place.

    As torch.nn.utils.clip_grad_norm_, except that elements that are frozen (`frozen` as in
    MaskedAdamW) count in no norm and keep their gradient's bits. Of DTensors the norm is that of
    all shards. With error_if_nonfinite a norm that is NaN or infinite raises RuntimeError and
    nothing is scaled.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    given = {} if frozen is None else frozen
    where = "clip_grad_norm_: a mask in frozen"
    found = {
        p: masks.frozen(where, shards.cut(where, p, given[p]), shards.local(p).shape)
        for p in params
        if p in given
    }
    norm = live_norm(params, found, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {norm_type} of the live gradients is {float(norm)}"
        )
    scale = clip_scale(norm, max_norm)
    for p in params:
        if p.grad is not None:
            grad = shards.local(p.grad)
            scaled = grad * scale.to(grad)
            if p in found:
                scaled = torch.where(found[p].spread(grad.shape), grad, scaled)
            grad.copy_(scaled)
    return norm


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What the gradients are multiplied by."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: torch.nn.utils.clip_grad_norm_
