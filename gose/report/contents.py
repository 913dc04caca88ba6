"""What a report says, independent of how it is shown: parts with tables and figures, from rows.

Every number is one recorded in metrics.jsonl (times: timings.jsonl), a mean of such over seeds, or
a ratio of two of them. `±` is the sample standard deviation over seeds.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gose import rundir
from gose.report import svg
from gose.report.text import byte_count, over_seeds, percent, plain, quantity, shown

Row = Mapping[str, Any]


class Table(NamedTuple):
    """Cells as text, one tuple per row."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Figure(NamedTuple):
    """SVG images side by side; the numbers they show, unless a table beside it holds them."""

    title: str
    images: list[str]
    numbers: Table | None = None


class Part(NamedTuple):
    """A section: title, a sentence that says how to read it, and its blocks."""

    title: str
    text: str
    blocks: list[Table | Figure]


class Report(NamedTuple):
    """The whole report of a run."""

    title: str
    standing: str  # how far the run has come, and its seeds
    parts: list[Part]
    config: str  # TOML


def read(path: Path) -> Report:
    """The report of the run in `path`, as far as it has come; ValueError if there is no run."""
    environment = rundir.read_environment(path)
    done, total = rundir.status(path)
    rows = rundir.read_rows(path / rundir.METRICS)
    config = (path / "config.toml").read_text(encoding="utf-8")
    tasks = [str(task) for task in tomllib.loads(config).get("data", {}).get("tasks", [])]
    complete = total > 0 and done == total
    standing = "complete" if complete else f"unfinished: {done} of {total or '?'} units"
    seeds = plain(environment.get("seeds"))
    standing += f"; seeds {seeds}; gose {environment.get('gose')}; {environment.get('started')}"
    parts = [
        _claims(rows),
        _teacher_and_student(rows),
        _accuracy(rows, tasks),
        _routing(rows),
        _communication(rows),
        _entropy(rows),
        _counters(rows),
        _time(rundir.read_rows(path / rundir.TIMINGS)),
        _environment(environment),
    ]
    return Report(path.resolve().name, standing, [part for part in parts if part.blocks], config)


def _kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.get("kind") == kind]


