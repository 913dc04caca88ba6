"""The whole system in miniature: real digits, small nets, every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gose import rundir, system
from gose.checkpoint import State
from gose.config import SystemConfig, override

_ARMS = ("preserve=none", "preserve=random", "route=uniform", "codec=none", "merge=none")
MINIATURE = override(
    SystemConfig(),
    [
        "data.tasks=['digits', 'digits.rotate90', 'digits.invert']",
        "data.side=8",
        "teacher.width=32",
        "teacher.hidden=32",
        "teacher.num_blocks=1",
        "teacher.epochs=6",
        "teacher.batch_size=32",
        "distill.width=16",
        "distill.hidden=[16, 16, 24]",
        "distill.meta_hidden=8",
        "distill.meta_epochs=1",
        "distill.epochs=1",
        "distill.finetune_epochs=1",
        "distill.sensitivity_images=100",
        "preserve.images=50",
        "sites.rounds=2",
        "sites.steps=5",
        "sites.lr=0.01",
        "sites.shared_lr_factor=1.0",
        f"arms={list(_ARMS)}",
        "seeds=[0]",
        "threads=1",
    ],
)


def _finish(path: Path, config: SystemConfig) -> list[dict[str, Any]]:
    with rundir.create(path, config) as run:
        for _ in system.run(config, run):
            pass
    return _rows(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("system") / "run"
    threads = torch.get_num_threads()
    _finish(path, MINIATURE)
    torch.set_num_threads(threads)
    return path


def _summaries(path: Path) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in _rows(path) if row["kind"] == "summary"}


def test_every_setting_changes_its_number(finished):
    arms = _summaries(finished)
    main = arms["main"]
    assert main["frozen"] > 0.5
    assert arms["preserve=none"]["frozen"] == 0
    assert arms["preserve=none"]["bwt_gem"] != main["bwt_gem"]
    assert arms["preserve=random"]["frozen"] == main["frozen"]
    assert arms["preserve=random"]["bwt_gem"] != main["bwt_gem"]
    assert arms["route=uniform"]["acc"] < main["acc"]
    assert arms["codec=none"]["bytes_sent"] == arms["codec=none"]["bytes_float32"]
    assert (
        arms["codec=none"]["bytes_sent"] > 1.5 * main["bytes_sent"]
    )  # small models: headers weigh
    assert arms["merge=none"]["bytes_sent"] == 0
    assert arms["merge=none"]["acc"] != main["acc"]
    assert len(arms["merge=none"]["site_acc"]) == 3
    assert main["bytes_float32"] > main["bytes_sent"]


def test_the_summary_is_computed_from_the_accuracy_rows(finished):
    rows = [r for r in _rows(finished) if r["kind"] == "accuracy" and r["arm"] == "main"]
    assert [row["after_task"] for row in rows] == [0, 1, 2]
    acc = [row["top1"] for row in rows]
    main = _summaries(finished)["main"]
    assert main["acc"] == pytest.approx(sum(acc[-1]) / 3)
    change = (acc[2][0] - acc[0][0]) + (acc[2][1] - acc[1][1])
    assert main["bwt_gem"] == pytest.approx(change / 2)
    assert main["bwt_seed"] == pytest.approx(change / 3)
    sent = sum(
        r["bytes_sent"] for r in _rows(finished) if r["kind"] == "round" and r["arm"] == "main"
    )
    assert main["bytes_sent"] > sent > 0, "statistics are counted too"


def test_arms_begin_alike(finished):
    """Common random numbers: before anything differs, arms measure the same."""
    rounds = [r for r in _rows(finished) if r["kind"] == "round" and r["task"] == r["round"] == 0]
    assert len(rounds) == 1 + len(_ARMS)
    assert len({tuple(row["site_top1"]) for row in rounds}) == 1


def test_learning_and_routing_do_something(finished):
    rows = _rows(finished)
    teacher = next(row for row in rows if row["kind"] == "teacher")
    assert teacher["top1"] > 0.8
    modes = {row["mode"]: row for row in rows if row["kind"] == "routing" and row["arm"] == "main"}
    assert set(modes) == {"posterior", "sample", "static", "uniform", "all"}
    assert modes["posterior"]["top1"] > modes["static"]["top1"]
    assert modes["static"]["flops_per_input"] < modes["all"]["flops_per_input"]
    used = {row["op"] for row in rows if row["kind"] == "counters"}
    assert used >= {
        "combine",
        "dequantize_add_",
        "dispatch",
        "distill_loss_train",
        "entropy",
        "grouped_gemm",
        "masked_adam_",
        "quantize",
        "route",
        "squared_grad",
    }
    assert {row["name"] for row in rows if row["kind"] == "claim"}


@pytest.mark.parametrize("every", [7, 31])
def test_a_run_that_stops_and_resumes_writes_the_same_bytes(finished, tmp_path, monkeypatch, every):
    monkeypatch.setattr(system, "_COMMIT_SECONDS", 0.0 if every == 7 else 0.3)
    path, stops = tmp_path / "run", 0
    with rundir.create(path, MINIATURE) as run:
        for count, _ in enumerate(system.run(MINIATURE, run), start=1):
            if count == every:
                break
    done = False
    while not done:
        done = True
        with rundir.resume(path) as run:
            for count, _ in enumerate(system.run(run.config, run), start=1):
                if count == 5 * every:
                    done, stops = False, stops + 1
                    break
    assert stops >= 1
    wanted = (finished / "metrics.jsonl").read_bytes()
    assert (path / "metrics.jsonl").read_bytes() == wanted


def test_arms_equal_to_the_run_itself_are_not_run_twice():
    config = override(MINIATURE, ["preserve=none"])
    assert list(system.arms(config)) == ["main", *(a for a in _ARMS if a != "preserve=none")]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "sites.num_sites=900",
            "at least 1800 train images for 900 sites, got 1295; raise data.train",
        ),
        ("data.validation_fraction=0.0001", "at least 3 validation images for 3 sites, got 0"),
        ("data.test_fraction=0.0001", "task digits must have at least 1 test images"),
    ],
)
def test_too_few_images_are_told_before_anything_is_trained(setting, message):
    first = next(system.sequence(override(MINIATURE, [setting])))
    with pytest.raises(ValueError, match=message):
        first.run(State({}, {}))


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        (["distill=scratch", "arms=[]"], lambda row: row["meta_flops"] == 0),
        (["distill.start=random", "arms=[]"], lambda row: len(row["agreement"]) == 3),
    ],
)
def test_other_ways_to_a_student(tmp_path, settings, check):
    tasks = "data.tasks=['digits']"
    rows = _finish(tmp_path / "run", override(MINIATURE, [tasks, "sites.rounds=1", *settings]))
    student = next(row for row in rows if row["kind"] == "student")
    assert check(student)
    summary = next(row for row in rows if row["kind"] == "summary")
    assert summary["bwt_gem"] is None, "one task: not defined"
