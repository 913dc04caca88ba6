"""route on a GPU: one pass over the tokens, for a capacity one over the experts, then the totals.

Letters: T tokens, E experts, K experts per token, P programs. Tiles are [R, E] or [R, K] of R
tokens, padded to powers of two. The contract is in ops/route.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import moves
from gose_kernels.triton.floats import log1p
from gose_kernels.triton.route_token import (
    DEFAULTS,
    FINISH_TILE,
    INFINITY,
    MAX_WARPS,
    WARPS,
    Inputs,
    best,
    entropy_of,
    inputs_of,
    margin,
    moments,
    normal_below,
    programs_of,
    slot_weights,
    widen,
)

_KEEP_BLOCK = 1024  # tokens that an expert looks at together
_ALIGNED = 16  # what divides a stride that Triton loads wide
_MAX_WARPS_UNALIGNED = 8  # else a thread has numbers of many rows: registers for twice as many


_PARTS = ("importance_ptr", "win_ptr", "count_ptr", "sums_ptr")
_MOVED = (
    *("score_ptr", "entropy_ptr", "bias_ptr", "noise_ptr", "weight_ptr", "expert_ptr"),
    *("out_entropy_ptr", "log_p_ptr", "level_ptr", "first_ptr", *_PARTS),
)


@triton.jit(launch_metadata=moves(*_MOVED, once="score_ptr", operations=2))
def _route_kernel(
    score_ptr,  # [T, E]
    entropy_ptr,  # [T or 1, E], egs only
    bias_ptr,  # [E] or None
    noise_ptr,  # [T, E] or None
    weight_ptr,  # [T, K] float32
    expert_ptr,  # [T, K] int32, E = unused
    out_entropy_ptr,  # [T] float32
    log_p_ptr,  # [E, T]: expert_choice; -inf where the expert may not, then did not take the token
    level_ptr,  # [E, T] int16: 1 + the slot that the token gives to the expert, or 0; capacity
    first_ptr,  # [T] log p of the first slot, or None; capacity by priority
    importance_ptr,  # [P, E] float32, and all others of P: sums over the program's tokens
    win_ptr,  # [P, E] float32, or None
    count_ptr,  # [P, E] int16: twice the slots, plus 1 if some token may have the expert
    sums_ptr,  # [P, 3] float32: tokens, z, entropy
    T,
    E,
    K,
    stride_st,
    stride_et,
    stride_nt,
    tokens,  # of a program, a multiple of R
    num_groups,
    top_groups,
    floor,
    tau,
    mass,
    noise_std,
    BANDS: tl.constexpr,  # ascending numbers; adaptive "bands"
    SUM: tl.constexpr,  # what weights are normalized over: "nothing", "experts" or "chosen"
    SIGMOID: tl.constexpr,
    TEMPERED: tl.constexpr,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,  # entropy and sums are wanted
    CHOOSE: tl.constexpr,  # slots are wanted
    GROUPS: tl.constexpr,  # groups padded, 0 without
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    importance = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    win = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    # Twice the slots, plus 1 if available; above 16 bits the slot of this pass.
    count = tl.zeros([BLOCK_R, BLOCK_E], tl.int32)
    tokens_R = tl.zeros([BLOCK_R], tl.float32)
    z_R = tl.zeros([BLOCK_R], tl.float32)
    entropy_R = tl.zeros([BLOCK_R], tl.float32)
    for start in range(p * tokens, tl.minimum(T, (p + 1) * tokens), BLOCK_R):
        t_R = start + tl.arange(0, BLOCK_R)
        valid_R = t_R < T
        x, a, noisy, key = widen(
            score_ptr,
            entropy_ptr,
            bias_ptr,
            noise_ptr,
            t_R,
            valid_R,
            offs_e,
            stride_st,
            stride_et,
            stride_nt,
            E,
            num_groups,
            top_groups,
            floor,
            tau,
            SIGMOID,
            GROUPS,
            TEMPERED,
        )
        count = (count & 0xFFFF) | (x != -INFINITY).to(tl.int32)
        shift_R, rest_R, sum_R, n_R, power = moments(a)
        noisy_shift_R, noisy_rest_R = shift_R, rest_R
        if noise_ptr is not None:
            noisy_shift_R, noisy_rest_R, _, _, _ = moments(noisy)
        sure_R = entropy_of(rest_R, sum_R, n_R)
        if COUNT:
            tl.store(out_entropy_ptr + t_R, sure_R, mask=valid_R)
            entropy_R += tl.where(n_R > 0, sure_R, 0.0)
        inside = valid_R[:, None] & (offs_e < E)[None, :]
        if log_p_ptr is not None:
            at_et = offs_e.to(tl.int64)[None, :] * T + t_R[:, None]
            if CHOOSE:
                taken = tl.load(log_p_ptr + at_et, mask=inside, other=-INFINITY) != -INFINITY
                key = tl.where(taken, key, -INFINITY)
            else:
                log_p = a - (shift_R + log1p(rest_R))[:, None]
                log_p = tl.where((a == -INFINITY) | (log_p != log_p), -INFINITY, log_p)
                tl.store(log_p_ptr + at_et, log_p, mask=inside)
        if CHOOSE:
            slot = tl.full([BLOCK_R, BLOCK_K], -INFINITY, tl.float32)
            expert = tl.full([BLOCK_R, BLOCK_K], 0, tl.int32) + E
            before_R = tl.zeros([BLOCK_R], tl.float32)
            keep_R = tl.full([BLOCK_R], 1, tl.int32)
            for i in tl.static_range(len(BANDS)):
                keep_R += (sure_R > BANDS[i]).to(tl.int32)
            threshold_R = tl.zeros([BLOCK_R], tl.float32)
            for k in range(K):
                threshold_R, id_R = best(key, offs_e, E)
                hit = offs_e[None, :] == id_R[:, None]
                key = tl.where(hit, -INFINITY, key)
                if MASS:
                    here_R = tl.sum(tl.where(hit, power, 0.0), axis=1) / (1.0 + rest_R)
                    id_R = tl.where(before_R >= mass, E, id_R)
                    before_R += here_R
                if len(BANDS) > 0:
                    id_R = tl.where(k < keep_R, id_R, E)
                hit &= (id_R < E)[:, None]
                count += hit.to(tl.int32) * (((k + 1) << 16) + 2)
                slot_R = threshold_R
                if SIGMOID or entropy_ptr is not None:  # whose keys are not a
                    slot_R = tl.sum(tl.where(hit, noisy, 0.0), axis=1)
                slot_R = tl.where(id_R < E, slot_R, -INFINITY)
                slot = tl.where((offs_k == k)[None, :], slot_R[:, None], slot)
                expert = tl.where((offs_k == k)[None, :], id_R[:, None], expert)
            weight = slot_weights(slot, noisy_shift_R, noisy_rest_R, SUM)
            weight = tl.where(expert < E, weight, 0.0)
            at_tk = t_R.to(tl.int64)[:, None] * K + offs_k[None, :]
            used = valid_R[:, None] & (offs_k < K)[None, :]
            tl.store(weight_ptr + at_tk, weight, mask=used)
            tl.store(expert_ptr + at_tk, expert, mask=used)
            if level_ptr is not None:
                at_et = offs_e.to(tl.int64)[None, :] * T + t_R[:, None]
                tl.store(level_ptr + at_et, (count >> 16).to(tl.int16), mask=inside)
            if first_ptr is not None:
                first_R = tl.sum(tl.where((offs_k == 0)[None, :], slot, 0.0), axis=1)
                log_first_R = first_R - (noisy_shift_R + log1p(noisy_rest_R))
                tl.store(first_ptr + t_R, log_first_R, mask=valid_R)
            if win_ptr is not None:
                win += normal_below(margin(a, threshold_R, noise_std))
        if COUNT:
            some_R = n_R > 0
            importance += tl.where(some_R[:, None], power / (1.0 + rest_R)[:, None], 0.0)
            tokens_R += some_R.to(tl.float32)
            if entropy_ptr is None:
                total_R = shift_R + log1p(rest_R)
                if SIGMOID:
                    x_shift_R, x_rest_R, _, _, _ = moments(x)
                    total_R = x_shift_R + log1p(x_rest_R)
                z_R += tl.where(some_R, total_R * total_R, 0.0)
    if COUNT:
        at = p * E + offs_e
        is_e = offs_e < E
        tl.store(importance_ptr + at, tl.sum(importance, axis=0), mask=is_e)
        count &= 0xFFFF
        slots = tl.sum(count >> 1, axis=0)
        tl.store(count_ptr + at, (2 * slots + tl.max(count & 1, axis=0)).to(tl.int16), mask=is_e)
        if win_ptr is not None:
            tl.store(win_ptr + at, tl.sum(win, axis=0), mask=is_e)
        tl.store(sums_ptr + p * 3, tl.sum(tokens_R, axis=0))
        tl.store(sums_ptr + p * 3 + 1, tl.sum(z_R, axis=0))
        tl.store(sums_ptr + p * 3 + 2, tl.sum(entropy_R, axis=0))


@triton.jit
def _ranks(log_p_ptr, level_ptr, first_ptr, t, e, T, K):
    """int64 numbers that order the tokens of an expert, the best largest; 0: no token of it."""
    if level_ptr is not None:
        level = tl.load(level_ptr + e * T + t, mask=t < T, other=0).to(tl.int64)
        rank = K + 1 - level
        if first_ptr is not None:
            log_first = tl.load(first_ptr + t, mask=t < T, other=0.0)
            rank = rank * (1 << 32) + _ordered(log_first)
        rank = tl.where(level > 0, rank, 0)
    else:
        log_p = tl.load(log_p_ptr + e * T + t, mask=t < T, other=-INFINITY)
        rank = tl.where(log_p == -INFINITY, 0, _ordered(log_p))
    return rank


@triton.jit
def _ordered(x):
    """int64 below 2**32 in the order of the floats, equal for equal ones, NaN largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)  # -0 becomes 0
    order = tl.where(bits < 0, -1 - bits, bits + (1 << 31))
    return tl.where(x != x, 0xFFFFFFFF, order)


