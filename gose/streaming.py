"""The second half of a run: one arm's sites learn the stream of tasks, one after another.

Reads the model `student` and writes, under `arm/`, its groups, the accuracies measured so far and
the bytes sent. The random numbers of a unit do not depend on the arm: all arms see the same
batches, partitions and start, so that what differs is the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose import learning, metrics, router, sites, units
from gose.checkpoint import Json, State
from gose.claims import MAIN
from gose.config import RouteConfig, SystemConfig
from gose.data import Examples, Task
from gose.distill import STAGES
from gose.graph import ExpertGraph, subtree
from gose.learning import Group, Work
from gose.models import Params, apply_chain
from gose.router import Knowledge
from gose.sites import Site
from gose.units import Outcome, Unit

ROUTES = ("posterior", "sample", "static", "uniform", "all")


class Arm(NamedTuple):
    """What every unit of one arm of one seed is given."""

    name: str
    seed: int
    config: SystemConfig
    tasks: Callable[[], Sequence[Task]]
    divided: Callable[[], Sequence[Sequence[Site]]]  # [task][site]

    def members(self, group: Group, task: int) -> list[Site]:
        """The group's sites with their data of a task."""
        return [self.divided()[task][site] for site in group.sites]

    def generator(self, name: str) -> torch.Generator:
        return units.generator_of(self.seed, f"stream {name}")

    def clock(self, task: int, round_: int) -> int:
        """Packet number: rounds of all tasks in order, three more per task for statistics."""
        return task * (self.config.sites.rounds + 3) + round_

    def row(self, kind: str, **values: Json) -> dict[str, Json]:
        return {"kind": kind, "seed": self.seed, "arm": self.name, **values}


def expert_name(task: str) -> str:
    """Name of the node that learns a task."""
    return f"expert.{task}"


def stream(
    config: SystemConfig, seed: int, name: str, tasks: Callable[[], Sequence[Task]]
) -> Iterator[Unit]:
    """Units of one arm, from the distilled student to its summary."""
    arm = Arm(name, seed, config, tasks, cache(partial(_divide, config, seed, tasks)))

    def unit(label: str, phase: str, run: Callable[..., Outcome], *args: int) -> Unit:
        return Unit(f"seed {seed}, {name}, {label}", phase, partial(run, arm, *args))

    num_tasks = len(config.data.tasks)
    for task in range(num_tasks):
        yield unit(f"task {task}", "route", _begin, task)
        for round_ in range(config.sites.rounds):
            label = f"task {task}, round {round_}"
            yield unit(f"{label}, learn", "learn", _learn, task, round_)
            if config.merge.method != "none":
                yield unit(f"{label}, pack", "pack", _pack, task, round_)
            yield unit(f"{label}, merge", "merge", _merge, task, round_)
        yield unit(f"task {task}, freeze", "preserve", _freeze, task)
        yield unit(f"task {task}, route", "route", _count_wins, task)
        yield unit(f"task {task}, evaluate", "evaluate", _evaluate, task)
    yield unit("summary", "evaluate", _summary)


def _divide(
    config: SystemConfig, seed: int, tasks: Callable[[], Sequence[Task]]
) -> list[list[Site]]:
    return [
        sites.divide(task, config.sites, generator=units.generator_of(seed, f"sites {task.name}"))
        for task in tasks()
    ]


def _begin(arm: Arm, task: int, state: State) -> Outcome:
    student = units.model_of(state, "student", STAGES)
    if task == 0:
        state = units.drop(state, "arm")
        everyone = list(range(arm.config.sites.num_sites))
        alone = arm.config.merge.method == "none"
        groups = [
            learning.start_group(members, student)
            for members in ([[site] for site in everyone] if alone else [everyone])
        ]
        state = units.put(state, meta={"arm/work": list(Work()), "arm/num_groups": len(groups)})
    else:
        groups = _groups(state)
    begun, work = [], Work()
    for group in groups:
        group, cost = learning.begin_task(
            group,
            expert_name(arm.tasks()[task].name),
            student[-1],
            arm.members(group, task),
            round_=arm.clock(task, arm.config.sites.rounds),
        )
        begun.append(group)
        work = work.plus(cost)
    return _worked(_put_groups(state, begun), work, len(arm.tasks()[task].train.label_B))


def _learn(arm: Arm, task: int, round_: int, state: State) -> Outcome:
    expert = expert_name(arm.tasks()[task].name)
    work = Work()
    tensors: dict[str, Tensor] = {}
    for group in _groups(state):
        paths, cost = learning.learn(
            group,
            expert,
            arm.members(group, task),
            arm.config,
            task_round=round_,
            generators=[arm.generator(f"learn {task} {round_} {site}") for site in group.sites],
        )
        for site, path in zip(group.sites, paths, strict=True):
            tensors |= units.model_tensors(f"arm/site{site}", STAGES, path)
        work = work.plus(cost)
    section = arm.config.sites
    images = section.num_sites * section.steps * section.batch_size
    return _worked(units.put(state, tensors), work, images)


