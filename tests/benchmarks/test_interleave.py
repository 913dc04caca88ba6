from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import _interleave


def test_every_way_runs_in_every_round_and_the_first_is_not_counted():
    calls: list[str] = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = _interleave.seconds(ways, 3)
    assert calls == ["a", "b"] * 4
    for t in times.values():
        assert 0 < t["low"] <= t["median"] <= t["high"]


def test_peak_memory_counts_the_result_and_what_was_freed():
    def way() -> torch.Tensor:
        torch.ones(16_000_000).sum()  # 64 MB, freed
        return torch.ones(20_000_000)

    assert 75e6 < _interleave.peak_bytes(way) < 100e6
    assert _interleave.peak_bytes(lambda: torch.ones(64_000_000).sum()) == pytest.approx(
        256e6, rel=0.1
    )


@pytest.mark.parametrize("name", ["distill_loss", "squared_grad"])
def test_a_quick_run_checks_both_sides_and_fills_every_figure(name, capsys):
    """The benchmark itself compares the results of its ways."""
    module = importlib.import_module(f"benchmarks.{name}")
    rows = module.measure(True, 1)["rows"]
    for row in rows:
        times = [value for key, value in row.items() if key.endswith("_ms")]
        assert len(times) >= 2
        assert all(value > 0 for value in times)
        assert row["ratio"] == pytest.approx(times[-1] / times[0])


@pytest.mark.parametrize("name", ["quantize", "distill_loss", "squared_grad", "low_rank"])
def test_bad_options_exit_2(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--rounds", "0"])
    assert stopped.value.code == 2
    capsys.readouterr()
