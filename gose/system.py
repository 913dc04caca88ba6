"""The whole system: retired models become small experts, sites train them apart and merge them.

A run is a list of units fixed by the config alone; each takes the state to the next and says what
it measured. The list of one seed reads:

    teacher epochs, retire, sensitivity, meta model, module distillation, assemble, control
    for every arm (the configured run, then each control):
        for every task:  begin, then rounds of learn -> pack -> merge, then freeze, count, evaluate
        summary
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

import gose_kernels as gk
from gose import data, recycling, streaming, units
from gose.checkpoint import Json, State
from gose.claims import MAIN, claims
from gose.config import SystemConfig, override
from gose.data import Task
from gose.rundir import Progress, RunDir
from gose.units import Outcome, Unit

# A checkpoint costs about 20 ms; at most this many seconds of work are lost to a kill.
_COMMIT_SECONDS = 2.0


def run(config: SystemConfig, rundir: RunDir) -> Iterator[Progress]:
    """Runs what is left of the config's units; one Progress per unit. Prints nothing.

    Rows go to the run directory; a killed run that is resumed gives the same rows. Raises DataError
    if a data set is missing.
    """
    torch.set_num_threads(rundir.threads)
    plan = list(sequence(config))
    state = rundir.state
    committed = time.perf_counter()
    for index in range(rundir.step, len(plan)):
        unit = plan[index]
        start = time.perf_counter()
        with gk.profiling.record() as counts:
            outcome = unit.run(state)
        seconds = time.perf_counter() - start
        state = _with_counts(outcome.state, counts)
        rows = [*outcome.rows, *(_counter_rows(state) if index + 1 == len(plan) else ())]
        state = with_results(state, rows)
        for row in rows:
            rundir.record(row)
        rundir.record_timing(
            {
                "unit": unit.name,
                "phase": unit.phase,
                "seconds": seconds,
                "images": outcome.images,
                "flops": outcome.flops,
                "bytes_sent": outcome.bytes_sent,
                "kernel_seconds": counts.wall_seconds,
            }
        )
        if index + 1 == len(plan) or time.perf_counter() - committed > _COMMIT_SECONDS:
            rundir.commit(index + 1, len(plan), state)
            committed = time.perf_counter()
        yield Progress(
            index + 1, len(plan), unit.phase, unit.name, outcome.images, "images", seconds
        )


def sequence(config: SystemConfig) -> Iterator[Unit]:
    """All units of a run in order."""
    for seed in config.seeds:
        tasks = cache(partial(stream_of, config, seed))
        yield from recycling.recycle(config, seed, tasks)
        for arm, arm_config in arms(config).items():
            yield from streaming.stream(arm_config, seed, arm, tasks)
    yield Unit("claims", "report", _claims)


def arms(config: SystemConfig) -> dict[str, SystemConfig]:
    """Name -> config of every arm: the run as configured, and each control that differs from it."""
    found = {MAIN: config}
    for setting in config.arms:
        arm_config = override(config, [setting])
        if arm_config != config:
            found[setting] = arm_config
    return found


def stream_of(config: SystemConfig, seed: int) -> Sequence[Task]:
    """The tasks of a seed; ValueError if the sites could not share one of their sets of images."""
    section = config.data
    tasks = list(
        data.stream(
            section.tasks,
            generator=units.generator_of(seed, "data"),
            validation_fraction=section.validation_fraction,
            test_fraction=section.test_fraction,
            train_per_class=section.train_per_class,
            side=section.side,
            root=section.root,
        )
    )
    for task in tasks:
        for part, wanted, key in (
            ("train", 2 * config.sites.num_sites, "train_per_class"),
            ("validation", config.sites.num_sites, "validation_fraction"),
            ("test", 1, "test_fraction"),
        ):
            found = len(getattr(task, part).label_B)
            if found < wanted:
                raise ValueError(
                    f"data: task {task.name} must have at least {wanted} {part} images for "
                    f"{config.sites.num_sites} sites, got {found}; raise data.{key} or lower "
                    "sites.num_sites"
                )
    return tasks


def with_results(state: State, rows: Sequence[Mapping[str, Json]]) -> State:
    """The state with those rows kept that the claims at the end are made of."""
    kept = [dict(r) for r in rows if r["kind"] in ("teacher", "student", "summary", "routing")]
    return units.put(state, meta={"results": [*_results(state), *kept]})


def _claims(state: State) -> Outcome:
    return Outcome(state, claims(_results(state)))


def _results(state: State) -> list[dict[str, Any]]:
    results: Any = state.meta.get("results", [])
    return list(results)


def _with_counts(state: State, counts: gk.profiling.Counts) -> State:
    """The state with the calls, tokens, bytes and FLOPs of each op and backend added up."""
    earlier: Any = state.meta.get("counters", {})
    total = dict(earlier)
    for (op, backend), count in counts.table.items():
        before = total.get(f"{op}/{backend}", [0, 0, 0, 0])
        now = [count.calls, count.tokens, count.bytes, count.flops]
        total[f"{op}/{backend}"] = [a + b for a, b in zip(before, now, strict=True)]
    return units.put(state, meta={"counters": total})


def _counter_rows(state: State) -> list[dict[str, Json]]:
    total: Any = state.meta["counters"]
    rows: list[dict[str, Json]] = []
    for name, (calls, tokens, num_bytes, flops) in sorted(total.items()):
        op, backend = name.split("/")
        rows.append(
            {
                "kind": "counters",
                "op": op,
                "backend": backend,
                "calls": calls,
                "tokens": tokens,
                "bytes": num_bytes,
                "flops": flops,
            }
        )
    return rows
