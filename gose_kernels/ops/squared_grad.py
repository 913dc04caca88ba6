"""squared_grad: sum over samples of the squared per-sample gradient of a linear or expert layer.

For y = w x + bias and the gradient grad of each sample's own loss in y, exactly (diagonal Fisher):

    for e, f, d:  square[e, f, d]   = sum_b (sum_n grad[n, f] * x[n, d])^2
    for e, f:     square_bias[e, f] = sum_b (sum_n grad[n, f])^2
                  inner sums over the rows n of expert e that belong to sample b

x_ND       float32 | bfloat16 | float16 | float64, any strides: inputs of the layer, one row a token
grad_NF    dtype of x, any strides: gradients of the outputs. A loss averaged over B samples gives
           grad / B: multiply it by B first
sample_N   int32, the sample of each row: any values, any order. None: every row is its own sample
offset_E1  int32, offset[0] = 0, ascending, offset[E] <= N: rows [offset[e], offset[e+1]) belong to
           expert e, rows from offset[E] on are not read; anything else raises on torch and cpu, is
           trusted on cuda and triton (a check would sync). None: one layer, no dimension E
returns    square_EFD, square_bias_EF in float32 (float64 for float64)
Batches [B, T, D]: pass x.flatten(0, 1), grad.flatten(0, 1) and sample_N = b of each row. Rows in
dispatch order: x[token_N], grad[token_N] and sample_N = sample_T[token_N].
Weights in [E, D, F] layout: swap x and grad; the bias is then not that of the layer.
No gradient: the outputs are statistics. Autocast changes nothing.

One token per sample is the product (grad^2)^T (x^2): one GEMM. Otherwise per-sample gradients are
made and squared in tiles of registers on cpu and triton, in blocks of at most 4 Mi elements on
torch; [B, F, D] never exists.
Squares are not rescaled: in float32 gradients below 1e-23 square to 0.
Source: diagonal Fisher of EWC [Kirkpatrick et al. 2017]; squared per sample, not the batch mean.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register

# Elements of per-sample gradients that exist at one time: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    x_ND: Tensor, grad_NF: Tensor, sample_N: Tensor | None, offset_E1: Tensor | None
) -> None:
    if x_ND.dim() != 2 or grad_NF.dim() != 2 or x_ND.shape[0] != grad_NF.shape[0]:
        raise ValueError(
            f"squared_grad: x_ND and grad_NF must be matrices with as many rows, "
            f"got shapes {tuple(x_ND.shape)} and {tuple(grad_NF.shape)}"
        )
    if grad_NF.dtype != x_ND.dtype:
        raise ValueError(f"squared_grad: grad_NF must be {x_ND.dtype} as x_ND, got {grad_NF.dtype}")
    if sample_N is not None and (sample_N.shape != x_ND.shape[:1] or sample_N.dtype != torch.int32):
        raise ValueError(
            f"squared_grad: sample_N must be int32 of shape [N={x_ND.shape[0]}], "
            f"got {sample_N.dtype} of shape {tuple(sample_N.shape)}"
        )
    if offset_E1 is not None and (
        offset_E1.dim() != 1 or offset_E1.numel() < 1 or offset_E1.dtype != torch.int32
    ):
        raise ValueError(
            f"squared_grad: offset_E1 must be int32 of shape [E + 1], "
            f"got {offset_E1.dtype} of shape {tuple(offset_E1.shape)}"
        )


def _add_samples_(
    square_FD: Tensor, square_F: Tensor, x_ND: Tensor, grad_NF: Tensor, sample_N: Tensor
) -> None:
    """Add the squares of samples of several tokens each, by number of tokens, in blocks.

    Samples of equal length form a batched product; blocks of F and of samples bound its size.
    """
    order_N = sample_N.argsort(stable=True)
    edge = sample_N[order_N].diff().nonzero()[:, 0] + 1
    start_B = torch.cat([edge.new_zeros(1), edge])
    length_B = torch.cat([start_B, edge.new_full((1,), sample_N.numel())]).diff()
    block_F = max(1, min(grad_NF.shape[1], _BLOCK_ELEMENTS // max(1, x_ND.shape[1])))
    block_B = max(1, _BLOCK_ELEMENTS // max(1, block_F * x_ND.shape[1]))
    for length in sorted(set(length_B.tolist())):
        first_B = start_B[length_B == length]
        row_BT = order_N[first_B[:, None] + torch.arange(length, device=first_B.device)]
        if length == 1:
            _add_rows_(square_FD, square_F, x_ND[row_BT[:, 0]], grad_NF[row_BT[:, 0]])
            continue
        for row_bT in torch.split(row_BT, block_B):
            x_bTD, grad_bTF = x_ND[row_bT], grad_NF[row_bT]
            square_F += grad_bTF.sum(dim=1).square().sum(dim=0)
            for start in range(0, grad_NF.shape[1], block_F):
                stop = start + block_F
                per_sample_bFD = grad_bTF[..., start:stop].mT @ x_bTD
                square_FD[start:stop] += per_sample_bFD.square_().sum(dim=0)


def _add_rows_(square_FD: Tensor, square_F: Tensor, x_ND: Tensor, grad_NF: Tensor) -> None:
    """Add the squares of samples of one token each."""
    grad2_NF = grad_NF.square()
    square_FD.addmm_(grad2_NF.mT, x_ND.square())
    square_F += grad2_NF.sum(dim=0)


def squared_grad_reference(
    x_ND: Tensor,
    grad_NF: Tensor,
    sample_N: Tensor | None = None,
    offset_E1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    square_EFD, square_bias_EF = (t.zero_() for t in _fake(x_ND, grad_NF, sample_N, offset_E1))
    num_rows, dtype = x_ND.shape[0], square_EFD.dtype
    offset = [0, num_rows] if offset_E1 is None else offset_E1.tolist()
    if offset[0] != 0 or offset[-1] > num_rows or sorted(offset) != offset:
        raise ValueError(
            f"squared_grad: offset_E1 must ascend from 0 to at most N={num_rows}, got {offset}"
        )
    for e, (start, stop) in enumerate(pairwise(offset)):
        if stop == start:
            continue
        square_FD = square_EFD if offset_E1 is None else square_EFD[e]
        square_F = square_bias_EF if offset_E1 is None else square_bias_EF[e]
        x_nD, grad_nF = x_ND[start:stop].to(dtype), grad_NF[start:stop].to(dtype)
        if sample_N is None:
            _add_rows_(square_FD, square_F, x_nD, grad_nF)
        else:
            _add_samples_(square_FD, square_F, x_nD, grad_nF, sample_N[start:stop])
    return square_EFD, square_bias_EF


def _fake(
    x_ND: Tensor,
    grad_NF: Tensor,
    sample_N: Tensor | None = None,
    offset_E1: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x_ND, grad_NF, sample_N, offset_E1)
    experts = () if offset_E1 is None else (offset_E1.numel() - 1,)
    hidden, width = grad_NF.shape[1], x_ND.shape[1]
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return (
        x_ND.new_empty((*experts, hidden, width), dtype=dtype),
        x_ND.new_empty((*experts, hidden), dtype=dtype),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return None, None, None, None


def _cost(
    x_ND: Tensor,
    grad_NF: Tensor,
    sample_N: Tensor | None = None,
    offset_E1: Tensor | None = None,
) -> Cost:
    """Products and squares of every row; the number of samples is not known from shapes."""
    (rows, width), hidden = x_ND.shape, grad_NF.shape[1]
    experts = 1 if offset_E1 is None else offset_E1.numel() - 1
    out_bytes = torch.promote_types(x_ND.dtype, torch.float32).itemsize
    moved = (
        rows * (width + hidden) * x_ND.element_size() + experts * hidden * (width + 1) * out_bytes
    )
    ids = (0 if sample_N is None else rows) + (0 if offset_E1 is None else experts + 1)
    return Cost(rows, moved + 4 * ids, 2 * rows * width * hidden)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    N, D, F = 6, 4, 3
    return (
        torch.ones(N, D, device=device, dtype=dtype),
        torch.ones(N, F, device=device, dtype=dtype),
        torch.arange(N, device=device, dtype=torch.int32) // 2,
    )


squared_grad = register(
    "squared_grad(Tensor x_ND, Tensor grad_NF, Tensor? sample_N=None, Tensor? offset_E1=None, *, "
    "str? backend=None) -> (Tensor, Tensor)",
    triton("squared_grad", "squared_grad", *_KERNEL_DTYPES, check=_check),
    native("cpu", "squared_grad", *_KERNEL_DTYPES),
    reference(squared_grad_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
)
