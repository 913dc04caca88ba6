"""Partitions of a data set over sites: pure functions from labels to index lists.

B images, C classes, S sites. Every function returns S ascending int64 index tensors; every index of
label_B is in exactly one of them. Same labels, arguments and generator state: same partition.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def iid(label_B: Tensor, num_sites: int, *, generator: torch.Generator) -> list[Tensor]:
    """Sites of equal size (within 1) drawn without regard to labels."""
    num_images = _check("iid", label_B, num_sites)
    order_B = torch.randperm(num_images, generator=generator)
    return [part.sort().values for part in order_B.tensor_split(num_sites)]


def dirichlet(
    label_B: Tensor,
    num_sites: int,
    *,
    alpha: float,
    min_size: int = 1,
    generator: torch.Generator,
) -> list[Tensor]:
    """Sites with skewed classes: each class is shared out by its own draw from Dirichlet(alpha).

    Small alpha gives a class to few sites, large alpha to all alike. The whole draw is repeated
    until every site has min_size images [Yurochkin et al. 2019; Li et al. 2022, NIID-Bench].
    Shares become counts by rounding the cumulated shares, so that each site is within 1 image of
    its share of each class.
    Raises ValueError if 1000 draws do not reach min_size.
    """
    num_images = _check("dirichlet", label_B, num_sites)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"dirichlet: alpha must be positive and finite, got {alpha}")
    if not 0 <= min_size * num_sites <= num_images:
        raise ValueError(
            f"dirichlet: min_size must be in [0, {num_images // num_sites}] for {num_images} "
            f"images on {num_sites} sites, got {min_size}"
        )
    # torch.distributions takes no generator; numpy's Dirichlet does not underflow for small alpha
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    random = np.random.default_rng(seed)
    members_C = [
        index[torch.randperm(len(index), generator=generator)] for index in _by_class(label_B)
    ]
    counts_C = np.array([len(index) for index in members_C])
    max_draws = 1000  # past that the wanted size is out of reach, not unlucky
    for _ in range(max_draws):
        share_CS = random.dirichlet(np.full(num_sites, alpha), size=len(members_C))
        cut_CS = np.rint(share_CS.cumsum(axis=1) * counts_C[:, None]).astype(np.int64)
        cut_CS[:, -1] = counts_C  # the cumulated shares end in 1 only up to rounding
        size_S = np.diff(cut_CS, axis=1, prepend=0).sum(axis=0)
        if size_S.min() >= min_size:
            pieces_C = [
                torch.tensor_split(index, torch.from_numpy(cut_S[:-1]))
                for index, cut_S in zip(members_C, cut_CS, strict=True)
            ]
            return [torch.cat(pieces).sort().values for pieces in zip(*pieces_C, strict=True)]
    raise ValueError(
        f"dirichlet: no draw of {max_draws} gave every site min_size={min_size} images; raise "
        f"alpha ({alpha}), or lower min_size or num_sites ({num_sites})"
    )


def pathological(
    label_B: Tensor, num_sites: int, *, classes_per_site: int, generator: torch.Generator
) -> list[Tensor]:
    """Sites that each hold images of exactly classes_per_site classes.

    Classes in random order are dealt round and round, so that each is held by the same number of
    sites (within 1); the images of a class are shared equally (within 1) by its sites. Differs from
    the shards of [McMahan et al. 2016, section 3], where a shard may straddle two classes.
    Raises ValueError if the sites cannot hold every class, or a class has fewer images than sites.
    """
    _check("pathological", label_B, num_sites)
    members_C = _by_class(label_B)
    num_classes = len(members_C)
    if not 1 <= classes_per_site <= num_classes:
        raise ValueError(
            f"pathological: classes_per_site must be in [1, {num_classes}], got {classes_per_site}"
        )
    if classes_per_site * num_sites < num_classes:
        raise ValueError(
            f"pathological: {num_sites} sites x classes_per_site={classes_per_site} cannot hold "
            f"{num_classes} classes; raise one of them"
        )
    class_order = torch.randperm(num_classes, generator=generator).tolist()
    site_order = torch.randperm(num_sites, generator=generator).tolist()
    sites_of_class: list[list[int]] = [[] for _ in range(num_classes)]
    for slot in range(classes_per_site * num_sites):
        sites_of_class[class_order[slot % num_classes]].append(site_order[slot // classes_per_site])
    pieces_S: list[list[Tensor]] = [[] for _ in range(num_sites)]
    for index, sites in zip(members_C, sites_of_class, strict=True):
        if len(index) < len(sites):
            raise ValueError(
                f"pathological: class {int(label_B[index[0]])} has {len(index)} images for "
                f"{len(sites)} sites; lower classes_per_site or num_sites"
            )
        shuffled = index[torch.randperm(len(index), generator=generator)]
        for site, piece in zip(sites, shuffled.tensor_split(len(sites)), strict=True):
            pieces_S[site].append(piece)
    return [torch.cat(pieces).sort().values for pieces in pieces_S]


def _check(name: str, label_B: Tensor, num_sites: int) -> int:
    if label_B.dim() != 1 or label_B.is_floating_point():
        raise ValueError(
            f"{name}: label_B must be a vector of class ids, "
            f"got shape {tuple(label_B.shape)} {label_B.dtype}"
        )
    if not 1 <= num_sites <= len(label_B):
        raise ValueError(
            f"{name}: num_sites must be in [1, {len(label_B)}] (the images), got {num_sites}"
        )
    return len(label_B)


def _by_class(label_B: Tensor) -> list[Tensor]:
    """Ascending indices of each class that occurs, classes ascending."""
    return [(label_B == label).nonzero().squeeze(1) for label in sorted(set(label_B.tolist()))]
