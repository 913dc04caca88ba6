"""benchmarks model: the clock sees the experts, the check sees a wrong one, ratios are those of the
better peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gose_kernels as gk
from benchmarks import model as bench


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    family, sizes = bench.MODELS["olmoe-4layer"]
    small = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "vocab_size": 96}
    monkeypatch.setitem(bench.MODELS, "olmoe-4layer", (family, {**sizes, **small}))
    gk.huggingface.register()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_experts_are_a_part_of_the_call(phase: str) -> None:
    model = bench.build("olmoe-4layer", 2, torch.bfloat16)
    table = bench.measure(model, phase, ("eager", "grouped_mm", "gose"), tokens=16, rounds=3)
    for row in table.values():
        assert 0 < row["moe_ms"] < row["model_ms"]
    best = min(table[name]["moe_ms"] for name in ("eager", "grouped_mm"))
    assert bench._ratios(table)["moe"] == best / table["gose"]["moe_ms"]


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ExpertsInterface

    assert bench.check("olmoe-4layer") < 1e-5
    right = ExpertsInterface._global_mapping["gose"]

    def wrong(*args: Any) -> torch.Tensor:
        return 1.01 * right(*args)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "gose", wrong)
    with pytest.raises(RuntimeError, match="gose is off by"):
        bench.check("olmoe-4layer")
