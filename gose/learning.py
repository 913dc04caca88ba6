"""Continual learning of a group of sites that share one graph: a task's begin, rounds and end.

S sites, Q tasks, E experts. A group holds everything its sites agree on; every function takes a
group and gives a new one. A round is learn -> pack -> merge. Sites that stay alone are groups of
one: they learn the same way and send nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gose import preserve, router, sites
from gose.compress import (
    Section,
    Spec,
    decode,
    free_vectors,
    pack,
    spec_of,
    with_free_vectors,
)
from gose.config import CodecConfig, SystemConfig
from gose.data import Examples
from gose.graph import ExpertGraph
from gose.merge import MERGES, SENDS_FISHER, Update
from gose.models import Params
from gose.router import Knowledge
from gose.sites import Site

TRUNK = ("stem", "body")


class Group(NamedTuple):
    """Sites that merge with each other and what they share; residuals are each site's own.

    frozen: node of the trunk -> tensor name -> True = must not change any more.
    residuals: site -> section -> what its packets have lost so far.
    """

    sites: tuple[int, ...]
    graph: ExpertGraph
    frozen: Mapping[str, Mapping[str, Tensor]]
    knowledge: Knowledge
    residuals: Mapping[int, Mapping[str, Tensor]]

    def masks(self, expert: str) -> list[Mapping[str, Tensor]]:
        """Frozen masks of the path through an expert; nothing of the expert is frozen."""
        free = preserve.nothing_frozen(self.graph.nodes[expert])
        return [*(self.frozen[name] for name in self.graph.trunk), free]


class Work(NamedTuple):
    """What a step cost: FLOPs of all sites, bytes over all edges, and bytes without a codec."""

    flops: int = 0
    bytes_sent: int = 0
    bytes_float32: int = 0

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def start_group(members: Sequence[int], student: Sequence[Params]) -> Group:
    """A group before its first task: the distilled trunk, no expert, nothing frozen."""
    nodes = dict(zip(TRUNK, student, strict=False))
    frozen = {name: preserve.nothing_frozen(params) for name, params in nodes.items()}
    return Group(tuple(members), ExpertGraph(nodes, TRUNK, {}), frozen, router.no_knowledge(), {})


def begin_task(
    group: Group, expert: str, start: Params, members: Sequence[Site], *, round_: int
) -> tuple[Group, Work]:
    """The group with a new expert, and with the feature sums of the task's images."""
    told = [router.feature_sums(site.train.x_BD) for site in members]
    received, work = _share_sums(members, told, round_=round_)
    # Residuals end with the task: they belong to an expert that nobody sends any more.
    begun = group._replace(
        graph=group.graph.add(expert, start),
        knowledge=router.with_task(group.knowledge, received),
        residuals={},
    )
    return begun, work


