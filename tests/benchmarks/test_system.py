from __future__ import annotations

import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks import system as bench
from gose import recipes, system
from gose.checkpoint import State
from gose.config import override


def test_every_unit_of_a_run_has_one_phase_in_the_table():
    phases = [unit for members in bench.PHASES.values() for unit in members]
    assert len(phases) == len(set(phases))
    assert {unit.phase for unit in system.sequence(recipes.quickstart())} == set(phases)


def test_measured_work_is_the_work_of_the_run():
    """Bytes and FLOPs of the table against the run's own formulas; both sides of the clock ran."""
    settings = [
        "data.tasks=['digits']",
        "data.train_per_class=20",
        "seeds=[0]",
        "arms=[]",
        "teacher.width=16",
        "teacher.hidden=16",
        "teacher.epochs=1",
        "distill.width=8",
        "distill.hidden=[8, 8, 8]",
        "distill.meta_epochs=1",
        "distill.epochs=1",
        "distill.finetune_epochs=1",
        "sites.rounds=1",
        "sites.steps=2",
    ]
    config = override(recipes.quickstart(), settings)
    table = bench.measure(config)
    rows = {row["kind"]: row for row in _rows(config)}
    # the table also has the optimizer's elementwise work, which no training formula counts
    assert 1 < table["teacher"]["flops"] / rows["teacher"]["train_flops"] < 1.1
    summary = rows["summary"]
    assert sum(row["wire_bytes"] for row in table.values()) == summary["bytes_sent"]
    for phase in ("teacher", "distill", "route", "train", "pack", "merge"):
        row = table[phase]
        assert 0 < row["kernel_seconds"] < row["seconds"], phase
        assert 0 < row["torch_kernel_seconds"] < row["torch_seconds"], phase


def _rows(config):
    state, rows = State({}, {}), []
    for unit in system.sequence(config):
        outcome = unit.run(state)
        state = system.with_results(outcome.state, outcome.rows)
        rows += outcome.rows
    return rows


def test_an_unknown_benchmark_is_refused(capsys):
    assert benchmarks_main.main(["sistem"]) == 2
    assert "wants one of" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--nope"], ["--threads", "many"]])
def test_unknown_options_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2
    capsys.readouterr()
