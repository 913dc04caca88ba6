"""The quickstart's phases: seconds, FLOPs, bytes, and the share of time inside gose kernels.

Every unit of the run is executed twice in a row, once with the ops as they choose their backends
and once with every op forced to its reference `torch`, on its own state each; which goes first
alternates. A third, untimed pass over the units counts FLOPs.

    python -m benchmarks system [--quick] [--trace FILE] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import gose_kernels as gk
from benchmarks import _record
from gose import recipes, system
from gose.checkpoint import State
from gose.config import SystemConfig, override
from gose.units import Unit

# A phase of the report -> phases of the run's units.
PHASES = {
    "teacher": ("teacher",),
    "distill": ("sensitivity", "meta", "distill"),
    "route": ("route",),
    "train": ("learn", "preserve"),
    "pack": ("pack",),
    "merge": ("merge",),
    "evaluate": ("evaluate", "control", "report"),
}
_QUICK = (
    "data.tasks=['digits', 'digits.rotate90', 'digits.invert']",
    "teacher.epochs=2",
    "distill.meta_epochs=1",
    "distill.epochs=1",
    "distill.finetune_epochs=1",
    "sites.rounds=2",
)


def measure(config: SystemConfig) -> dict[str, dict[str, float]]:
    """Phase -> what it took. Seconds are sums over its units; `kernel` is inside gose ops."""
    phase_of = {unit: phase for phase, members in PHASES.items() for unit in members}
    clocks = ("seconds", "kernel_seconds", "torch_seconds", "torch_kernel_seconds")
    columns = [*clocks, "flops", "kernel_bytes", "wire_bytes", "units"]
    table = {phase: dict.fromkeys(columns, 0.0) for phase in PHASES}
    plan = list(system.sequence(config))
    states = {"": State({}, {}), "torch_": State({}, {})}
    for index, unit in enumerate(plan):
        row = table[phase_of[unit.phase]]
        before = states[""]
        for prefix in ("", "torch_") if index % 2 else ("torch_", ""):
            start = time.perf_counter()
            with gk.profiling.record(backend="torch" if prefix else None) as counts:
                outcome = unit.run(states[prefix])
            row[f"{prefix}seconds"] += time.perf_counter() - start
            row[f"{prefix}kernel_seconds"] += counts.wall_seconds
            states[prefix] = system.with_results(outcome.state, outcome.rows)
            if not prefix:
                row["kernel_bytes"] += sum(count.bytes for count in counts.table.values())
                row["wire_bytes"] += outcome.bytes_sent
        row["flops"] += _flops(unit, before)
        row["units"] += 1
        _tell(f"{index + 1}/{len(plan)} {unit.name}")
    _tell("")
    return table


def _flops(unit: Unit, state: State) -> int:
    with gk.profiling.flop_counter() as counter:
        unit.run(state)
    return int(counter.get_total_flops())


def trace(config: SystemConfig, path: Path) -> None:
    """Chrome trace of the first task of a run, with a range per unit and per op."""
    state = State({}, {})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for unit in system.sequence(config):
            with torch.profiler.record_function(unit.name), gk.profiling.record(trace=True):
                outcome = unit.run(state)
            state = system.with_results(outcome.state, outcome.rows)
    profile.export_chrome_trace(str(path))


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _print(table: dict[str, dict[str, float]]) -> None:
    total = {key: sum(row[key] for row in table.values()) for key in next(iter(table.values()))}
    header = ("phase", "s", "in kernels", "all torch s", "ratio", "GFLOP", "kernel MB", "wire MB")
    print("{:10}{:>9}{:>12}{:>13}{:>8}{:>10}{:>11}{:>9}".format(*header))
    for phase, row in [*table.items(), ("total", total)]:
        seconds = max(row["seconds"], 1e-9)
        print(
            f"{phase:10}{row['seconds']:9.2f}{row['kernel_seconds'] / seconds:12.1%}"
            f"{row['torch_seconds']:13.2f}{row['torch_seconds'] / seconds:8.2f}"
            f"{row['flops'] / 1e9:10.2f}{row['kernel_bytes'] / 1e6:11.1f}"
            f"{row['wire_bytes'] / 1e6:9.2f}"
        )


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes benchmarks/results/system.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks system", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="digits only, few epochs and rounds")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write a Chrome trace")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    # One seed, no control arms: what is measured is the work, not the variance of its result.
    config = override(recipes.quickstart(), ["seeds=[0]", "arms=[]"])
    if options.quick:
        config = override(config, _QUICK)
    table = measure(config)
    _print(table)
    path = _record.save(
        "system_quick" if options.quick else "system",
        f"python -m benchmarks system {' '.join(argv)}".strip(),
        options.threads,
        {"phases": table},
    )
    print(f"wrote {path}")
    if options.trace:
        short = override(config, [*_QUICK, "data.tasks=['digits']"])
        trace(short, options.trace)
        print(f"wrote {options.trace}: a run on digits, one task; open it in chrome://tracing")
    return 0
