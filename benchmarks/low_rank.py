"""low_rank, and where its time goes.

    python -m benchmarks low_rank [--quick] [--threads N] [--rounds N]

With error feedback, float32. `products` are the three matrix products alone, in torch; `floor` is
the time that reading x and the residual three times and writing the residual once takes at the
bandwidth of torch's own reads and copies, over the op's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import _interleave


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """A row for each size and rank."""
    _interleave.keep_freed_memory()
    bytes_a_second = _interleave.bandwidth()
    rows = []
    for M, R in [(64, 4)] if quick else [(1024, 4), (1024, 16), (4096, 4), (4096, 32)]:
        generator = torch.Generator().manual_seed(0)
        x_MN, q_NR = torch.randn(M, M, generator=generator), torch.randn(M, R, generator=generator)
        residual_MN = 0.01 * torch.randn(M, M, generator=generator)
        p_MR = torch.linalg.qr(x_MN @ q_NR).Q.contiguous()

        def products(
            x_MN: Tensor = x_MN, q_NR: Tensor = q_NR, p_MR: Tensor = p_MR
        ) -> tuple[Tensor, ...]:
            return x_MN @ q_NR, x_MN.T @ p_MR, p_MR @ q_NR.T

        ways = {
            "gose": lambda args=(x_MN, q_NR, residual_MN): gk.low_rank(*args),
            "torch": lambda args=(x_MN, q_NR, residual_MN): gk.low_rank(*args, backend="torch"),
            "products": products,
            "qr": lambda y=x_MN @ q_NR: torch.linalg.qr(y),
        }
        times = _interleave.seconds(ways, rounds)
        moved = 7 * x_MN.nbytes
        rows.append(
            {
                "case": f"{M} x {M}, rank {R}",
                **{f"{way}_ms": 1e3 * t["median"] for way, t in times.items()},
                "ratio": times["torch"]["median"] / times["gose"]["median"],
                "floor": moved / bytes_a_second / times["gose"]["median"],
            }
        )
    return {"rows": rows, "bytes_a_second": bytes_a_second}


def main(argv: Sequence[str]) -> int:
    """Writes benchmarks/results/low_rank.json."""
    return _interleave.run("low_rank", __doc__, argv, measure)
