"""combine and its backward on a GPU: one program per token and column block, or per slot.

Letters: T tokens, K experts per token, N rows, D width. The contract is in ops/combine.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_THREADS_PER_WARP = 64 if torch.version.hip else 32
_BYTES_PER_LOAD = 16  # widest load of one thread
_MAX_THREADS = 128


@triton.jit
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


@triton.jit
def _combine_backward_kernel(
    grad_ptr,  # [T, D] gradient of out
    y_ptr,  # [N, D]
    weight_ptr,  # [T, K] float32
    row_ptr,  # [T, K] int32, every row of y in one slot at most
    grad_y_ptr,  # [N, D] zeros; each used row is written by the program of its slot
    grad_weight_ptr,  # [T, K] float32, written once
    stride_gt,
    stride_yn,
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    t = n // K
    row = tl.load(row_ptr + n).to(tl.int64)  # -1: unused slot, nothing is loaded or stored
    weight = tl.load(weight_ptr + n)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        used_d = (offs_d < D) & (row >= 0)
        grad = tl.load(grad_ptr + t * stride_gt + offs_d, mask=used_d, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * stride_yn + offs_d, mask=used_d, other=0.0).to(tl.float32)
        acc += grad * y
        grad_y = (weight * grad).to(grad_y_ptr.dtype.element_ty)
        tl.store(grad_y_ptr + row * D + offs_d, grad_y, mask=used_d)
    tl.store(grad_weight_ptr + n, tl.sum(acc, axis=0))


def _block(D: int, item_bytes: int, threads_per_warp: int = _THREADS_PER_WARP) -> tuple[int, int]:
    """Columns of one program and its warps: one widest load a thread, never wider than D needs."""
    block_d = min(triton.next_power_of_2(D), _MAX_THREADS * _BYTES_PER_LOAD // item_bytes)
    return block_d, max(1, block_d * item_bytes // (_BYTES_PER_LOAD * threads_per_warp))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def combine(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """out_TD, dtype of y; rows are trusted."""
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(T, D)
    if T == 0 or D == 0:
        return out_TD
    y_ND, weight_TK, row_TK = _unit_columns(y_ND), weight_TK.contiguous(), row_TK.contiguous()
    block_d, num_warps = _block(D, y_ND.element_size())
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
    block_d, num_warps = _block(max(D, 1), y_ND.element_size())
    with torch.cuda.device_of(y_ND):
        _combine_backward_kernel[(T * K,)](
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
            block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return grad_y_ND, grad_weight_TK
