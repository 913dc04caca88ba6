"""entropy and its backward on a GPU: one program per block of rows.

Letters: C classes. The contract is in ops/entropy.py; leading dimensions are rows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import BYTES_PER_LOAD, declares, size_of, threads_per_warp
from gose_kernels.triton.floats import log1p

_MAX_COLUMNS = 1024  # of a tile: longer rows are walked
_MAX_WARPS = 4


def _entropy_work(args: Mapping[str, Any]) -> tuple[int, int]:
    """Exponentials and what rescales sums come on top."""
    logits = args["logits_ptr"]
    return size_of(logits, args["out_ptr"]), 2 * logits.numel()


def _entropy_backward_work(args: Mapping[str, Any]) -> tuple[int, int]:
    logits = args["logits_ptr"]
    return size_of(logits, args["grad_ptr"], args["grad_logits_ptr"]), 4 * logits.numel()


@triton.jit
def _moments(logits_ptr, row_R, valid_R, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """top, rest, sum_z, n of every row, with z = x - top: rest = sum of exp(z) over all elements
    but one maximum, sum_z = sum of exp(z) * z. Nothing offered: top = 0, rest = 0."""
    top_R = tl.full([ROWS], float("-inf"), tl.float32)
    rest_R = tl.zeros([ROWS], tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    n_R = tl.zeros([ROWS], tl.int32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = valid_R[:, None] & (offs_c < C)[None, :]
        x = tl.load(
            logits_ptr + row_R[:, None] * C + offs_c[None, :], mask=inside, other=float("-inf")
        )
        x = x.to(tl.float32)
        offered = x != float("-inf")
        highest_R = tl.max(x, axis=1)  # leaves NaN aside, which then shows in the sums
        shift_R = tl.where(highest_R == float("-inf"), 0.0, highest_R)
        z = x - shift_R[:, None]
        power = tl.exp(z)
        is_top = z == 0.0
        found_R = tl.sum(offered.to(tl.int32), axis=1)
        tops_R = tl.sum((offered & is_top).to(tl.int32), axis=1)
        some_R = tl.sum(tl.where(is_top, 0.0, power), axis=1)
        some_R += tl.where(highest_R == float("-inf"), 0, tops_R - 1).to(tl.float32)
        some_z_R = tl.sum(tl.where(offered, power * z, 0.0), axis=1)
        # The larger maximum of what was summed before and of this block rescales the other part.
        before_R = (n_R == 0) | (highest_R > top_R)
        apart_R = tl.where(before_R, top_R - shift_R, shift_R - top_R)
        low_R = tl.where(before_R, rest_R, some_R) + 1.0
        low_z_R = tl.where(before_R, sum_R, some_z_R)
        both_R = (n_R > 0) & (found_R > 0)
        scale_R = tl.exp(apart_R)
        more_R = tl.where(both_R, scale_R * low_R, 0.0)
        more_z_R = tl.where(both_R, scale_R * (low_z_R + apart_R * low_R), 0.0)
        fresh_R = before_R & (found_R > 0)
        rest_R = tl.where(fresh_R, some_R, rest_R) + more_R
        sum_R = tl.where(fresh_R, some_z_R, sum_R) + more_z_R
        top_R = tl.where(fresh_R, shift_R, top_R)
        n_R += found_R
    return tl.where(n_R == 0, 0.0, top_R), rest_R, sum_R, n_R


@triton.jit(launch_metadata=declares(_entropy_work))
def _entropy_kernel(
    logits_ptr,  # [rows, C]
    out_ptr,  # [rows] float32
    num_rows,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid_R = row_R < num_rows
    _, rest_R, sum_R, n_R = _moments(logits_ptr, row_R, valid_R, C, ROWS, BLOCK_C)
    nats_R = log1p(rest_R) - sum_R / (1.0 + rest_R)
    log_n_R = tl.log(tl.maximum(n_R, 2).to(tl.float32))
    share_R = tl.where(n_R > 1, nats_R / log_n_R, 0.0 * nats_R)
    share_R = tl.where(share_R < 0.0, 0.0, tl.where(share_R > 1.0, 1.0, share_R))  # NaN stays
    tl.store(out_ptr + row_R, share_R, mask=valid_R)


@triton.jit(launch_metadata=declares(_entropy_backward_work))
def _entropy_backward_kernel(
    grad_ptr,  # [rows] float32
    logits_ptr,  # [rows, C], read twice: the second time from the cache
    grad_logits_ptr,  # [rows, C]
    num_rows,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid_R = row_R < num_rows
    top_R, rest_R, sum_R, n_R = _moments(logits_ptr, row_R, valid_R, C, ROWS, BLOCK_C)
    grad_R = tl.load(grad_ptr + row_R, mask=valid_R, other=0.0)
    total_R = 1.0 + rest_R
    mean_z_R = sum_R / total_R
    log_n_R = tl.log(tl.maximum(n_R, 2).to(tl.float32))
    # n <= 1: no slope, but NaN stays NaN.
    scale_R = tl.where(n_R > 1, -grad_R / (total_R * log_n_R), 0.0 * rest_R)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = valid_R[:, None] & (offs_c < C)[None, :]
        at = row_R[:, None] * C + offs_c[None, :]
        x = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        z = x - top_R[:, None]
        slope = tl.exp(z) * (z - mean_z_R[:, None]) * scale_R[:, None]
        slope = tl.where(x == float("-inf"), 0.0 * rest_R[:, None], slope)
        tl.store(grad_logits_ptr + at, slope.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _tile(C: int, item_bytes: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: 16 bytes a thread, but no more than one row: what is
    summed over several at once spills."""
    columns = min(triton.next_power_of_2(C), _MAX_COLUMNS)
    lanes = threads_per_warp()
    threads = _MAX_WARPS * lanes
    rows = max(1, min(threads, threads * BYTES_PER_LOAD // (item_bytes * columns)))
    warps = max(rows // lanes, rows * columns * item_bytes // (BYTES_PER_LOAD * lanes))
    return rows, columns, max(1, min(_MAX_WARPS, warps))


def entropy(logits_BMC: Tensor) -> Tensor:
    """entropy_BM float32."""
    out_BM = logits_BMC.new_empty(logits_BMC.shape[:-1], dtype=torch.float32)
    C, num_rows = logits_BMC.shape[-1], out_BM.numel()
    if num_rows == 0:
        return out_BM
    logits_BMC = logits_BMC.contiguous()
    rows, columns, num_warps = _tile(C, logits_BMC.element_size())
    with torch.cuda.device_of(logits_BMC):
        _entropy_kernel[(triton.cdiv(num_rows, rows),)](
            logits_BMC,
            out_BM,
            num_rows,
            C,
            rows,
            columns,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return out_BM


def entropy_backward(grad_BM: Tensor, logits_BMC: Tensor) -> Tensor:
    """The gradient of logits, in their dtype."""
    logits_BMC, grad_BM = logits_BMC.contiguous(), grad_BM.contiguous()
    grad_logits_BMC = torch.empty_like(logits_BMC)
    C, num_rows = logits_BMC.shape[-1], grad_BM.numel()
    if num_rows == 0:
        return grad_logits_BMC
    rows, columns, num_warps = _tile(C, logits_BMC.element_size())
    with torch.cuda.device_of(logits_BMC):
        _entropy_backward_kernel[(triton.cdiv(num_rows, rows),)](
            grad_BM,
            logits_BMC,
            grad_logits_BMC,
            num_rows,
            C,
            rows,
            columns,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return grad_logits_BMC
