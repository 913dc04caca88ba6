"""A handful of the soak's cases, others at every commit; and the soak itself."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import pytest
import torch

from tests.soak import __main__ as soak
from tests.soak import bounds
from tests.soak.cases import run_case
from tests.soak.draw import Draw
from tests.soak.products import assert_within


@pytest.mark.parametrize("part", range(4))
def test_a_handful_of_cases(part: int, request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.config.getoption("--matrix-seed").encode())
    ops = {run_case(seed, case) for case in range(10 * part, 10 * part + 10)}
    assert ops <= {"expert_mlp", "grouped_gemm", "moe", "route"}


def test_a_case_is_drawn_from_its_seed_and_number_alone() -> None:
    one, same, other = Draw(3, 5), Draw(3, 5), Draw(3, 6)
    drawn = [d.normal(7, 5, dtype=torch.float32) for d in (one, same, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for _ in range(40):
        laid = one.laid_out(drawn[0])
        assert torch.equal(laid, drawn[0])
        assert laid.stride() == same.laid_out(drawn[1]).stride()


def test_rounding_stays_within_the_bound_and_a_wrong_element_does_not() -> None:
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 300, generator=random), torch.randn(300, 20, generator=random)
    truth = x.double() @ w.double()
    bound = bounds.product(x.double(), w.double()) + bounds.rounded(truth, torch.float32)
    got = x @ w
    assert_within("product", got, truth, bound, torch.float32)
    assert float((bound / truth.norm() * truth.numel() ** 0.5).max()) < 2e-4
    got[3, 7] += 0.01
    with pytest.raises(
        AssertionError, match=r"product: 1 of 800 beyond .* element 67 of \(40, 20\)"
    ):
        assert_within("product", got, truth, bound, torch.float32)


def test_a_run_goes_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def run(seed: int, case: int) -> str:
        seen.append((seed, case))
        assert case != 4
        return "route"

    monkeypatch.setattr(soak, "run_case", run)
    given = argparse.Namespace(seed=9, count=2, minutes=0.0)
    state = tmp_path / "state.json"
    for _ in range(2):
        soak._work(given, state)
    with pytest.raises(AssertionError):
        soak._work(given, state)
    assert seen == [(9, case) for case in range(5)]
    assert json.loads(state.read_text())["next"] == 4, "the case that failed is named"
