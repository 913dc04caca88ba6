"""A site: its share of every task's data, its local steps, its local statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gose import preserve, training
from gose.config import SitesConfig
from gose.data import Examples, Task, partition
from gose.models import Params, apply_chain


class Site(NamedTuple):
    """The examples that one site holds of one task; they never leave it."""

    id: int
    train: Examples
    validation: Examples


def divide(task: Task, config: SitesConfig, *, generator: torch.Generator) -> list[Site]:
    """The sites of a task: training images skewed by class, validation images alike.

    Training: Dirichlet(alpha) shares of every class, at least one batch of images each. Validation
    buffers are drawn without regard to labels.
    """
    train = partition.dirichlet(
        task.train.label_B,
        config.num_sites,
        alpha=config.dirichlet_alpha,
        min_size=min(config.batch_size, len(task.train.label_B) // (2 * config.num_sites)),
        generator=generator,
    )
    validation = partition.iid(task.validation.label_B, config.num_sites, generator=generator)
    return [
        Site(site, _take(task.train, mine), _take(task.validation, buffer))
        for site, (mine, buffer) in enumerate(zip(train, validation, strict=True))
    ]


class Learned(NamedTuple):
    """What a site made of the shared modules and the task's expert, and the FLOPs it took."""

    stages: list[dict[str, Tensor]]
    flops: int


def learn(
    site: Site,
    path: Sequence[Params],
    frozen: Sequence[Mapping[str, Tensor]],
    config: SitesConfig,
    *,
    num_classes: int,
    generator: torch.Generator,
    lr_share: float = 1.0,
) -> Learned:
    """The modules of `path`, the expert last, after `steps` of masked AdamW on the site's images.

    Batches are drawn with replacement. The loss is the cross entropy of logits[c] + prior_weight *
    log P_site(c) [Menon et al. 2021]: the site's class frequencies explain its skew, so that the
    modules need not. lr_share: of the configured learning rate. The path's tensors are copied,
    never changed.
    """
    halves = [path[:-1], path[-1:]]
    masks = [frozen[:-1], frozen[-1:]]
    vectors = [training.flat(half).requires_grad_() for half in halves]
    optimizer = training.masked_adamw(
        vectors,
        [training.flat_mask(half, mask) for half, mask in zip(halves, masks, strict=True)],
        [lr_share * config.lr * config.shared_lr_factor, lr_share * config.lr],
        config.weight_decay,
    )
    count_C = torch.bincount(site.train.label_B, minlength=num_classes) + 1.0
    prior_C = config.prior_weight * (count_C / count_C.sum()).log()
    size = (config.steps, config.batch_size)
    index_SB = torch.randint(len(site.train.label_B), size, generator=generator)
    flops_per_step = 0

    def backward(index_B: Tensor) -> None:
        stages = [*training.unflat(vectors[0], path[:-1]), *training.unflat(vectors[1], path[-1:])]
        logits_BC = apply_chain(stages, site.train.x_BD[index_B]) + prior_C
        cross_entropy(logits_BC, site.train.label_B[index_B]).backward()

    for index_B in index_SB:
        if flops_per_step:
            backward(index_B)
        else:
            flops_per_step = training.counted_flops(partial(backward, index_B))
        optimizer.step()
        optimizer.zero_grad()
    stages = [
        stage
        for vector_P, half in zip(vectors, halves, strict=True)
        for stage in training.unflat(vector_P.detach(), half)
    ]
    return Learned(stages, flops_per_step * config.steps)


def local_fisher(
    site: Site, path: Sequence[Params], *, images: int, generator: torch.Generator
) -> list[preserve.Scores]:
    """Diagonal Fisher information of the path on at most `images` of the site's images."""
    order_B = torch.randperm(len(site.train.label_B), generator=generator)[:images]
    return preserve.fisher(path, site.train.x_BD[order_B], generator=generator)


def _take(examples: Examples, index_B: Tensor) -> Examples:
    return Examples(examples.x_BD[index_B], examples.label_B[index_B])
