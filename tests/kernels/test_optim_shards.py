"""Optimizers of sharded parameters: FSDP2 over gloo, two processes and one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gose_kernels as gk
from tests.kernels import shards_worker

ROOT = Path(__file__).parent.parent.parent


def run_ranks(folder: Path, world: int, kind: str, dtype: str) -> None:
    module, place = shards_worker.__name__, (str(folder), str(world), kind, dtype)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), *place],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, output


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("MaskedAdamW", "float32"), ("MaskedSGD", "bfloat16"), ("MaskedLion", "float32")],
)
def test_shards_take_the_steps_of_the_whole(kind, dtype, tmp_path):
    """Two ranks, and one that goes on from their checkpoint, end with the bits of no sharding."""
    model = shards_worker.build(getattr(torch, dtype))
    start = shards_worker.full(model)
    optimizer = shards_worker.make_optimizer(kind, model)
    shards_worker.steps(model, optimizer, range(6))
    expected = shards_worker.full(model)
    norm = gk.optim.clip_grad_norm_(
        list(model.parameters()), 1e9, frozen=shards_worker.masks_of(model)
    )
    for world in (2, 1):
        run_ranks(tmp_path, world, kind, dtype)
        result = torch.load(tmp_path / f"result-{world}.pt")
        for name, value in expected.items():
            assert torch.equal(result["params"][name], value), (world, name)
        torch.testing.assert_close(result["norm"], norm.detach(), rtol=1e-6, atol=0)
    assert torch.equal(expected["1.bias"], start["1.bias"])
    assert not torch.equal(expected["0.weight"], start["0.weight"])
