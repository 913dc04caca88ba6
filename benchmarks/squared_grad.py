"""squared_grad of a linear layer against torch.func's per-sample gradients.

    python -m benchmarks squared_grad [--quick] [--threads N] [--rounds N]

`vmap` is vmap(grad) of the layer, squared and summed: every per-sample gradient exists. `torch` is
our own reference. Memory is what a call adds at its peak, result included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import _interleave


def _loss(w_FD: Tensor, bias_F: Tensor, x_TD: Tensor, wanted_TF: Tensor) -> Tensor:
    return (torch.nn.functional.linear(x_TD, w_FD, bias_F) - wanted_TF).square().sum()


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """A row for each number of tokens a sample has."""
    B, D = (16, 32) if quick else (256, 1024)
    rows = []
    for T in (1, 4):
        generator = torch.Generator().manual_seed(0)
        w_FD = torch.randn(D, D, generator=generator) / D**0.5
        bias_F, wanted_BTF = torch.zeros(D), torch.randn(B, T, D, generator=generator)
        x_BTD = torch.randn(B, T, D, generator=generator)
        error_BTF = torch.nn.functional.linear(x_BTD, w_FD, bias_F) - wanted_BTF
        x_ND, grad_NF = x_BTD.flatten(0, 1), 2 * error_BTF.flatten(0, 1)
        sample_N = None if T == 1 else torch.arange(B).repeat_interleave(T).int()
        per_sample = torch.func.vmap(torch.func.grad(_loss, (0, 1)), (None, None, 0, 0))

        def with_vmap(
            run: Any = per_sample, args: tuple[Tensor, ...] = (w_FD, bias_F, x_BTD, wanted_BTF)
        ) -> tuple[Tensor, ...]:
            return tuple(grad.square().sum(dim=0) for grad in run(*args))

        def ours(
            args: tuple[Tensor | None, ...] = (x_ND, grad_NF, sample_N), backend: str | None = None
        ) -> tuple[Tensor, Tensor]:
            square, bias = gk.squared_grad(*args, backend=backend)
            return square, bias

        ways = {
            "gose": ours,
            "torch": lambda run=ours: run(backend="torch"),
            "vmap": with_vmap,
        }
        for got, want in zip(ours(), with_vmap(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.max()))
        memory = {name: _interleave.peak_bytes(way) for name, way in ways.items()}
        times = _interleave.seconds(ways, rounds)
        rows.append(
            {
                "case": f"{B} samples of {T} tokens, {D} x {D}",
                **{f"{way}_ms": 1e3 * t["median"] for way, t in times.items()},
                **{f"{way}_MB": bytes_ / 1e6 for way, bytes_ in memory.items()},
                "ratio": times["vmap"]["median"] / times["gose"]["median"],
                "memory_ratio": memory["vmap"] / max(memory["gose"], 1),
            }
        )
    return {"rows": rows}


def main(argv: Sequence[str]) -> int:
    """Writes benchmarks/results/squared_grad.json."""
    return _interleave.run("squared_grad", __doc__, argv, measure)
