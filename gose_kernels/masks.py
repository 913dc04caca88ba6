"""Frozen masks: bool tensors, True = must not change, one value per expert, row or element."""

from __future__ import annotations

import torch
from torch import Tensor


def check_frozen(argument: str, frozen: Tensor, of: str, shape: torch.Size) -> None:
    """ValueError unless `frozen` is bool and broadcasts to `shape`, the shape of `of`."""
    if frozen.dtype != torch.bool:
        raise ValueError(f"{argument} must be bool, got {frozen.dtype}")
    pairs = zip(reversed(frozen.shape), reversed(shape), strict=False)
    fits = frozen.dim() <= len(shape) and all(own in (1, size) for own, size in pairs)
    if not fits:
        raise ValueError(
            f"{argument} must broadcast to the shape of {of} {tuple(shape)}, "
            f"got {tuple(frozen.shape)}"
        )