@triton.jit(launch_metadata=moves("log_p_ptr", "level_ptr", "first_ptr", "load_ptr"))
def _route_keep_kernel(
    log_p_ptr,  # [E, T]; -inf is written where the expert does not take the token
    level_ptr,  # [E, T] int16 or None: then experts choose by log_p
    first_ptr,  # [T] or None: then tokens come in their order
    weight_ptr,  # [T, K], zeroed in dropped slots
    expert_ptr,  # [T, K], E in dropped slots
    load_ptr,  # [E] int32: tokens taken; written where experts choose
    T,
    E,
    K,
    capacity,
    bits,  # of the largest rank
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    nth = tl.zeros([], tl.int64)  # the capacity-th largest rank, 0 if there are fewer
    for i in range(bits):
        higher = nth | (tl.full([], 1, tl.int64) << (bits - 1 - i))
        count = tl.zeros([], tl.int32)
        for start in range(0, T, BLOCK):
            rank = _ranks(log_p_ptr, level_ptr, first_ptr, start + tl.arange(0, BLOCK), e, T, K)
            count += tl.sum((rank >= higher).to(tl.int32), axis=0)
        nth = tl.where(count >= capacity, higher, nth)
    above = tl.zeros([], tl.int32)
    for start in range(0, T, BLOCK):
        rank = _ranks(log_p_ptr, level_ptr, first_ptr, start + tl.arange(0, BLOCK), e, T, K)
        above += tl.sum((rank > nth).to(tl.int32), axis=0)
    equal = tl.zeros([], tl.int32)  # tokens of rank nth so far: the smaller ids are kept
    kept_tokens = tl.zeros([], tl.int32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        rank = _ranks(log_p_ptr, level_ptr, first_ptr, t, e, T, K)
        ties = (rank == nth).to(tl.int32)
        place = above + equal + tl.cumsum(ties, axis=0)
        equal += tl.sum(ties, axis=0)
        kept = (rank > nth) | ((rank == nth) & (place <= capacity))
        kept_tokens += tl.sum((kept & (rank > 0)).to(tl.int32), axis=0)
        dropped = (rank > 0) & (kept == 0)
        if level_ptr is not None:
            level = tl.load(level_ptr + e * T + t, mask=dropped, other=1).to(tl.int64)
            at = t.to(tl.int64) * K + level - 1
            tl.store(expert_ptr + at, tl.zeros([BLOCK], tl.int32) + E, mask=dropped)
            tl.store(weight_ptr + at, tl.zeros([BLOCK], tl.float32), mask=dropped)
        else:
            tl.store(log_p_ptr + e * T + t, tl.full([BLOCK], -INFINITY, tl.float32), mask=dropped)
    if level_ptr is None:
        tl.store(load_ptr + e, kept_tokens)


@triton.jit
def _variation(x, live, num_live):
    """Squared coefficient of variation of the live experts' numbers."""
    mean = tl.sum(x, axis=0) / num_live
    apart = tl.where(live, x - mean, 0.0)
    square = tl.sum(apart * apart, axis=0) / num_live
    return tl.where(mean == 0.0, 0.0, square / tl.where(mean == 0.0, 1.0, mean * mean))


_SUMMED = tuple(f"part_{name}" for name in _PARTS)


@triton.jit(launch_metadata=moves(*_SUMMED, "load_ptr", "importance_ptr", "loss_ptr"))
def _route_finish_kernel(
    part_importance_ptr,  # [P, E], and all others of P: see _route_kernel
    part_win_ptr,
    part_count_ptr,
    part_sums_ptr,
    load_ptr,  # [E] int32, written; with TAKEN it is read
    importance_ptr,  # [E] float32, written once
    loss_ptr,  # [5] float32, written once
    P,
    E,
    TAKEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    is_e = offs_e < E
    importance = tl.zeros([BLOCK_E], tl.float64)
    win = tl.zeros([BLOCK_E], tl.float64)
    load = tl.zeros([BLOCK_E], tl.int32)
    live = tl.zeros([BLOCK_E], tl.int32)
    tokens = tl.zeros([], tl.float64)
    z = tl.zeros([], tl.float64)
    entropy = tl.zeros([], tl.float64)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p[:, None] * E + offs_e[None, :]
        inside = (p < P)[:, None] & is_e[None, :]
        part = tl.load(part_importance_ptr + at, mask=inside, other=0.0)
        importance += tl.sum(part.to(tl.float64), axis=0)
        count = tl.load(part_count_ptr + at, mask=inside, other=0).to(tl.int32)
        load += tl.sum(count >> 1, axis=0)
        live = tl.maximum(live, tl.max(count & 1, axis=0))
        if part_win_ptr is not None:
            part = tl.load(part_win_ptr + at, mask=inside, other=0.0)
            win += tl.sum(part.to(tl.float64), axis=0)
        sums_ptr = part_sums_ptr + p * 3
        tokens += tl.sum(tl.load(sums_ptr, mask=p < P, other=0.0).to(tl.float64), axis=0)
        z += tl.sum(tl.load(sums_ptr + 1, mask=p < P, other=0.0).to(tl.float64), axis=0)
        entropy += tl.sum(tl.load(sums_ptr + 2, mask=p < P, other=0.0).to(tl.float64), axis=0)
    if TAKEN:
        load = tl.load(load_ptr + offs_e, mask=is_e, other=0)
    else:
        tl.store(load_ptr + offs_e, load, mask=is_e)
    tl.store(importance_ptr + offs_e, importance.to(tl.float32), mask=is_e)
    is_live = live > 0
    tokens = tl.maximum(tokens, 1.0)
    num_live = tl.maximum(tl.sum(live, axis=0), 1).to(tl.float64)
    assigned = tl.maximum(tl.sum(load, axis=0), 1).to(tl.float64)
    shared = tl.sum(load.to(tl.float64) * importance, axis=0)
    tl.store(loss_ptr, (num_live * (shared / assigned) / tokens).to(tl.float32))
    tl.store(loss_ptr + 1, _variation(importance, is_live, num_live).to(tl.float32))
    tl.store(loss_ptr + 2, _variation(win / tokens, is_live, num_live).to(tl.float32))
    tl.store(loss_ptr + 3, (z / tokens).to(tl.float32))
    tl.store(loss_ptr + 4, (entropy / tokens).to(tl.float32))


def _wide_tile(T: int, given: Inputs) -> tuple[int, dict[str, int]]:
    """How many times more tokens a program sums than it must, and a tile with as many times more
    warps. The fewer programs, the fewer sums to write and read again; 64 programs stay."""
    rows, warps = given.constants["BLOCK_R"], given.constants["num_warps"]
    tokens = 64 if T >= 4096 else 32 if T >= 2048 else given.group
    times = max(1, min(tokens // given.group, MAX_WARPS // warps))
    aligned = not any(stride % _ALIGNED for stride in given.strides)
    wider = times if aligned else max(1, min(times, _MAX_WARPS_UNALIGNED // warps))
    tile = {"BLOCK_R": wider * rows, "num_warps": wider * warps}
    if torch.version.hip is None:  # unasked, ptxas spills a number where 96 registers nearly do
        tile["maxnreg"] = min(255, 2048 // tile["num_warps"])
    return times, tile


def route(
    score_TE: Tensor,
    top_k: int,
    entropy_TE: Tensor | None = None,
    entropy_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    noise_TE: Tensor | None = None,
    *,
    policy: str = "softmax",
    capacity: int | None = None,
    capacity_order: str = "token",
    adaptive: str | None = None,
    mass: float = 0.9,
    bands: Sequence[float] = (),
    noise_std: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight_TK, expert_TK, entropy_T, load_E, importance_E, loss_L; options as in ops/route.py."""
    (T, E), K, takes = score_TE.shape, top_k, policy == "expert_choice"
    given = inputs_of(
        *(score_TE, entropy_TE, entropy_E, bias_E, noise_TE),
        policy=policy,
        **{**DEFAULTS, **options},
    )
    empty, f32, i32 = score_TE.new_empty, torch.float32, torch.int32
    times, tile = _wide_tile(T, given)
    P, tokens = programs_of(T, times * given.group)
    weight_TK, expert_TK = empty(T, K, dtype=f32), empty(T, K, dtype=i32)
    entropy_T, importance_E = empty(T, dtype=f32), empty(E, dtype=f32)
    load_E, loss_L = empty(E, dtype=i32), empty(5, dtype=f32)
    drops = capacity is not None and not takes
    log_p_ET = empty(E, T, dtype=f32) if takes else None
    level_ET = empty(E, T, dtype=torch.int16) if drops else None
    first_T = empty(T, dtype=f32) if drops and capacity_order == "priority" else None
    part_importance, part_count = empty(P, E, dtype=f32), empty(P, E, dtype=torch.int16)
    part_win = empty(P, E, dtype=f32) if noise_std > 0 else None
    part_sums = empty(P, 3, dtype=f32)

    def tokens_pass(count: bool, choose: bool) -> None:
        _route_kernel[(P,)](
            *given.tensors,
            *(weight_TK, expert_TK, entropy_T, log_p_ET, level_ET, first_T),
            *(part_importance, part_win, part_count, part_sums),
            *(T, E, K, *given.strides, tokens, *given.numbers, float(mass), float(noise_std)),
            BANDS=tuple(float(b) for b in bands) if adaptive == "bands" else (),
            SUM=given.sums_over,
            MASS=adaptive == "mass",
            COUNT=count,
            CHOOSE=choose,
            BLOCK_K=triton.next_power_of_2(K),
            **{**given.constants, **tile},
        )

    def keep_pass(bits: int) -> None:
        _route_keep_kernel[(E,)](
            *(log_p_ET, level_ET, first_T, weight_TK, expert_TK, load_E),
            *(T, E, K, capacity, bits, _KEEP_BLOCK),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )

    with torch.cuda.device_of(score_TE):
        if T > 0:
            tokens_pass(count=True, choose=not takes)
            if takes:
                keep_pass(32)
                tokens_pass(count=False, choose=True)
            elif drops:
                keep_pass(K.bit_length() + (0 if first_T is None else 32))
        _route_finish_kernel[(1,)](
            *(part_importance, part_win, part_count, part_sums),
            *(load_E, importance_E, loss_L, P, E),
            TAKEN=takes and T > 0,
            BLOCK_P=max(1, FINISH_TILE // given.constants["BLOCK_E"]),
            BLOCK_E=given.constants["BLOCK_E"],
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return weight_TK, expert_TK, entropy_T, load_E, importance_E, loss_L