def _pack(arm: Arm, task: int, round_: int, state: State) -> Outcome:
    (group,) = _groups(state)
    packets, group = learning.pack_round(
        group,
        expert_name(arm.tasks()[task].name),
        arm.members(group, task),
        [units.model_of(state, f"arm/site{site}", STAGES) for site in group.sites],
        arm.config,
        round_=arm.clock(task, round_),
        generators=[arm.generator(f"pack {task} {round_} {site}") for site in group.sites],
    )
    wires = {
        f"arm/packet/{site}": torch.frombuffer(bytearray(packet), dtype=torch.uint8)
        for site, packet in packets.items()
    }
    return Outcome(units.put(_put_groups(state, [group]), wires))


def _merge(arm: Arm, task: int, round_: int, state: State) -> Outcome:
    """One graph from the packets; sites that stay alone adopt what they learned."""
    expert = expert_name(arm.tasks()[task].name)
    validation = arm.tasks()[task].validation
    groups = _groups(state)
    paths = {
        site: units.model_of(state, f"arm/site{site}", STAGES)
        for group in groups
        for site in group.sites
    }
    site_top1: list[Json] = [_top1(paths[site], validation) for site in sorted(paths)]
    work = Work()
    if arm.config.merge.method == "none":
        merged = [learning.adopt(group, expert, paths[group.sites[0]]) for group in groups]
        merged_top1: Json = None
    else:
        packets = {
            site: state.tensors[f"arm/packet/{site}"].numpy().tobytes() for site in groups[0].sites
        }
        group, work = learning.merge_round(
            groups[0],
            expert,
            arm.members(groups[0], task),
            packets,
            arm.config,
            round_=arm.clock(task, round_),
        )
        merged, merged_top1 = [group], _top1(group.graph.path(expert), validation)
    row = arm.row(
        "round",
        task=task,
        round=round_,
        bytes_sent=work.bytes_sent,
        bytes_float32=work.bytes_float32,
        site_top1=site_top1,
        merged_top1=merged_top1,
    )
    state = units.drop(state, "arm/packet", *(f"arm/site{site}" for site in paths))
    return _worked(_put_groups(state, merged), work, len(validation.label_B), [row])


def _freeze(arm: Arm, task: int, state: State) -> Outcome:
    frozen, work = [], Work()
    for group in _groups(state):
        group, cost = learning.freeze(
            group,
            expert_name(arm.tasks()[task].name),
            arm.members(group, task),
            arm.config,
            round_=arm.clock(task, arm.config.sites.rounds + 1),
            generator=arm.generator(f"freeze {task}"),
        )
        frozen.append(group)
        work = work.plus(cost)
    return _worked(_put_groups(state, frozen), work, 0)


def _count_wins(arm: Arm, task: int, state: State) -> Outcome:
    counted, work, images = [], Work(), 0
    for group in _groups(state):
        buffers = [
            [site.validation for site in arm.members(group, earlier)] for earlier in range(task + 1)
        ]
        group, cost = learning.count_wins(
            group,
            arm.members(group, task),
            buffers,
            arm.config,
            round_=arm.clock(task, arm.config.sites.rounds + 2),
        )
        counted.append(group)
        work = work.plus(cost)
        images += sum(len(buffer.label_B) for row in buffers for buffer in row)
    entropies = torch.stack(
        [router.module_entropy(group.knowledge.wins_EQ) for group in counted]
    ).mean(0)
    row = arm.row(
        "entropy",
        after_task=task,
        modules=dict(zip(counted[0].graph.experts, entropies.tolist(), strict=True)),
    )
    return _worked(_put_groups(state, counted), work, images, [row])


def _evaluate(arm: Arm, task: int, state: State) -> Outcome:
    """Row `task` of the accuracy matrices: the routed graph on every task, no task id given."""
    measured = [
        _measure(arm, group, arm.config.route, f"evaluate {task}") for group in _groups(state)
    ]
    row = arm.row("accuracy", after_task=task, top1=_mean(m.top1 for m in measured))
    row |= {"top5": _mean(m.top5 for m in measured)}
    if len(measured) > 1:
        row["site_top1"] = [list[Json](m.top1) for m in measured]
    state = units.put(
        state,
        meta={
            f"arm/top1/{task}": [m.top1 for m in measured],
            "arm/flops_per_input": sum(m.flops_per_input for m in measured) / len(measured),
        },
    )
    images = sum(len(t.test.label_B) for t in arm.tasks()) * len(measured)
    return Outcome(state, [row], images=images)


