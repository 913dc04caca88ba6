"""distill_loss, forward and backward, against the chain of torch's own losses.

    python -m benchmarks distill_loss [--quick] [--threads N] [--rounds N]

Hard labels, tau 2. `ratio` is the eager chain's time over ours; `memory` is what one step adds at
its peak, gradient included, in multiples of the gradient. Once that is measured, freed memory is
kept by the allocator for every way (see _interleave.keep_freed_memory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gose_kernels as gk
from benchmarks import _interleave

_TAU, _TASK_WEIGHT = 2.0, 0.5
_CASES = [
    (4096, 1000, torch.float32),
    (4096, 1000, torch.bfloat16),
    (1024, 32000, torch.float32),
    (1024, 32000, torch.bfloat16),
]


def _chain(student_BC: Tensor, teacher_BC: Tensor, label_B: Tensor) -> Tensor:
    log_q = F.log_softmax(student_BC / _TAU, dim=1)
    log_p = F.log_softmax(teacher_BC / _TAU, dim=1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ce = F.cross_entropy(student_BC, label_B)
    return _TASK_WEIGHT * ce + (1 - _TASK_WEIGHT) * _TAU**2 * kl


def _ours(student_BC: Tensor, teacher_BC: Tensor, label_B: Tensor) -> Tensor:
    loss: Tensor = gk.distill_loss(
        student_BC, teacher_BC, label_B, task_weight=_TASK_WEIGHT, tau=_TAU
    )
    return loss


def _step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        tensors[0].grad = None
        loss(*tensors).backward()
        grad_BC = tensors[0].grad
        assert grad_BC is not None
        tensors[0].grad = None
        return grad_BC

    return step


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """A row for each shape and dtype."""
    rows = []
    for B, C, dtype in [(64, 100, torch.float32)] if quick else _CASES:
        ways = _ways(B, C, dtype)
        memory = {name: _interleave.peak_bytes(way) for name, way in ways.items()}
        grad_bytes = B * C * dtype.itemsize
        row: dict[str, Any] = {"shape": f"{B} x {C} {str(dtype).removeprefix('torch.')}"}
        row |= {f"{way}_memory": bytes_ / grad_bytes for way, bytes_ in memory.items()}
        rows.append((row, ways))
    if not quick:
        _interleave.keep_freed_memory()
    for row, ways in rows:
        times = _interleave.seconds(ways, rounds)
        row |= {f"{way}_ms": 1e3 * t["median"] for way, t in times.items()}
        row["ratio"] = times["eager"]["median"] / times["gose"]["median"]
    return {"rows": [row for row, _ in rows]}


def _ways(B: int, C: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student_BC = torch.randn(B, C, generator=generator).to(dtype).requires_grad_()
    teacher_BC = torch.randn(B, C, generator=generator).to(dtype)
    tensors = (student_BC, teacher_BC, torch.randint(0, C, (B,), generator=generator))
    ways = {"gose": _step(_ours, *tensors), "eager": _step(_chain, *tensors)}
    if dtype == torch.float32:
        torch.testing.assert_close(ways["gose"](), ways["eager"](), rtol=1e-4, atol=1e-7)
    return ways


def main(argv: Sequence[str]) -> int:
    """Writes benchmarks/results/distill_loss.json."""
    return _interleave.run("distill_loss", __doc__, argv, measure)
