"""Frozen masks: what must not change, one value per expert, row, block or element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def check_divides(argument: str, mask: Tensor, of: str, shape: Sequence[int]) -> None:
    """ValueError unless every size of `mask`, aligned at the last one, divides that of `shape`.

    So one value serves an expert, a row, a block (two values for six columns: three each) or an
    element; broadcasting is the case of sizes 1.
    """
    pairs = list(zip(reversed(mask.shape), reversed(shape), strict=False))
    fits = all(own in (1, size) or (0 < own <= size and size % own == 0) for own, size in pairs)
    if mask.dim() > len(shape) or not fits:
        raise ValueError(
            f"{argument} must have sizes that divide those of {of} {tuple(shape)}, "
            f"got {tuple(mask.shape)}"
        )


def spread(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values whose sizes divide those of `shape`, repeated (as a view where they broadcast)."""
    values = values.reshape((1,) * (len(shape) - values.dim()) + tuple(values.shape))
    for dim, size in enumerate(shape):
        if values.shape[dim] not in (1, size):
            values = values.repeat_interleave(size // values.shape[dim], dim)
    return values.expand(tuple(shape))


def unit_shape(mask_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The smallest shape that such a mask can be spread to so that unit u of it, in order, serves
    the elements u * n .. u * n + n - 1 of a tensor of `shape`; it has as many dimensions."""
    own = [1] * (len(shape) - len(mask_shape)) + list(mask_shape)
    last = max((d for d, size in enumerate(own) if size != 1), default=-1)
    return (*shape[: max(last, 0)], *own[max(last, 0) :]) if last >= 0 else (1,) * len(shape)


def num_bytes(shape: Sequence[int]) -> int:
    """Bytes of a packed mask of a tensor."""
    return (math.prod(shape) + 7) // 8


def pack(frozen: Tensor) -> Tensor:
    """A bool tensor as uint8 of one bit each: bit i % 8 of byte i // 8, the lowest first."""
    bits = frozen.reshape(-1)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    out = torch.zeros(len(padded), dtype=torch.uint8, device=frozen.device)
    for bit in range(8):
        out |= padded[:, bit].to(torch.uint8) << bit
    return out


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of `shape` that `pack` took."""
    weight = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) & weight) != 0
    return bits.view(-1)[: math.prod(shape)].view(tuple(shape))


def check_mask(argument: str, frozen: Tensor, of: str, shape: torch.Size) -> None:
    """ValueError unless `frozen` is a mask of an optimizer step: bool or float32 scores with sizes
    that divide `shape`, or packed bits as uint8."""
    if frozen.dtype == torch.uint8:
        if frozen.shape != (num_bytes(shape),):
            raise ValueError(
                f"{argument} of packed bits must have shape ({num_bytes(shape)},), "
                f"got {tuple(frozen.shape)}"
            )
        return
    if frozen.dtype not in (torch.bool, torch.float32):
        raise ValueError(
            f"{argument} must be bool, uint8 (packed bits) or float32 (scores), got {frozen.dtype}"
        )
    check_divides(argument, frozen, of, shape)


def check_dtype(name: str, argument: str, tensors: Sequence[Tensor]) -> None:
    """ValueError unless all are float32, all bfloat16 or all float64."""
    for n, t in enumerate(tensors):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"{name}: {argument}[{n}] must be float32, bfloat16 or float64, got {t.dtype}"
            )
        if t.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}: {argument}[{n}] must have the dtype of {argument}[0], got {t.dtype}"
            )


def check_thresholds(
    name: str, frozen: Sequence[Tensor], threshold: Sequence[float], count: int
) -> None:
    """ValueError unless scores among the masks come with a threshold for each of `count`."""
    scores = any(mask.dtype == torch.float32 for mask in frozen)
    if len(threshold) != count and (scores or len(threshold) > 0):
        raise ValueError(
            f"{name}: threshold must have {count if scores else 0} numbers, got {len(threshold)}"
        )


def as_bool(mask: Tensor, threshold: float, shape: Sequence[int]) -> Tensor:
    """A mask of an optimizer step as bool of `shape`."""
    if mask.dtype == torch.uint8:
        return unpack(mask, shape)
    return spread(mask >= threshold if mask.dtype == torch.float32 else mask, shape)


class Importance(NamedTuple):
    """Frozen where score >= threshold, compared at every step: scores may change between steps.

    score: float32, one per expert, row, block of the last dimension, or element; it is kept, not
    copied. NaN is not frozen.
    """

    score: Tensor
    threshold: float


class Frozen(NamedTuple):
    """A mask as the optimizer steps take it."""

    mask: Tensor  # bool of `shape`, packed bits, or float32 scores of `shape`
    threshold: float
    shape: tuple[int, ...]  # that of counts by mask: one value serves a run of elements

    def as_bool(self) -> Tensor:
        """The mask as bool of its shape."""
        return as_bool(self.mask, self.threshold, self.shape)

    def spread(self, shape: Sequence[int]) -> Tensor:
        """The mask as bool of a finer shape."""
        return spread(self.as_bool(), shape)

    def to(self, device: torch.device) -> Frozen:
        """The mask on a device."""
        return self._replace(mask=self.mask.to(device))


def frozen(argument: str, mask: Tensor | Importance, shape: torch.Size) -> Frozen:
    """A bool mask copied to the form that a step of a parameter of `shape` reads fastest (bits
    where elements differ), or an Importance as it is; ValueError unless it fits."""
    if isinstance(mask, Importance):
        score = mask.score.detach()
        check_divides(argument, score, "the parameter", shape)
        score = score.reshape((1,) * (len(shape) - score.dim()) + tuple(score.shape))
        own = unit_shape(score.shape, shape)
        if score.dtype != torch.float32 or own != tuple(score.shape):
            raise ValueError(
                f"{argument} must have float32 scores, one per expert, row or element of the "
                f"parameter {tuple(shape)}, got {score.dtype} of shape {tuple(score.shape)}"
            )
        return Frozen(score, float(mask.threshold), own)
    if mask.dtype != torch.bool:
        raise ValueError(f"{argument} must be bool, got {mask.dtype}")
    check_divides(argument, mask, "the parameter", shape)
    own = unit_shape(mask.shape, shape)
    units = spread(mask.detach(), own)
    one_each = math.prod(own) == math.prod(shape) > 0
    return Frozen(pack(units) if one_each else units.clone().contiguous(), 0.0, own)


def free(param: Tensor) -> Frozen:
    """The mask that freezes nothing."""
    shape = (1,) * param.dim()
    return Frozen(torch.zeros(shape, dtype=torch.bool, device=param.device), 0.0, shape)


def common_shape(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The coarsest shape that masks of the shapes a and b of a parameter can both be spread to."""
    pairs = zip(a, b, shape, strict=True)
    return unit_shape([x if x == y or y == 1 else y if x == 1 else s for x, y, s in pairs], shape)


def places(frozen: Tensor, shape: torch.Size, size: int | None = None) -> Tensor:
    """Flat indices of the elements of `shape` that are not frozen, int64 and ascending.

    Their number is that of these elements: on a GPU that waits for it. With `size` it is that,
    filled up with -1, and nothing waits.
    """
    live = ~frozen.expand(shape).reshape(-1)
    if size is None:
        return live.nonzero().view(-1)
    return torch.nonzero_static(live, size=size).view(-1)
