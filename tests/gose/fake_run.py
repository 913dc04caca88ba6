"""A run directory as `gose run quickstart` leaves it, with made-up numbers of believable size."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from gose import config, rundir
from gose.checkpoint import State
from gose.config import SystemConfig

TASKS = ("mnist-5k", "mnist-5k.rotate90", "digits", "mnist-5k.invert")
ARMS = ("main", "preserve=none", "preserve=random", "codec=none", "merge=none")
SITES = 3
MODULES = ("stem", "body", *(f"expert.{task}" for task in TASKS))
TOTAL = 40


def rows(seeds: tuple[int, ...] = (0, 1, 2), arms: tuple[str, ...] = ARMS) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in the order a run writes them."""
    made: list[dict[str, Any]] = []
    for seed in seeds:
        source = random.Random(seed)
        made += _distillation(seed, source)
        for arm in arms:
            made += _stream(seed, arm, source)
    made += _claims()
    for op in (
        "combine",
        "dispatch",
        "entropy",
        "grouped_gemm",
        "masked_adam_",
        "quantize",
        "route",
    ):
        calls = source.randrange(100, 90_000)
        tokens, flops = calls * 640, 0 if op == "dispatch" else calls * 10**6
        made.append(
            {
                "kind": "counters",
                "op": op,
                "backend": "cpu",
                "calls": calls,
                "tokens": tokens,
                "bytes": tokens * 392,
                "flops": flops,
            }
        )
    return made


def write(path: Path, made: list[dict[str, Any]], *, done: int = TOTAL) -> Path:
    """A run directory with these rows, `done` of TOTAL units committed."""
    settings = [f"data.tasks={','.join(TASKS)}", "threads=2"]
    with rundir.create(path, config.override(SystemConfig(), settings)) as run:
        for row in made:
            run.record(row)
        phases = ("teacher", "meta", "distill", "learn", "merge", "evaluate")
        for index in range(done):
            phase = phases[min(index // 7, 5)]
            seconds = {"seconds": 0.37 * index, "kernel_seconds": 0.1 * index}
            run.record_timing({"unit": f"{phase} {index}", "phase": phase, **seconds})
        run.commit(done, TOTAL, State({}, {}))
    return path


def _distillation(seed: int, source: random.Random) -> list[dict[str, Any]]:
    top1 = 0.947 + source.uniform(-0.006, 0.006)
    return [
        {
            "kind": "teacher",
            "seed": seed,
            "top1": top1,
            "top5": 0.996,
            "train_flops": 123_456_789_012 + seed,
        },
        {
            "kind": "student",
            "seed": seed,
            "top1": top1 - 0.013,
            "top5": 0.994,
            "train_flops": 45_678_901_234 + 11 * seed,
            "meta_flops": 9_876_543_210,
            "scratch_top1": top1 - 0.04,
            "scratch_flops": 35_000_000_000,
            "agreement": [0.93 + source.uniform(0, 0.03) for _ in range(3)],
        },
    ]


def _stream(seed: int, arm: str, source: random.Random) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    forgets = {"preserve=none": 0.05, "preserve=random": 0.04, "merge=none": 0.06}.get(arm, 0.015)
    matrix: list[list[float]] = []
    sent = 0
    for task in range(len(TASKS)):
        for index in range(4):
            sites = [source.uniform(0.72, 0.8) + 0.03 * index for _ in range(SITES)]
            full = 1_234_567
            packet = {"codec=none": full, "merge=none": 0}.get(arm, 327_680)
            sent += packet
            made.append(
                {
                    "kind": "round",
                    "seed": seed,
                    "arm": arm,
                    "task": task,
                    "round": index,
                    "bytes_sent": packet,
                    "bytes_float32": full if packet else 0,
                    "site_top1": sites,
                    "merged_top1": max(sites) + source.uniform(0.0, 0.05),
                }
            )
        top1 = [
            0.95 - forgets * (task - j) + source.uniform(-0.01, 0.01)
            if j <= task
            else 0.4 + source.uniform(-0.1, 0.1)
            for j in range(len(TASKS))
        ]
        matrix.append(top1)
        made.append(
            {
                "kind": "accuracy",
                "seed": seed,
                "arm": arm,
                "after_task": task,
                "top1": top1,
                "top5": [min(1.0, value + 0.04) for value in top1],
            }
        )
        modules = {
            name: max(0.02, 0.85 - 0.11 * number + 0.04 * task + source.uniform(-0.03, 0.03))
            for number, name in enumerate(MODULES[: 3 + task])
        }
        made.append(
            {"kind": "entropy", "seed": seed, "arm": arm, "after_task": task, "modules": modules}
        )
    flops = {"egs": 412_000, "static": 412_000, "uniform": 398_000, "all": 1_020_000}
    gain = {"egs": 0.0, "static": -0.06, "uniform": -0.3, "all": 0.002}
    acc = sum(matrix[-1]) / len(TASKS)
    for mode, cost in flops.items():
        top1_of_mode = acc + gain[mode] + source.uniform(-0.005, 0.005)
        made.append(
            {
                "kind": "routing",
                "seed": seed,
                "arm": arm,
                "mode": mode,
                "top1": top1_of_mode,
                "flops_per_input": cost + 1000 * seed,
            }
        )
    change = sum(matrix[-1][q] - matrix[q][q] for q in range(len(TASKS) - 1))
    made.append(
        {
            "kind": "summary",
            "seed": seed,
            "arm": arm,
            "acc": acc,
            "learning_acc": sum(matrix[q][q] for q in range(len(TASKS))) / len(TASKS),
            "frozen": 0.0 if arm == "preserve=none" else 0.64,
            "site_acc": [acc - 0.01 * site for site in range(SITES if arm == "merge=none" else 1)],
            "bwt_gem": change / (len(TASKS) - 1),
            "bwt_seed": change / len(TASKS),
            "forgetting": -change / (len(TASKS) - 1),
            "bytes_sent": sent,
            "bytes_float32": 16 * 1_234_567 if sent else 0,
            "flops_per_input": 412_000 + 1000 * seed,
        }
    )
    return made


def _claims() -> list[dict[str, Any]]:
    made = [
        (
            "student keeps the teacher's accuracy",
            ">= 0.9",
            0.98627,
            True,
            "per seed 0.986, 0.986, 0.987",
        ),
        ("student's training FLOPs", "<= 0.6", 0.37, True, "meta model, modules and fine-tuning"),
        ("EGS against static", ">= 0", 0.0612, True, ""),
        (
            "FLOPs of EGS against all modules",
            "<= 0.5",
            0.40392,
            True,
            "the shared stem counts in both",
        ),
        ("forgetting with KPP against none", "<= 0.8", 0.3127, True, "random mask: 0.81"),
        ("float32 bytes / packet bytes", ">= 3.5", 3.7676, True, "accuracy differs by 0.2 points"),
        (
            "merged against best isolated site",
            ">= 0",
            -0.0031,
            False,
            "seed 2: the site with all classes wins",
        ),
    ]
    keys = ("name", "wanted", "value", "holds", "note")
    return [
        {"kind": "claim", **dict(zip(keys, claim, strict=True)), "values": [claim[2]] * 3}
        for claim in made
    ]
