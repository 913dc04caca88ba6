"""dispatch on a GPU in three launches: counts of every chunk of slots, one scan, placement.

Letters: N = T*K slots, E experts, E1 = E+1. The contract is in ops/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import declares, size_of, warps_of

_CHUNK = 256  # slots of a program
_EXPERTS = 32  # columns of a tile of comparisons


def _count_work(args: Mapping[str, Any]) -> tuple[int, int]:
    return size_of(args["expert_ptr"], args["count_ptr"]), 0


def _scan_work(args: Mapping[str, Any]) -> tuple[int, int]:
    return 2 * size_of(args["count_ptr"]) + size_of(args["offset_ptr"]), 0


def _place_work(args: Mapping[str, Any]) -> tuple[int, int]:
    names = ("expert_ptr", "count_ptr", "offset_ptr", "row_ptr", "token_ptr")
    return size_of(*(args[name] for name in names)), 0


@triton.jit(launch_metadata=declares(_count_work))
def _dispatch_count_kernel(
    expert_ptr,  # [N] int32 or int64, E = unused
    count_ptr,  # [chunks, E] int32, written once
    N,
    E,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + n, mask=n < N, other=E).to(tl.int32)
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        is_e = (expert[:, None] == e[None, :]).to(tl.int32)
        tl.store(count_ptr + chunk * E + e, tl.sum(is_e, axis=0), mask=e < E)


@triton.jit(launch_metadata=declares(_scan_work))
def _dispatch_scan_kernel(
    count_ptr,  # [chunks, E] int32; becomes the slots of the expert before the chunk
    offset_ptr,  # [E1] int32, written once
    chunks,
    E,
    EXPERTS: tl.constexpr,
):
    carry = 0
    tl.store(offset_ptr, carry)
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        before = tl.zeros([EXPERTS], tl.int32)
        at = count_ptr + e
        for _ in range(chunks):
            count = tl.load(at, mask=e < E, other=0)
            tl.store(at, before, mask=e < E)
            before += count
            at += E
        tl.store(offset_ptr + 1 + e, carry + tl.cumsum(before, axis=0), mask=e < E)
        carry += tl.sum(before, axis=0)


@triton.jit(launch_metadata=declares(_place_work))
def _dispatch_place_kernel(
    expert_ptr,  # [N]
    count_ptr,  # [chunks, E]
    offset_ptr,  # [E1]
    row_ptr,  # [N] int32, written once, -1 = unused
    token_ptr,  # [N] int32, written once, -1 from offset[E] on
    N,
    E,
    K,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + n, mask=n < N, other=E).to(tl.int32)
    row = tl.zeros([CHUNK], tl.int32)
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        is_e = (expert[:, None] == e[None, :]).to(tl.int32)
        first = tl.load(count_ptr + chunk * E + e, mask=e < E, other=0)
        first += tl.load(offset_ptr + e, mask=e < E, other=0)
        row += tl.sum(is_e * (first[None, :] + tl.cumsum(is_e, axis=0) - 1), axis=1)
    used = (n < N) & (expert < E)
    tl.store(row_ptr + n, tl.where(used, row, -1), mask=n < N)
    tl.store(token_ptr + row, (n // K).to(tl.int32), mask=used)
    tl.store(token_ptr + n, -1, mask=(n < N) & (n >= tl.load(offset_ptr + E)))


def dispatch(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_TK, token_N, offset_E1; expert ids are trusted."""
    T, K = expert_TK.shape
    expert_TK = expert_TK.contiguous()
    empty, num_slots = expert_TK.new_empty, T * K
    row_TK, token_N = empty(T, K, dtype=torch.int32), empty(num_slots, dtype=torch.int32)
    offset_E1 = empty(num_experts + 1, dtype=torch.int32)
    chunks = triton.cdiv(num_slots, _CHUNK)
    count = empty(chunks, num_experts, dtype=torch.int32)
    tile = {"EXPERTS": _EXPERTS, "num_warps": warps_of("dispatch"), "enable_fp_fusion": True}
    with torch.cuda.device_of(expert_TK):
        if chunks:
            _dispatch_count_kernel[(chunks,)](
                expert_TK, count, num_slots, num_experts, CHUNK=_CHUNK, **tile
            )
        _dispatch_scan_kernel[(1,)](
            count,
            offset_E1,
            chunks,
            num_experts,
            _EXPERTS,
            num_warps=1,
            enable_fp_fusion=True,
        )
        if chunks:
            _dispatch_place_kernel[(chunks,)](
                expert_TK,
                count,
                offset_E1,
                row_TK,
                token_N,
                num_slots,
                num_experts,
                K,
                CHUNK=_CHUNK,
                **tile,
            )
    return row_TK, token_N, offset_E1
