from __future__ import annotations

import pytest

from gose.claims import claims


def _rows(seed: int, bwt: float = -0.1) -> list[dict[str, object]]:
    def summary(arm, acc, bwt, sent, sites):
        return {
            "kind": "summary",
            "seed": seed,
            "arm": arm,
            "acc": acc,
            "bwt_gem": bwt,
            "bytes_sent": sent,
            "bytes_float32": 400,
            "site_acc": sites,
        }

    def routing(mode, top1, flops):
        row = {"kind": "routing", "seed": seed, "arm": "main", "mode": mode}
        return row | {"top1": top1, "flops_per_input": flops}

    return [
        {"kind": "teacher", "seed": seed, "top1": 0.8, "train_flops": 1000},
        {"kind": "student", "seed": seed, "top1": 0.76, "train_flops": 500},
        routing("posterior", 0.7, 30),
        routing("static", 0.4, 20),
        routing("all", 0.5, 100),
        summary("main", 0.7, bwt, 100, [0.7]),
        summary("preserve=none", 0.5, -0.4, 100, [0.5]),
        summary("preserve=random", 0.6, -0.05, 100, [0.6]),
        summary("codec=none", 0.72, -0.1, 400, [0.72]),
        summary("merge=none", 0.5, -0.1, 0, [0.4, 0.65, 0.45]),
    ]


def test_values_by_hand_mean_over_seeds_and_verdicts():
    rows = {row["name"]: row for row in claims(_rows(0) + _rows(3, bwt=-0.3))}
    by_hand = {
        "student accuracy / teacher accuracy": ([0.95, 0.95], True),
        "student training FLOPs / teacher training FLOPs": ([0.5, 0.5], True),
        "EGS accuracy - static accuracy": ([0.3, 0.3], True),
        "EGS FLOPs / FLOPs of all modules": ([0.3, 0.3], True),
        "forgetting cut against preserve=none": ([0.75, 0.25], True),
        "forgetting cut against preserve=random": ([-1.0, -5.0], False),
        "float32 bytes / bytes sent": ([4.0, 4.0], True),
        "accuracy lost by the codec": ([0.02, 0.02], False),
        "merged accuracy - best isolated site": ([0.05, 0.05], True),
    }
    assert set(rows) == set(by_hand)
    for name, (values, holds) in by_hand.items():
        assert rows[name]["values"] == pytest.approx(values), name
        assert rows[name]["value"] == pytest.approx(sum(values) / 2)
        assert rows[name]["holds"] is holds, name


@pytest.mark.parametrize("control", [None, 0.0, 0.02])
def test_no_share_of_a_forgetting_that_did_not_happen(control):
    rows = _rows(0)
    next(row for row in rows if row.get("arm") == "preserve=none")["bwt_gem"] = control
    names = [row["name"] for row in claims(rows)]
    assert "forgetting cut against preserve=none" not in names
    assert "forgetting cut against preserve=random" in names


def test_claims_about_arms_that_did_not_run_are_left_out():
    rows = [row for row in _rows(0) if row.get("arm") != "merge=none" and row.get("mode") != "all"]
    names = [row["name"] for row in claims(rows)]
    assert "merged accuracy - best isolated site" not in names
    assert "EGS FLOPs / FLOPs of all modules" not in names
    assert len(names) == 7
    assert claims([]) == []
