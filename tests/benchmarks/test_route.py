"""The route benchmark: the chain is right, and its rows pair the rounds."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import _roofline, _rounds, route


def test_the_chain_is_what_models_compute():
    score_TE = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weight_TK, expert_TK, entropy_T = route.chain(score_TE, 2)
    for t, row in enumerate(score_TE.double()):
        p_E = row.exp() / row.exp().sum()
        best = sorted(range(7), key=lambda e, p_E=p_E: -p_E[e])[:2]
        assert expert_TK[t].tolist() == best
        torch.testing.assert_close(weight_TK[t], (p_E[best] / p_E[best].sum()).float())
        entropy = -(p_E * p_E.log()).sum() / torch.tensor(7.0).log()
        torch.testing.assert_close(entropy_T[t], entropy.float())


def test_an_empty_op_has_the_outputs_of_route():
    score_TE = torch.randn(3, 4)
    for got, want in zip(route.nothing(score_TE, 2), route.gk.route(score_TE, 2), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.parametrize("grad", [False, True])
def test_rows_have_every_way_and_pair_the_rounds(grad, monkeypatch):
    monkeypatch.setattr(route, "_ROUND_SECONDS", 1e-4)
    gate = _rounds.Gate(lambda: 1.0, settle=2)
    row = route.measure(route.Case(4, 8, 2, "bfloat16"), grad, 2, gate)
    assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    # Each round is twice as slow as the one before it: 3 and 5 times in the same round.
    row["seconds"] = {"gose": [1e-6, 2e-6], "torch": [3e-6, 10e-6], "empty op": [1e-7, 1e-7]}
    assert route.table([row]).endswith("| 1.5 | 6.5 | 0.1 | 4.0 |")


def test_quick_writes_its_own_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(route, "_ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(route, "CASES", [route.Case(1, 8, 2, "float32")])
    monkeypatch.setattr(_roofline, "flops", lambda *_: 1.0)
    assert route.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "route_quick.json").read_text())["rows"]
    assert [row["grad"] for row in rows] == [False, True]
    assert "1 × 8, 2" in capsys.readouterr().out