def learn(
    group: Group,
    expert: str,
    members: Sequence[Site],
    config: SystemConfig,
    *,
    task_round: int,
    generators: Sequence[torch.Generator],
) -> tuple[list[list[dict[str, Tensor]]], Work]:
    """What every site makes of the path through the expert in one round of local steps.

    The learning rate falls with a cosine over the rounds of a task, to 5 % after the last: what is
    merged at the end must not depend on where the last steps happened to be.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * task_round / config.sites.rounds))
    learned = [
        sites.learn(
            site,
            group.graph.path(expert),
            group.masks(expert),
            config.sites,
            num_classes=config.data.num_classes,
            generator=generator,
            lr_share=0.05 + 0.95 * cosine,
        )
        for site, generator in zip(members, generators, strict=True)
    ]
    return [result.stages for result in learned], Work(sum(result.flops for result in learned))


def adopt(group: Group, expert: str, path: Sequence[Params]) -> Group:
    """The group with these tensors in the path through the expert."""
    names = (*group.graph.trunk, expert)
    return group._replace(graph=group.graph.replace(dict(zip(names, path, strict=True))))


def pack_round(
    group: Group,
    expert: str,
    members: Sequence[Site],
    paths: Sequence[Sequence[Params]],
    config: SystemConfig,
    *,
    round_: int,
    generators: Sequence[torch.Generator],
) -> tuple[dict[int, bytes], Group]:
    """The packet of every site, and the group with what the packets lost.

    A packet holds the changes of the free elements since the last merge (frozen ones are never
    sent) and, for a merge that wants it, the root of their Fisher information.
    """
    masks = group.masks(expert)
    base = free_vectors(group.graph.path(expert), masks)
    feedback = config.codec.error_feedback
    packets, residuals = {}, {}
    for site, path, generator in zip(members, paths, generators, strict=True):
        values = {key: v - base[key] for key, v in free_vectors(path, masks).items()}
        if config.merge.method in SENDS_FISHER:
            roots = _root_fisher(site, path, config, generator)
            values |= {_fisher(key): v for key, v in free_vectors(roots, masks).items()}
        packed = pack(
            spec_of(values, config.codec.method),
            values,
            site=site.id,
            round_=round_,
            residuals=group.residuals.get(site.id, {}) if feedback else None,
            rounding=config.codec.rounding,
            seed=site.id,
        )
        # Information is a fresh measurement each round: what one packet lost of it is not owed.
        kept = {key: r for key, r in packed.residuals.items() if key in base}
        packets[site.id], residuals[site.id] = packed.packet, kept
    return packets, group._replace(residuals=residuals)


def merge_round(
    group: Group,
    expert: str,
    members: Sequence[Site],
    packets: Mapping[int, bytes],
    config: SystemConfig,
    *,
    round_: int,
) -> tuple[Group, Work]:
    """The group after its sites have exchanged their packets and merged them."""
    path, masks = group.graph.path(expert), group.masks(expert)
    base = free_vectors(path, masks)
    sends_fisher = config.merge.method in SENDS_FISHER
    sent = base | ({_fisher(key): v for key, v in base.items()} if sends_fisher else {})
    delivered = sites.exchange(packets, spec_of(sent, config.codec.method), round_=round_)
    weights = [float(len(site.train.label_B)) for site in members]
    merged = {}
    for key, vector in base.items():
        updates = [
            Update(sections[key], sections.get(_fisher(key)))
            for sections in delivered.received.values()
        ]
        merged[key] = MERGES[config.merge.method](vector, updates, weights)
    work = Work(0, delivered.bytes_sent, delivered.bytes_float32)
    return adopt(group, expert, with_free_vectors(path, masks, merged)), work


def freeze(
    group: Group,
    expert: str,
    members: Sequence[Site],
    config: SystemConfig,
    *,
    round_: int,
    generator: torch.Generator,
) -> tuple[Group, Work]:
    """The group with more of its trunk frozen, by the sensitivity of all its sites together.

    Sites send the root of their Fisher information and add up what they receive, weighted by
    images. Random masks come from the common generator: nothing is sent.
    """
    trunk = group.graph.trunk
    masks = [group.frozen[name] for name in trunk]
    scores = [{key: torch.zeros(mask.shape) for key, mask in m.items()} for m in masks]
    work = Work()
    if config.preserve.method == "fisher":
        path = group.graph.path(expert)
        told = [
            free_vectors(_root_fisher(site, path, config, generator)[: len(trunk)], masks)
            for site in members
        ]
        received, work = _deliver(members, told, config.codec, round_=round_)
        total = {
            key: torch.stack(
                [
                    len(site.train.label_B) * vectors[key].square()
                    for site, vectors in zip(members, received, strict=True)
                ]
            ).sum(0)
            for key in told[0]
        }
        scores = with_free_vectors(scores, masks, total)
    frozen = {
        name: preserve.freeze(
            stage_scores,
            stage_masks,
            fraction=config.preserve.fraction,
            method=config.preserve.method,
            generator=generator,
        )
        for name, stage_scores, stage_masks in zip(trunk, scores, masks, strict=True)
    }
    return group._replace(frozen=frozen), work


def count_wins(
    group: Group,
    members: Sequence[Site],
    buffers: Sequence[Sequence[Examples]],
    config: SystemConfig,
    *,
    round_: int,
) -> tuple[Group, Work]:
    """The group with soft wins counted anew for all tasks, and its routing weights after them.

    buffers[q][s]: validation images of task q at the group's site s. All tasks, because the new
    expert plays too and the trunk has moved.
    """
    temperature = config.route.win_temperature
    told = [
        tuple(router.soft_wins(group.graph, buffer[s], temperature) for buffer in buffers)
        for s in range(len(members))
    ]
    received, work = _share_sums(members, told, round_=round_)
    wins_EQ = torch.stack([torch.stack(parts).sum(0) for parts in zip(*received, strict=True)], 1)
    weight_E = 1 / (router.module_entropy(wins_EQ) + config.route.entropy_floor)
    share_E = (weight_E / weight_E.sum()).tolist()
    counted = group._replace(
        graph=group.graph.reweigh(dict(zip(group.graph.experts, share_E, strict=True))),
        knowledge=group.knowledge._replace(wins_EQ=wins_EQ),
    )
    return counted, work


def _root_fisher(
    site: Site, path: Sequence[Params], config: SystemConfig, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    found = sites.local_fisher(site, path, images=config.preserve.images, generator=generator)
    return [{key: score.sqrt() for key, score in stage.items()} for stage in found]


def _fisher(key: str) -> str:
    return f"{key}.root_fisher"


def _deliver(
    members: Sequence[Site],
    told: Sequence[Mapping[str, Tensor]],
    codec: CodecConfig,
    *,
    round_: int,
) -> tuple[list[dict[str, Tensor]], Work]:
    """Named vectors of every site, coded, sent and decoded as all sites have them afterwards."""
    if len(members) == 1:
        return [dict(told[0])], Work()
    spec = spec_of(told[0], codec.method)
    packets = {
        site.id: pack(spec, values, site=site.id, round_=round_).packet
        for site, values in zip(members, told, strict=True)
    }
    delivered = sites.exchange(packets, spec, round_=round_)
    received = [
        {key: decode(payload) for key, payload in sections.items()}
        for sections in delivered.received.values()
    ]
    return received, Work(0, delivered.bytes_sent, delivered.bytes_float32)


def _share_sums(
    members: Sequence[Site], told: Sequence[Sequence[Tensor]], *, round_: int
) -> tuple[list[tuple[Tensor, ...]], Work]:
    """float64 sums of every site as all sites have them: rounded to float32 by the wire."""
    if len(members) == 1:
        return [tuple(told[0])], Work()
    spec = Spec("none", tuple(Section(str(i), v.numel(), False) for i, v in enumerate(told[0])))
    packets = {}
    for site, sums in zip(members, told, strict=True):
        values = {str(i): v.flatten().float() for i, v in enumerate(sums)}
        packets[site.id] = pack(spec, values, site=site.id, round_=round_).packet
    delivered = sites.exchange(packets, spec, round_=round_)
    received = [
        tuple(decode(sections[str(i)]).double().view(v.shape) for i, v in enumerate(told[0]))
        for sections in delivered.received.values()
    ]
    return received, Work(0, delivered.bytes_sent, delivered.bytes_float32)
