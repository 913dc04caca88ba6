from __future__ import annotations

import pytest

from benchmarks import masked_update as bench


@pytest.mark.parametrize(
    "way", [w for w in bench.WAYS if not w.approximate], ids=lambda way: f"{way.name}, {way.mask}"
)
def test_every_way_makes_torchs_step_and_keeps_what_it_says(way):
    bench.check(way)
    if not way.keeps:
        with pytest.raises(AssertionError):
            bench.check(way._replace(keeps=True))


def test_rows_and_shares_of_a_small_run(monkeypatch):
    monkeypatch.setattr(bench, "WAYS", [bench.WAYS[0], bench.WAYS[5], bench.WAYS[8]])
    result = bench.measure((8, 24, 256), 2)
    assert [row["mask"] for row in result["rows"]] == ["none", "none", "rows 75 %"]
    assert all(row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in result["rows"])
    assert 0.1 < result["state_share"]["rows 75 %"] < 0.5