def _summary(arm: Arm, state: State) -> Outcome:
    """The arm's last rows: every way to route its final graph, and its figures over the stream."""
    rows = []
    groups = _groups(state)
    if len(groups) == 1:
        methods = [r for r in ROUTES if r == arm.config.route.method or arm.name == MAIN]
        for method in methods:
            measured = _measure(
                arm,
                groups[0],
                arm.config.route.model_copy(update={"method": method}),
                f"evaluate {len(arm.tasks()) - 1}",
            )
            rows.append(
                arm.row(
                    "routing",
                    mode=method,
                    top1=sum(measured.top1) / len(measured.top1),
                    flops_per_input=measured.flops_per_input,
                )
            )
    num_tasks = len(arm.tasks())
    history: Any = [state.meta[f"arm/top1/{task}"] for task in range(num_tasks)]
    matrices = [
        torch.tensor([row[site] for row in history], dtype=torch.float64)
        for site in range(len(groups))
    ]
    work = _work(state)
    row = arm.row(
        "summary",
        acc=_average(metrics.average_accuracy, matrices),
        learning_acc=_average(metrics.learning_accuracy, matrices),
        bwt_gem=_average(metrics.backward_transfer, matrices),
        bwt_seed=_average(partial(metrics.backward_transfer, form="seed"), matrices),
        forgetting=_average(metrics.forgetting, matrices),
        site_acc=[metrics.average_accuracy(matrix) for matrix in matrices],
        frozen=_frozen_share(groups),
        bytes_sent=work.bytes_sent,
        bytes_float32=work.bytes_float32,
        train_flops=work.flops,
        flops_per_input=state.meta["arm/flops_per_input"],
    )
    return Outcome(units.drop(state, "arm"), [*rows, row])


class Measured(NamedTuple):
    """Accuracies of one graph on every task, and the work per input over all of them."""

    top1: list[float]
    top5: list[float]
    flops_per_input: float


def _measure(arm: Arm, group: Group, route: RouteConfig, name: str) -> Measured:
    top1, top5, flops, images = [], [], 0.0, 0
    for task in arm.tasks():
        answer = router.predict(
            group.graph,
            group.knowledge,
            task.test.x_BD,
            route,
            generator=arm.generator(f"{name} {task.name}"),
        )
        top1.append(metrics.accuracy_top_k(answer.prob_TC, task.test.label_B, 1))
        top5.append(metrics.accuracy_top_k(answer.prob_TC, task.test.label_B, 5))
        flops += answer.flops_per_input * len(task.test.label_B)
        images += len(task.test.label_B)
    return Measured(top1, top5, flops / images)


def _mean(columns: Iterator[list[float]]) -> list[Json]:
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def _average(metric: Callable[[Tensor], float], matrices: Sequence[Tensor]) -> float | None:
    """Mean over the matrices; None where the metric is not defined (one task)."""
    value = sum(metric(matrix) for matrix in matrices) / len(matrices)
    return None if math.isnan(value) else value


def _top1(path: Sequence[Params], examples: Examples) -> float:
    with torch.no_grad():
        return metrics.accuracy_top_k(apply_chain(path, examples.x_BD), examples.label_B)


def _frozen_share(groups: Sequence[Group]) -> float:
    masks = [m for group in groups for node in group.frozen.values() for m in node.values()]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def _work(state: State) -> Work:
    spent: Any = state.meta["arm/work"]
    return Work(*spent)


def _worked(
    state: State, work: Work, images: int, rows: Sequence[Mapping[str, Json]] = ()
) -> Outcome:
    state = units.put(state, meta={"arm/work": list(_work(state).plus(work))})
    return Outcome(state, rows, images, work.flops, work.bytes_sent)


def _put_groups(state: State, groups: Sequence[Group]) -> State:
    state = units.drop(state, *(f"arm/group{index}" for index in range(len(groups))))
    for index, group in enumerate(groups):
        prefix = f"arm/group{index}"
        graph = group.graph.to_state(f"{prefix}/graph")
        tensors = dict(graph.tensors)
        for node, masks in group.frozen.items():
            tensors |= {f"{prefix}/frozen/{node}/{key}": mask for key, mask in masks.items()}
        tensors |= {f"{prefix}/knowledge/{key}": t for key, t in group.knowledge._asdict().items()}
        for site, kept in group.residuals.items():
            tensors |= {f"{prefix}/residual/{site}/{key}": t for key, t in kept.items()}
        meta = {**graph.meta, f"{prefix}/sites": list(group.sites)}
        state = units.put(state, tensors, meta)
    return state


def _groups(state: State) -> list[Group]:
    found = []
    for index in range(int(str(state.meta["arm/num_groups"]))):
        prefix = f"arm/group{index}"
        graph = ExpertGraph.from_state(state, f"{prefix}/graph")
        members: Any = state.meta[f"{prefix}/sites"]
        residuals = {site: subtree(state.tensors, f"{prefix}/residual/{site}") for site in members}
        found.append(
            Group(
                tuple(members),
                graph,
                {node: subtree(state.tensors, f"{prefix}/frozen/{node}") for node in graph.trunk},
                Knowledge(**subtree(state.tensors, f"{prefix}/knowledge")),
                {site: kept for site, kept in residuals.items() if kept},
            )
        )
    return found
