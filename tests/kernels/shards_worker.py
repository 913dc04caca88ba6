"""One rank of tests/kernels/test_optim_shards.py:

    python -m tests.kernels.shards_worker RANK FOLDER WORLD KIND DTYPE

Of two ranks it trains three steps and saves; alone it loads what was saved. Then it trains three
more and leaves its numbers in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gose_kernels as gk


def build(dtype: torch.dtype) -> nn.Sequential:
    """Seven and five rows: the ranks' pieces differ in size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 7), nn.Linear(7, 5)).to(dtype)


def masks_of(model: nn.Module) -> dict[Any, Tensor]:
    """Rows, elements, and a block of columns, in the indices of the whole tensors."""
    random = torch.Generator().manual_seed(1)
    params = dict(model.named_parameters())
    return {
        params["0.weight"]: torch.rand(7, 1, generator=random) < 0.5,
        params["0.bias"]: torch.rand(7, generator=random) < 0.5,
        params["1.weight"]: torch.rand(5, 7, generator=random) < 0.5,
        params["1.bias"]: torch.tensor([True]),
    }


def make_optimizer(kind: str, model: nn.Module) -> Any:
    options = {"momentum": 0.9} if kind == "MaskedSGD" else {}
    make = getattr(gk.optim, kind)
    return make(
        model.parameters(), lr=0.05, frozen=masks_of(model), bfloat16="stochastic", **options
    )


def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
    """Every rank sees the same batch: the mean of two equal gradients is that gradient."""
    dtype = next(model.parameters()).dtype
    for number in numbers:
        random = torch.Generator().manual_seed(100 + number)
        optimizer.zero_grad()
        model(torch.randn(8, 32, generator=random).to(dtype)).square().sum().backward()
        if number == 4:  # released between steps: counts by mask from here on
            first = next(model.parameters())
            optimizer.set_frozen(first, torch.arange(7)[:, None] < 2)
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def main(rank: int, folder: Path, world: int, kind: str, dtype: torch.dtype) -> None:
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    model = build(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = make_optimizer(kind, model)
    if world > 1:
        steps(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    stored = {"model": weights, "optimizer": state}
    if world > 1:
        dcp.save(stored, checkpoint_id=folder / "checkpoint")
    else:
        dcp.load(stored, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps(model, optimizer, range(3, 6))
    norm = gk.optim.clip_grad_norm_(list(model.parameters()), 1e9, frozen=masks_of(model))
    whole = full(model)
    if rank == 0:
        torch.save({"params": whole, "norm": norm}, folder / f"result-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), Path(given[1]), int(given[2]), given[3], getattr(torch, given[4]))
