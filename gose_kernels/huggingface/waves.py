"""Experts in waves: every token's best expert first, then the second of those that still need it.

After a wave a token leaves if what its other experts could add is small beside what it has:

    rest * |y| / w <= tolerance * |out|

with y the weighted output of its last expert, w that expert's weight, rest the weights of the
experts that did not run. Its sum is then scaled by (all weights) / (weights that ran).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_waves(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """(out_TD in the dtype of x, ran_TK bool): slots in order, num_experts = unused.

    run   (x, weight, expert) of some tokens and one slot each -> their weighted outputs
    """
    T, K = expert_TK.shape
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=wide)
    ran_TK = torch.zeros(T, K, dtype=torch.bool, device=x_TD.device)
    used_T = weight_TK.new_zeros(T)
    total_T = torch.where(expert_TK < num_experts, weight_TK, 0).sum(dim=1)
    stays_T = torch.ones(T, dtype=torch.bool, device=x_TD.device)
    for k in range(K):
        here = (stays_T & (expert_TK[:, k] < num_experts)).nonzero().flatten()
        if len(here) == 0:
            continue
        weight = weight_TK[here, k]
        y = run(x_TD[here], weight[:, None], expert_TK[here, k : k + 1]).to(wide)
        out_TD[here] += y
        ran_TK[here, k] = True
        used_T[here] += weight
        rest = (total_T[here] - used_T[here]) * y.norm(dim=1)
        stays_T[here] = rest > tolerance * weight.abs() * out_TD[here].norm(dim=1)
    scale_T = torch.where(used_T != 0, total_T / used_T, 1)
    return (out_TD * scale_T[:, None]).to(x_TD.dtype), ran_TK