def _by(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows grouped by the value of one key, or the tuple of several, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        value = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        groups.setdefault(value, []).append(row)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _claims(rows: Sequence[Row]) -> Part:
    claims = [
        (
            str(row["name"]),
            plain(row["wanted"]),
            plain(row["value"]),
            "✓ holds" if row["holds"] else "✗ does not hold",
            plain(row.get("values")),
            str(row.get("note", "")),
        )
        for row in _kind(rows, "claim")
    ]
    table = Table(("claim", "wanted", "measured", "verdict", "per seed", "note"), claims)
    text = "What this run was to show, and what came out; measured is the mean over seeds."
    return Part("Claims", text, [table] if claims else [])


def _teacher_and_student(rows: Sequence[Row]) -> Part:
    teachers = {row["seed"]: row for row in _kind(rows, "teacher")}
    students = {row["seed"]: row for row in _kind(rows, "student")}
    if not teachers:
        return Part("Teacher and student", "", [])
    measures = {"top1": percent, "top5": percent, "train_flops": quantity}
    lines = [
        (
            name,
            *(over_seeds((row[key] for row in models.values()), measures[key]) for key in measures),
        )
        for name, models in (("teacher", teachers), ("student", students))
        if models
    ]
    pairs = [(students[seed], teachers[seed]) for seed in students if seed in teachers]
    if pairs:
        ratios = (
            over_seeds((s[key] / t[key] if t[key] else None for s, t in pairs), percent)
            for key in measures
        )
        lines.append(("student / teacher", *ratios))
    if controls := [row for row in students.values() if "scratch_top1" in row]:
        top1 = over_seeds((row["scratch_top1"] for row in controls), percent)
        flops = over_seeds((row["scratch_flops"] for row in controls), quantity)
        lines.append(("the student's shape, from labels alone", top1, "–", flops))
    agreement = [
        (str(seed), *(percent(share) for share in row["agreement"]))
        for seed, row in students.items()
    ]
    num_modules = max((len(line) - 1 for line in agreement), default=0)
    blocks: list[Table | Figure] = [Table(("", "top-1", "top-5", "training FLOPs"), lines)]
    if num_modules:
        columns = ("seed", *(f"agreement of module {i + 1}" for i in range(num_modules)))
        blocks.append(Table(columns, agreement))
    text = (
        "The retired teacher, and the small modules distilled from it before the stream begins. "
        "The student's FLOPs are all of them: meta model, modules, fine-tuning. Agreement: how "
        "often the meta model with that module gives the class that it gives with the teacher's "
        "stage instead."
    )
    return Part("Teacher and student", text, blocks)


def _matrices(rows: Sequence[Row], num_tasks: int) -> dict[str, list[list[float | None]]]:
    """Arm -> accuracy matrix, mean over seeds; None where nothing was measured."""
    matrices = {}
    for arm, of_arm in _by(_kind(rows, "accuracy"), "arm").items():
        after = _by(of_arm, "after_task")
        matrices[arm] = [
            [
                _mean(row["top1"][task] for row in after.get(i, []) if task < len(row["top1"]))
                for task in range(num_tasks)
            ]
            for i in range(num_tasks)
        ]
    return matrices


def _accuracy(rows: Sequence[Row], tasks: Sequence[str]) -> Part:
    measured = _kind(rows, "accuracy")
    num_tasks = max((max(row["after_task"] + 1, len(row["top1"])) for row in measured), default=0)
    matrices = _matrices(rows, num_tasks)
    values = [v for matrix in matrices.values() for line in matrix for v in line if v is not None]
    low = math.floor(10 * min(values, default=0.0)) / 10
    maps = [
        svg.heat_map(
            matrix,
            title=arm,
            low=low,
            high=1.0,
            row_label="after task",
            column_label="tested on task",
            form=lambda value: f"{100 * value:.1f}",
        )
        for arm, matrix in matrices.items()
    ]
    numbers = Table(
        ("arm", "after task", *(f"task {task + 1}" for task in range(num_tasks))),
        [
            (arm, str(i + 1), *(shown(value, percent) for value in line))
            for arm, matrix in matrices.items()
            for i, line in enumerate(matrix)
            if any(value is not None for value in line)
        ],
    )
    summary = _by(_kind(rows, "summary"), "arm")
    columns = [name for name, key in _SUMMARY.items() if any(key in r for r in rows)]
    lines = [
        (arm, *(over_seeds((row[_SUMMARY[name]] for row in of_arm), percent) for name in columns))
        for arm, of_arm in summary.items()
    ]
    blocks: list[Table | Figure] = [Table(("arm", *columns), lines)] if lines else []
    if matrices:
        names = "; ".join(f"{i + 1} {task}" for i, task in enumerate(tasks))
        title = f"Top-1 accuracy in % of the merged graph, no task given. Tasks: {names}"
        blocks.append(Figure(title, maps, numbers))
    text = (
        "How well every task is answered after each task of the stream. Accuracy: mean over tasks "
        "at the end; when learned: mean over tasks, each right after it. BWT: backward transfer, "
        "negative is forgetting. Frozen: share of the shared modules' elements at the end."
    )
    return Part("Learning the stream", text, blocks)


_SUMMARY = {
    "accuracy": "acc",
    "when learned": "learning_acc",
    "BWT (GEM)": "bwt_gem",
    "BWT (1/tasks)": "bwt_seed",
    "forgetting": "forgetting",
    "frozen": "frozen",
}


def _routing(rows: Sequence[Row]) -> Part:
    routing = _kind(rows, "routing")
    if not routing:
        return Part("Routing", "", [])
    arm = routing[0]["arm"]
    modes = _by((row for row in routing if row["arm"] == arm), "mode")
    flops = {
        mode: statistics.fmean(row["flops_per_input"] for row in of_mode)
        for mode, of_mode in modes.items()
    }
    whole = flops.get("all")
    table = Table(
        ("mode", "top-1", "FLOPs per input", "FLOPs / all modules'"),
        [
            (
                mode,
                over_seeds((row["top1"] for row in of_mode), percent),
                over_seeds((row["flops_per_input"] for row in of_mode), quantity),
                percent(flops[mode] / whole) if whole else "–",
            )
            for mode, of_mode in modes.items()
        ],
    )
    image = svg.points(
        {
            mode: [(row["flops_per_input"], row["top1"]) for row in of_mode]
            for mode, of_mode in modes.items()
        },
        x_label="FLOPs per input",
        y_label="top-1",
        x_form=quantity,
        y_form=percent,
        y_limits=(0.0, 1.0),
    )
    text = f"Ways to choose experts on the final graph of arm {arm}; FLOPs of what was executed."
    return Part("Routing", text, [table, Figure("Accuracy against FLOPs per input", [image])])


def _communication(rows: Sequence[Row]) -> Part:
    arms = _by(_kind(rows, "summary"), "arm")
    blocks: list[Table | Figure] = []
    if arms:
        lines = []
        for arm, of_arm in arms.items():
            sent, plain_bytes = (_sum(row[key] for row in of_arm) for key in _BYTES)
            lines.append(
                (
                    arm,
                    over_seeds((row["bytes_sent"] for row in of_arm), byte_count),
                    over_seeds((row["bytes_float32"] for row in of_arm), byte_count),
                    f"{plain_bytes / sent:.2f}" if sent else "–",
                    over_seeds((row["acc"] for row in of_arm), percent),
                )
            )
        columns = ("arm", "bytes sent", "as float32", "float32 / sent", "accuracy")
        blocks.append(Table(columns, lines))
        image = svg.points(
            {
                arm: [(row["bytes_sent"], row["acc"]) for row in of_arm if row["acc"] is not None]
                for arm, of_arm in arms.items()
            },
            x_label="bytes sent by all sites",
            y_label="accuracy at the end",
            x_form=byte_count,
            y_form=percent,
            y_limits=(0.0, 1.0),
        )
        blocks.append(Figure("Accuracy against bytes sent", [image]))
    if rounds := _kind(rows, "round"):
        blocks.append(_merging(rounds))
    text = "What the sites exchange. Bytes are the length of the serialized packets."
    return Part("Sites", text, blocks)


_BYTES = ("bytes_sent", "bytes_float32")


def _merging(rounds: Sequence[Row]) -> Figure:
    """The merged graph beside the sites it came from, over the rounds of the first arm."""
    arm = rounds[0]["arm"]
    groups = _by((row for row in rounds if row["arm"] == arm), "task", "round")
    series: dict[str, list[svg.Point]] = {"merged": [], "best site": [], "mean of sites": []}
    lines = []
    for number, ((task, index), of_round) in enumerate(groups.items(), start=1):
        values = (
            _mean(row["merged_top1"] for row in of_round),
            _mean(max(row["site_top1"]) for row in of_round),
            _mean(statistics.fmean(row["site_top1"]) for row in of_round),
        )
        for points, value in zip(series.values(), values, strict=True):
            if value is not None:  # sites that stay alone merge nothing
                points.append((number, value))
        lines.append((str(task + 1), str(index + 1), *(shown(value, percent) for value in values)))
    series = {name: points for name, points in series.items() if points}
    starts: dict[int, int] = {}
    for number, (task, _) in enumerate(groups, start=1):
        starts.setdefault(task, number)
    image = svg.lines(
        series,
        x_label="round",
        y_label="top-1",
        y_form=percent,
        y_limits=(0.0, 1.0),
        x_ticks={number: f"task {task + 1}" for task, number in starts.items()},
        dividers=[number - 0.5 for number in starts.values() if number > 1],
    )
    title = (
        "Merged graph and the sites' own, on validation images of the task being learnt, "
        f"arm {arm}, mean over seeds"
    )
    return Figure(
        title, [image], Table(("task", "round", "merged", "best site", "mean of sites"), lines)
    )


def _entropy(rows: Sequence[Row]) -> Part:
    measured = _kind(rows, "entropy")
    if not measured:
        return Part("Entropy of the modules", "", [])
    arm = measured[0]["arm"]
    after = _by((row for row in measured if row["arm"] == arm), "after_task")
    names = list(dict.fromkeys(name for row in measured for name in row["modules"]))
    means = {
        name: {
            i: _mean(row["modules"].get(name) for row in of_task) for i, of_task in after.items()
        }
        for name in names
    }
    image = svg.lines(
        {
            name: [(i + 1, value) for i, value in means[name].items() if value is not None]
            for name in names[: svg.NUM_COLORS]
        },
        x_label="after task",
        y_label="normalised entropy",
        y_form=lambda value: f"{value:.2f}",
        x_ticks={i + 1: str(i + 1) for i in after},
        y_range=(0.0, 1.0),
    )
    lines = [(name, *(shown(means[name][i], "{:.4f}".format) for i in after)) for name in names]
    drawn = (
        "" if len(names) <= svg.NUM_COLORS else f"; the first {svg.NUM_COLORS} modules are drawn"
    )
    title = f"Entropy of p(task | module), arm {arm}, mean over seeds{drawn}"
    table = Table(("module", *(f"after task {i + 1}" for i in after)), lines)
    text = (
        "0: the module answers one task alone; 1: all tasks alike. EGS wakes modules that are sure."
    )
    return Part("Entropy of the modules", text, [Figure(title, [image], table)])


def _counters(rows: Sequence[Row]) -> Part:
    counters = [
        (
            row["op"],
            row["backend"],
            f"{row['calls']:,}",
            *(quantity(row[key]) for key in ("tokens", "bytes", "flops")),
        )
        for row in _kind(rows, "counters")
    ]
    table = Table(("op", "backend", "calls", "tokens", "bytes", "FLOPs"), counters)
    text = "Which kernels ran, where, and the work they declared."
    return Part("Kernels", text, [table] if counters else [])


def _time(timings: Sequence[Row]) -> Part:
    phases = _by((row for row in timings if "phase" in row and "seconds" in row), "phase")
    total = _sum(row["seconds"] for rows in phases.values() for row in rows) or 1.0

    def line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
        spent = _sum(row["seconds"] for row in rows)
        in_kernels = _sum(row["kernel_seconds"] for row in rows) / (spent or 1.0)
        share = percent(spent / total)
        return (name, str(len(rows)), f"{spent:.1f} s", share, percent(in_kernels))

    lines = [line(phase, rows) for phase, rows in phases.items()]
    lines.append(line("all", [row for rows in phases.values() for row in rows]))
    table = Table(("phase", "units", "wall time", "share", "of it in gose kernels"), lines)
    text = (
        "Wall time of the units of this run. What the kernels gain over their torch references: "
        "python -m benchmarks system."
    )
    return Part("Time", text, [table] if phases else [])


def _environment(environment: Mapping[str, Any]) -> Part:
    table = Table(("fact", "value"), [(key, plain(value)) for key, value in environment.items()])
    text = "Numbers repeat bit for bit with the same config, versions, CPU level and threads."
    return Part("Environment", text, [table])


def _sum(values: Iterable[float]) -> float:
    return math.fsum(values)
