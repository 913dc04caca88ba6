"""The training loop of everything that is not learned at a site: epochs over cached inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Parameter

import gose_kernels as gk
from gose.models import Params

Loss: TypeAlias = Callable[[Sequence[Params], Tensor], Tensor]  # (stages, indices of a batch)


class Fit(NamedTuple):
    """Trained stages, what their training cost, and what its continuation needs."""

    stages: list[dict[str, Tensor]]
    flops: int  # FLOPs of one step as torch counts them, times steps: all steps have one shape
    images: int
    moments: dict[str, Tensor]


def fit(
    stages: Sequence[Params],
    loss: Loss,
    *,
    num_images: int,
    batch_size: int,
    epochs: range,
    total_epochs: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
    frozen: Sequence[Mapping[str, Tensor]] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Fit:
    """Copies of the stages after `epochs` of `total_epochs` of masked AdamW, cosine to lr / 20.

    Whole batches only: an epoch leaves num_images % batch_size images out, others each time.
    frozen: per stage, name -> bool tensor, True = must not change. moments: of the epochs before.
    """
    batch_size = min(batch_size, num_images)
    vector_P = flat(stages).requires_grad_()
    optimizer = masked_adamw([vector_P], [flat_mask(stages, frozen)], [lr], weight_decay)
    optimizer.state[vector_P] = {key: value.clone() for key, value in (moments or {}).items()}

    def backward(index_B: Tensor) -> None:
        loss(unflat(vector_P, stages), index_B).backward()

    per_epoch = num_images // batch_size
    flops_per_step = 0
    for epoch in epochs:
        order_B = torch.randperm(num_images, generator=generator)
        for step in range(per_epoch):
            index_B = order_B[step * batch_size : (step + 1) * batch_size]
            share = (epoch * per_epoch + step) / (total_epochs * per_epoch)
            cosine = 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = lr * (0.05 + 0.95 * cosine)
            if flops_per_step:
                backward(index_B)
            else:
                flops_per_step = counted_flops(partial(backward, index_B))
            optimizer.step()
            optimizer.zero_grad()
    steps = len(epochs) * per_epoch
    return Fit(
        unflat(vector_P.detach(), stages),
        flops_per_step * steps,
        steps * batch_size,
        dict(optimizer.state[vector_P]),
    )


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of run(): matrix products, forward and backward, 2 per MAC, and the ops' own."""
    with gk.profiling.flop_counter() as counter:
        run()
    return int(counter.get_total_flops())


def flat(stages: Sequence[Params]) -> Tensor:
    """A new vector of all elements of the stages in order.

    An optimizer takes one vector in a tenth of the time it takes thirty small tensors.
    """
    return torch.cat([tensor.detach().flatten() for params in stages for tensor in params.values()])


def unflat(vector_P: Tensor, like: Sequence[Params]) -> list[dict[str, Tensor]]:
    """Views of the vector in the names and shapes of `like`; gradients pass through."""
    sizes = [tensor.numel() for params in like for tensor in params.values()]
    parts = iter(vector_P.split(sizes))
    return [
        {name: next(parts).view(tensor.shape) for name, tensor in params.items()} for params in like
    ]


def flat_mask(
    stages: Sequence[Params], frozen: Sequence[Mapping[str, Tensor]] | None
) -> Tensor | None:
    """The masks of the stages as one vector; tensors without a mask are free. None: all free."""
    if frozen is None or not any(bool(m.any()) for masks in frozen for m in masks.values()):
        return None
    return torch.cat(
        [
            masks.get(name, torch.zeros_like(tensor, dtype=torch.bool)).flatten()
            for params, masks in zip(stages, frozen, strict=True)
            for name, tensor in params.items()
        ]
    )


def masked_adamw(
    vectors: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Sequence[float],
    weight_decay: float,
) -> gk.optim.MaskedAdamW:
    """AdamW with a learning rate per vector; frozen elements keep their bits.

    beta2 is 0.99: second moments over a few hundred steps must not remember the first ones.
    """
    params = [cast(Parameter, vector) for vector in vectors]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, lr, strict=True)]
    masks = {p: mask for p, mask in zip(params, frozen, strict=True) if mask is not None}
    return gk.optim.MaskedAdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, frozen=masks)
