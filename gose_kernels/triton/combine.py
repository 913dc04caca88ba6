"""combine and its backward on a GPU: one program per token and column block, or per token.

Letters: T tokens, K experts per token, N rows, D width. The contract is in ops/combine.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import BYTES_PER_LOAD, declares, size_of, threads_per_warp, warps_of

_BACKWARD_WARPS = 4  # not tuned: they order its sums
_MAX_TILE = 4096  # elements of a tile of several rows: 32 float32 sums a thread


def _combine_work(args: Mapping[str, Any]) -> tuple[int, int]:
    row, out = args["row_ptr"], args["out_ptr"]
    rows = row.numel() * out.shape[1]  # all slots count as used
    moved = size_of(row, args["weight_ptr"], out) + rows * out.element_size()
    return moved, 2 * rows


def _combine_backward_work(args: Mapping[str, Any]) -> tuple[int, int]:
    row, grad = args["row_ptr"], args["grad_ptr"]
    rows = row.numel() * grad.shape[1]
    moved = size_of(row, args["weight_ptr"], args["grad_weight_ptr"])
    return moved + (grad.numel() + 2 * rows) * grad.element_size(), 3 * rows


@triton.jit(launch_metadata=declares(_combine_work))
def _combine_kernel(
    y_ptr,  # [N, D] expert outputs
    weight_ptr,  # [T, K] float32
    row_ptr,  # [T, K] int32 rows of y, -1 = unused
    out_ptr,  # [T, D] written once
    stride_yn,
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # int64: t * D passes 2**31 on long batches
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid_d = offs_d < D
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k).to(tl.int64)  # -1: unused slot, nothing is loaded
        weight = tl.load(weight_ptr + t * K + k)
        y = tl.load(y_ptr + row * stride_yn + offs_d, mask=valid_d & (row >= 0), other=0.0)
        acc += tl.where(row >= 0, weight * y.to(tl.float32), 0.0)
    tl.store(out_ptr + t * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=valid_d)


@triton.jit(launch_metadata=declares(_combine_backward_work))
def _combine_backward_kernel(
    grad_ptr,  # [T, D] gradient of out, read once
    y_ptr,  # [N, D]
    weight_ptr,  # [T, K] float32
    row_ptr,  # [T, K] int32, every row of y in one slot at most
    grad_y_ptr,  # [N, D] zeros; each used row is written by the program of its token
    grad_weight_ptr,  # [T, K] float32, written once
    stride_gt,
    stride_yn,
    D,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    slot_k = t * K + offs_k
    row_k = tl.load(row_ptr + slot_k, mask=offs_k < K, other=-1).to(tl.int64)  # -1: unused slot
    weight_k = tl.load(weight_ptr + slot_k, mask=offs_k < K, other=0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_ptr + t * stride_gt + offs_d, mask=offs_d < D, other=0.0)
        grad = grad.to(tl.float32)[None, :]
        used = (row_k >= 0)[:, None] & (offs_d < D)[None, :]
        y = tl.load(y_ptr + (row_k * stride_yn)[:, None] + offs_d[None, :], mask=used, other=0.0)
        acc += grad * y.to(tl.float32)
        # An unused slot may hold any weight; nothing of it is stored.
        grad_y = (weight_k[:, None] * grad).to(grad_y_ptr.dtype.element_ty)
        tl.store(grad_y_ptr + (row_k * D)[:, None] + offs_d[None, :], grad_y, mask=used)
    # grad is infinite or NaN where it likes: an unused slot's gradient is 0, not 0 * grad.
    grad_weight_k = tl.where(row_k >= 0, tl.sum(acc, axis=1), 0.0)
    tl.store(grad_weight_ptr + slot_k, grad_weight_k, mask=offs_k < K)


def _block(D: int, item_bytes: int, warps: int) -> tuple[int, int]:
    """Columns of one program and its warps: one widest load a thread, never wider than D needs."""
    block_d = min(triton.next_power_of_2(D), 32 * warps * BYTES_PER_LOAD // item_bytes)
    return block_d, max(1, block_d * item_bytes // (BYTES_PER_LOAD * threads_per_warp()))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def combine(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """out_TD, dtype of y; rows are trusted."""
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(T, D)
    if T == 0 or D == 0:
        return out_TD
    y_ND, weight_TK, row_TK = _unit_columns(y_ND), weight_TK.contiguous(), row_TK.contiguous()
    block_d, num_warps = _block(D, y_ND.element_size(), warps_of("combine"))
    with torch.cuda.device_of(y_ND):
        _combine_kernel[(T, triton.cdiv(D, block_d))](
            y_ND,
            weight_TK,
            row_TK,
            out_TD,
            y_ND.stride(0),
            D,
            K,
            block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return out_TD


def combine_backward(
    grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_y_ND, dtype of y, zero in unused rows, and grad_weight_TK float32; rows are trusted."""
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    grad_y_ND = y_ND.new_zeros(y_ND.shape)
    grad_weight_TK = weight_TK.new_empty(T, K)
    if T == 0 or K == 0:
        return grad_y_ND, grad_weight_TK
    grad_TD, y_ND = _unit_columns(grad_TD), _unit_columns(y_ND)
    weight_TK, row_TK = weight_TK.contiguous(), row_TK.contiguous()
    block_k = triton.next_power_of_2(K)
    # Few rows of a wide tile, or many of a narrow one: 16 bytes a thread and row.
    block_d, _ = _block(max(D, 1), y_ND.element_size(), _BACKWARD_WARPS)
    block_d = max(1, min(block_d, _MAX_TILE // block_k))
    num_warps = max(
        1, min(4, block_k * block_d * y_ND.element_size() // (BYTES_PER_LOAD * threads_per_warp()))
    )
    with torch.cuda.device_of(y_ND):
        _combine_backward_kernel[(T,)](
            grad_TD,
            y_ND,
            weight_TK,
            row_TK,
            grad_y_ND,
            grad_weight_TK,
            grad_TD.stride(0),
            y_ND.stride(0),
            D,
            K,
            block_k,
            block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return grad_y_ND, grad_weight_TK
