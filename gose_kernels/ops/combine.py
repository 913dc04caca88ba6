"""combine: weighted sum of the K expert rows of every token.

    for t, d:  out[t, d] = sum_k weight[t, k] * y[row[t, k], d]

y_ND       float32 | bfloat16 | float16 | float64   expert outputs, any row stride
weight_TK  float32 (float64 with a float64 y)       gate weights
row_TK     int32    rows of y in [0, N), or -1 = unused slot, skipped (never multiplied by 0); any
                    other value raises on torch and cpu, is trusted on cuda and triton (a check
                    would sync)
returns    out_TD, dtype of y. Sums in float32 (float64 for float64), k ascending.
T = 0 returns an empty tensor. Differentiable in y and weight; the backward wants every row used by
at most one slot, as a dispatch plan has it: torch and cpu raise otherwise, cuda and triton trust.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32

from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register


def _check(name: str, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> None:
    if y_ND.dim() != 2:
        raise ValueError(f"{name}: y_ND must have 2 dimensions, got shape {tuple(y_ND.shape)}")
    if not y_ND.is_floating_point():
        raise ValueError(f"{name}: y_ND must be floating point, got {y_ND.dtype}")
    if weight_TK.dim() != 2:
        raise ValueError(
            f"{name}: weight_TK must have 2 dimensions, got shape {tuple(weight_TK.shape)}"
        )
    if row_TK.shape != weight_TK.shape:
        raise ValueError(
            f"{name}: row_TK must have the shape of weight_TK {tuple(weight_TK.shape)}, "
            f"got {tuple(row_TK.shape)}"
        )
    if row_TK.dtype != torch.int32:
        raise ValueError(f"{name}: row_TK must be int32, got {row_TK.dtype}")
    wanted = torch.promote_types(y_ND.dtype, float32)
    if weight_TK.dtype != wanted:
        raise ValueError(
            f"{name}: weight_TK must be {wanted} for y_ND of {y_ND.dtype}, got {weight_TK.dtype}"
        )


def _check_forward(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> None:
    _check("combine", y_ND, weight_TK, row_TK)


def _check_backward(grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> None:
    _check("combine_backward", y_ND, weight_TK, row_TK)
    if grad_TD.dtype != y_ND.dtype:
        raise ValueError(f"combine_backward: grad_TD must be {y_ND.dtype}, got {grad_TD.dtype}")
    wanted = (weight_TK.shape[0], y_ND.shape[1])
    if grad_TD.shape != wanted:
        raise ValueError(
            f"combine_backward: grad_TD must have shape {wanted}, got {tuple(grad_TD.shape)}"
        )


def _check_rows(name: str, row_TK: Tensor, num_rows: int) -> None:
    if row_TK.numel() and not bool(((row_TK >= -1) & (row_TK < num_rows)).all()):
        raise ValueError(f"{name}: row_TK must hold rows in [0, N={num_rows}) or -1")


def combine_reference(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    _check_forward(y_ND, weight_TK, row_TK)
    _check_rows("combine", row_TK, y_ND.shape[0])
    out_TD = torch.zeros(
        weight_TK.shape[0], y_ND.shape[1], dtype=weight_TK.dtype, device=y_ND.device
    )
    if y_ND.shape[0] == 0:
        return out_TD.to(y_ND.dtype)
    for k in range(weight_TK.shape[1]):
        row_T = row_TK[:, k]
        y_TD = y_ND[row_T.clamp_min(0)].to(weight_TK.dtype)
        out_TD = torch.where((row_T >= 0)[:, None], out_TD + weight_TK[:, k, None] * y_TD, out_TD)
    return out_TD.to(y_ND.dtype)


def combine_backward_reference(
    grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y_ND (its dtype, zero in unused rows) and weight_TK."""
    _check_backward(grad_TD, y_ND, weight_TK, row_TK)
    _check_rows("combine_backward", row_TK, y_ND.shape[0])
    used_TK = row_TK >= 0
    row_U = row_TK[used_TK].long()
    if row_U.numel() and int(torch.bincount(row_U).max()) > 1:
        raise ValueError("combine_backward: row_TK must use every row of y_ND at most once")
    token_U = used_TK.nonzero()[:, 0]
    grad_UD = grad_TD[token_U].to(weight_TK.dtype)
    grad_y_ND = torch.zeros_like(y_ND, memory_format=torch.contiguous_format)
    grad_y_ND[row_U] = (weight_TK[used_TK][:, None] * grad_UD).to(y_ND.dtype)
    grad_weight_TK = torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
    grad_weight_TK[used_TK] = (grad_UD * y_ND[row_U].to(weight_TK.dtype)).sum(dim=1)
    return grad_y_ND, grad_weight_TK


def _fake(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor, *, backend: str | None = None) -> Tensor:
    _check_forward(y_ND, weight_TK, row_TK)
    return y_ND.new_empty(weight_TK.shape[0], y_ND.shape[1])


def _backward_fake(
    grad_TD: Tensor,
    y_ND: Tensor,
    weight_TK: Tensor,
    row_TK: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_TD, y_ND, weight_TK, row_TK)
    return y_ND.new_empty(y_ND.shape), weight_TK.new_empty(weight_TK.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.backend = keyword_only_inputs["backend"]


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grad_y_ND, grad_weight_TK = torch.ops.gose.combine_backward(
        grad_TD, *ctx.saved_tensors, backend=ctx.backend
    )
    return grad_y_ND, grad_weight_TK, None


def _cost(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Cost:
    slots, width = row_TK.numel(), y_ND.shape[1]
    tokens = row_TK.shape[0]
    moved = (slots + tokens) * width * y_ND.element_size() + slots * (weight_TK.element_size() + 4)
    return Cost(tokens, moved, 2 * slots * width)


def _backward_cost(grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Cost:
    slots, (tokens, width) = row_TK.numel(), grad_TD.shape
    moved = (tokens + 2 * slots) * width * y_ND.element_size()
    return Cost(tokens, moved + slots * (2 * weight_TK.element_size() + 4), 3 * slots * width)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    T, K, D = 4, 2, 8
    return (
        torch.ones(T * K, D, device=device, dtype=dtype),
        torch.full((T, K), 0.5, device=device, dtype=torch.promote_types(dtype, float32)),
        torch.arange(T * K, device=device, dtype=torch.int32).view(T, K),
    )


def _backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    args = _example(device, dtype)
    return (torch.ones(4, 8, device=device, dtype=dtype), *args)


combine = register(
    "combine(Tensor y_ND, Tensor weight_TK, Tensor row_TK, *, str? backend=None) -> Tensor",
    native("cuda", "combine", float32, bfloat16, float16),
    triton("combine", "combine", float32, bfloat16, float16, check=_check_forward),
    native("cpu", "combine", float32, bfloat16, float16),
    reference(combine_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
)

combine_backward = register(
    "combine_backward(Tensor grad_TD, Tensor y_ND, Tensor weight_TK, Tensor row_TK, *, "
    "str? backend=None) -> (Tensor, Tensor)",
    native("cuda", "combine_backward", float32, bfloat16, float16),
    triton("combine", "combine_backward", float32, bfloat16, float16, check=_check_backward),
    native("cpu", "combine_backward", float32, bfloat16, float16),
    reference(combine_backward_reference),
    fake=_backward_fake,
    cost=_backward_cost,
    example=_backward_example,
)
