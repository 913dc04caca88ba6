"""dispatch: where every (token, slot) goes when rows are sorted by expert.

    rows of expert e are [offset[e], offset[e+1]), in ascending order of t, then k
    for t, k:  row[t, k] = that row, or -1 where expert[t, k] = E (unused slot)
    for n:     token[n] = the t whose slot owns row n, or -1 for n >= offset[E]

expert_TK    int32 | int64   expert of each slot in [0, E], E = unused; any strides; any other value
                             raises on torch and cpu, is trusted on cuda and triton (a check would
                             sync)
num_experts  E >= 0
returns      row_TK int32, token_N int32, offset_E1 int32; N = T*K always, below 2**31
T = 0 or K = 0 returns empty row and token, zero offsets. No gradient: the plan is integers.
The placement is stable, hence the same for every backend and any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor, int32

from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register


def _check(expert_TK: Tensor, num_experts: int) -> None:
    if expert_TK.dim() != 2:
        raise ValueError(
            f"dispatch: expert_TK must have 2 dimensions, got shape {tuple(expert_TK.shape)}"
        )
    if expert_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"dispatch: expert_TK must be int32 or int64, got {expert_TK.dtype}")
    if num_experts < 0:
        raise ValueError(f"dispatch: num_experts must be at least 0, got {num_experts}")
    if expert_TK.numel() >= 2**31:
        raise ValueError(
            f"dispatch: expert_TK must have fewer than 2**31 slots, got {expert_TK.numel()}"
        )


def dispatch_reference(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(expert_TK, num_experts)
    T, K = expert_TK.shape
    expert_N = expert_TK.reshape(-1).long()
    if expert_N.numel() and not bool(((expert_N >= 0) & (expert_N <= num_experts)).all()):
        raise ValueError(
            f"dispatch: expert_TK must hold experts in [0, num_experts={num_experts}], "
            f"where {num_experts} is an unused slot; "
            f"got [{int(expert_N.min())}, {int(expert_N.max())}]"
        )
    slot_N = expert_N.argsort(stable=True)
    load_E = torch.bincount(expert_N, minlength=num_experts + 1)[:num_experts]
    offset_E1 = torch.cat([load_E.new_zeros(1), load_E.cumsum(0)])
    n_N = torch.arange(T * K, device=expert_TK.device)
    used_N = n_N < offset_E1[-1]
    row_N = torch.empty_like(expert_N).scatter_(0, slot_N, torch.where(used_N, n_N, -1))
    token_N = torch.where(used_N, slot_N // max(K, 1), -1)
    return row_N.view(T, K).to(int32), token_N.to(int32), offset_E1.to(int32)


def _fake(
    expert_TK: Tensor, num_experts: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(expert_TK, num_experts)
    T, K = expert_TK.shape
    empty = expert_TK.new_empty
    return empty(T, K, dtype=int32), empty(T * K, dtype=int32), empty(num_experts + 1, dtype=int32)


def _cost(expert_TK: Tensor, num_experts: int) -> Cost:
    moved = expert_TK.numel() * (expert_TK.element_size() + 8) + (num_experts + 1) * 4
    return Cost(expert_TK.shape[0], moved, 0)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    return torch.arange(8, device=device, dtype=int32).view(4, 2) % 3, 3


dispatch = register(
    "dispatch(Tensor expert_TK, int num_experts, *, str? backend=None) -> (Tensor, Tensor, Tensor)",
    native("cuda", "dispatch"),
    triton("dispatch", "dispatch", check=_check),
    native("cpu", "dispatch"),
    reference(dispatch_reference),
    fake=_fake,
    cost=_cost,
    example=_example,
)
