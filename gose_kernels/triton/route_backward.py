"""route_backward on a GPU: what all tokens share, then one pass over them.

Letters: T tokens, E experts, K experts per token, P and W programs. Tiles are [R, E] or [R, K] of
R tokens. Closed forms, the choice held constant; the contract is in ops/route.py.

Products are summed behind a tl.where: fused into the first step of a sum over threads, they would
give its two sides different bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import moves
from gose_kernels.triton.floats import exp, log1p
from gose_kernels.triton.route_token import (
    DEFAULTS,
    FINISH_TILE,
    INFINITY,
    WARPS,
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

_LIVE_TOKENS = 64  # of a program at least that looks for tokens of an expert


@triton.jit
def _cv2_slope(x, live, num_live):
    """Derivative of the squared coefficient of variation of the live experts' numbers, by x."""
    mean = tl.sum(x, axis=0) / num_live
    safe = tl.where(mean == 0.0, 1.0, mean)
    apart = tl.where(live, x - mean, 0.0)
    cv2 = tl.sum(tl.where(live, apart * apart, 0.0), axis=0) / num_live / (safe * safe)
    slope = 2.0 * (apart / safe - cv2) / (num_live * safe)
    return tl.where(live & (mean != 0.0), slope, 0.0)


@triton.jit(launch_metadata=moves("importance_ptr"))
def _route_live_kernel(
    score_ptr,  # [T, E]
    importance_ptr,  # [E] float32, output of route
    live_ptr,  # [P, E] int8, 1 = available to some token; of experts without importance
    T,
    E,
    stride_st,
    tokens,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Importance tells that an expert is live. Without any, it may have been too unlikely for a
    float: then rows are read until one offers it."""
    p = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    unsure = tl.load(importance_ptr + offs_e, mask=offs_e < E, other=1.0) == 0.0
    live = (unsure == 0).to(tl.int32)
    start = p * tokens
    stop = tl.minimum(T, start + tokens)
    while (start < stop) & (tl.min(live, axis=0) == 0):
        t_R = start + tl.arange(0, BLOCK_R)
        x = tl.load(
            score_ptr + t_R[:, None] * stride_st + offs_e[None, :],
            mask=(t_R < stop)[:, None] & (live == 0)[None, :],
            other=-INFINITY,
        )
        live |= tl.max((x != -INFINITY).to(tl.int32), axis=0)
        start += BLOCK_R
    tl.store(live_ptr + p * E + offs_e, live.to(tl.int8), mask=unsure)


@triton.jit(launch_metadata=moves("score_ptr", "noise_ptr", "win_ptr"))
def _route_win_kernel(
    score_ptr,  # [T, E]
    noise_ptr,  # [T, E] or None
    win_ptr,  # [P, E] float32 sums of Phi(margin) over the program's tokens
    T,
    E,
    K,
    stride_st,
    stride_nt,
    tokens,
    noise_std,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    win = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(p * tokens, tl.minimum(T, (p + 1) * tokens), BLOCK_R):
        t_R = start + tl.arange(0, BLOCK_R)
        _, a, _, key = widen(
            *(score_ptr, None, None, noise_ptr, t_R, t_R < T, offs_e),
            *(stride_st, 0, stride_nt, E, 1, 1, 0.0, 0.0, False, 0, False),
        )
        threshold_R = tl.zeros([BLOCK_R], tl.float32)
        for _ in range(K):
            threshold_R, id_R = best(key, offs_e, E)
            key = tl.where(offs_e[None, :] == id_R[:, None], -INFINITY, key)
        win += normal_below(margin(a, threshold_R, noise_std))
    tl.store(win_ptr + p * E + offs_e, tl.sum(win, axis=0), mask=offs_e < E)


_SUMMED = (
    *("part_win_ptr", "load_ptr", "importance_ptr", "grad_importance_ptr"),
    *("grad_loss_ptr", "column_ptr", "win_slope_ptr", "scalar_ptr"),
)


@triton.jit(launch_metadata=moves(*_SUMMED))
def _route_shared_kernel(
    part_live_ptr,  # [P, E]: see _route_live_kernel
    part_win_ptr,  # [W, E] or None: see _route_win_kernel
    load_ptr,  # [E] int32 and importance: outputs of route
    importance_ptr,  # [E] float32
    grad_importance_ptr,  # [E] float32 or None
    grad_loss_ptr,  # [5] float32
    column_ptr,  # [E] float32, written: gradient of importance
    win_slope_ptr,  # [E] float32, written: gradient of the sum of Phi(margin) / noise_std
    scalar_ptr,  # [2] float32, written: of a token's logsumexp / itself, and of its entropy
    P,
    W,
    E,
    noise_std,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    is_e = offs_e < E
    win = tl.zeros([BLOCK_E], tl.float64)
    importance = tl.load(importance_ptr + offs_e, mask=is_e, other=0.0).to(tl.float64)
    unsure = is_e & (importance == 0.0)
    live = (is_e & (importance != 0.0)).to(tl.int32)
    for start in range(0, tl.where(tl.max(unsure.to(tl.int32), axis=0) > 0, P, 0), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p[:, None] * E + offs_e[None, :]
        part = tl.load(part_live_ptr + at, mask=(p < P)[:, None] & unsure[None, :], other=0)
        live |= tl.max(part.to(tl.int32), axis=0)
    if part_win_ptr is not None:
        for start in range(0, W, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            at = p[:, None] * E + offs_e[None, :]
            part = tl.load(part_win_ptr + at, mask=(p < W)[:, None] & is_e[None, :], other=0.0)
            win += tl.sum(part.to(tl.float64), axis=0)
    tokens = tl.maximum(tl.floor(tl.sum(importance, axis=0) + 0.5), 1.0)  # each has 1
    is_live = live > 0
    num_live = tl.maximum(tl.sum(live, axis=0), 1).to(tl.float64)
    load = tl.load(load_ptr + offs_e, mask=is_e, other=0)
    assigned = tl.maximum(tl.sum(load, axis=0), 1).to(tl.float64)
    balance = tl.load(grad_loss_ptr).to(tl.float64) * num_live / assigned / tokens
    column = balance * load.to(tl.float64)
    column += tl.load(grad_loss_ptr + 1).to(tl.float64) * _cv2_slope(importance, is_live, num_live)
    if grad_importance_ptr is not None:
        column += tl.load(grad_importance_ptr + offs_e, mask=is_e, other=0.0).to(tl.float64)
    tl.store(column_ptr + offs_e, column.to(tl.float32), mask=is_e)
    if part_win_ptr is not None:
        scale = tl.load(grad_loss_ptr + 2).to(tl.float64) / (tokens * noise_std)
        slope = scale * _cv2_slope(win / tokens, is_live, num_live)
        tl.store(win_slope_ptr + offs_e, slope.to(tl.float32), mask=is_e)
    tl.store(scalar_ptr, (2.0 * tl.load(grad_loss_ptr + 3).to(tl.float64) / tokens).to(tl.float32))
    tl.store(scalar_ptr + 1, (tl.load(grad_loss_ptr + 4).to(tl.float64) / tokens).to(tl.float32))


_MOVED = (
    *("score_ptr", "entropy_ptr", "bias_ptr", "noise_ptr", "expert_ptr", "grad_weight_ptr"),
    *("grad_entropy_ptr", "column_ptr", "win_slope_ptr", "scalar_ptr", "grad_ptr"),
)


@triton.jit(launch_metadata=moves(*_MOVED, once="score_ptr", operations=2))
def _route_backward_kernel(
    score_ptr,  # [T, E]
    entropy_ptr,  # [T or 1, E], egs only
    bias_ptr,  # [E] or None
    noise_ptr,  # [T, E] or None
    expert_ptr,  # [T, K] int32, output of route
    grad_weight_ptr,  # [T, K] float32 or None
    grad_entropy_ptr,  # [T] float32 or None
    column_ptr,  # [E] float32 or None: gradient of importance
    win_slope_ptr,  # [E] float32 or None
    scalar_ptr,  # [2] float32 or None, as column: see _route_shared_kernel
    grad_ptr,  # [T, E] of score or of entropy; [P, E] float32 sums of an entropy per module
    T,
    E,
    K,
    stride_st,
    stride_et,
    stride_nt,
    tokens,
    num_groups,
    top_groups,
    floor,
    tau,
    mass,
    noise_std,
    BANDS: tl.constexpr,
    SUM: tl.constexpr,
    SIGMOID: tl.constexpr,
    TEMPERED: tl.constexpr,
    MASS: tl.constexpr,
    AGAIN: tl.constexpr,  # drops hide a part of the choice that weights were normalized over
    PER_MODULE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    is_e = offs_e < E
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    z_slope = 0.0
    entropy_slope = 0.0
    if scalar_ptr is not None:
        z_slope = tl.load(scalar_ptr)
        entropy_slope = tl.load(scalar_ptr + 1)
    for start in range(p * tokens, tl.minimum(T, (p + 1) * tokens), BLOCK_R):
        t_R = start + tl.arange(0, BLOCK_R)
        valid_R = t_R < T
        x, a, noisy, key = widen(
            *(score_ptr, entropy_ptr, bias_ptr, noise_ptr, t_R, valid_R, offs_e),
            *(stride_st, stride_et, stride_nt, E, num_groups, top_groups, floor, tau),
            *(SIGMOID, GROUPS, TEMPERED),
        )
        inside = valid_R[:, None] & is_e[None, :]
        shift_R, rest_R, sum_R, n_R, power = moments(a)
        share = power / (1.0 + rest_R)[:, None]
        noisy_shift_R, noisy_rest_R, noisy_power = shift_R, rest_R, power
        if noise_ptr is not None:
            noisy_shift_R, noisy_rest_R, _, _, noisy_power = moments(noisy)
        log_n_R = tl.log(tl.maximum(n_R, 2).to(tl.float32))
        row_R = tl.zeros([BLOCK_R], tl.float32) + entropy_slope
        if grad_entropy_ptr is not None:
            row_R += tl.load(grad_entropy_ptr + t_R, mask=valid_R, other=0.0)
        row_R = tl.where(n_R > 1, row_R / log_n_R, 0.0)
        z = a - shift_R[:, None]
        slope = -row_R[:, None] * (z - (sum_R / (1.0 + rest_R))[:, None])
        if column_ptr is not None:
            column = tl.load(column_ptr + offs_e, mask=is_e, other=0.0)[None, :]
            dot_R = tl.sum(tl.where(a == -INFINITY, 0.0, share * column), axis=1)
            slope += column - dot_R[:, None]
        if scalar_ptr is not None and entropy_ptr is None and not SIGMOID:
            slope += (z_slope * (shift_R + log1p(rest_R)))[:, None]
        grad = tl.where(a == -INFINITY, 0.0, share * slope)

        if AGAIN or win_slope_ptr is not None:
            again = tl.full([BLOCK_R, BLOCK_K], 0, tl.int32) + E
            before_R = tl.zeros([BLOCK_R], tl.float32)
            threshold_R = tl.zeros([BLOCK_R], tl.float32)
            last_R = tl.zeros([BLOCK_R], tl.int32) + E
            keep_R = tl.full([BLOCK_R], 1, tl.int32)
            if len(BANDS) > 0:
                sure_R = entropy_of(rest_R, sum_R, n_R)
                for i in tl.static_range(len(BANDS)):
                    keep_R += (sure_R > BANDS[i]).to(tl.int32)
            for k in range(K):
                threshold_R, last_R = best(key, offs_e, E)
                hit = offs_e[None, :] == last_R[:, None]
                key = tl.where(hit, -INFINITY, key)
                id_R = last_R
                if MASS:
                    id_R = tl.where(before_R >= mass, E, id_R)
                    before_R += tl.sum(tl.where(hit, power, 0.0), axis=1) / (1.0 + rest_R)
                if len(BANDS) > 0:
                    id_R = tl.where(k < keep_R, id_R, E)
                again = tl.where((offs_k == k)[None, :], id_R[:, None], again)
            if win_slope_ptr is not None:
                apart = margin(a, threshold_R, noise_std)
                density = exp(-0.5 * apart * apart) * 0.3989422804014327
                win_slope = tl.load(win_slope_ptr + offs_e, mask=is_e, other=0.0)[None, :]
                through = tl.where((threshold_R == -INFINITY)[:, None], 0.0, win_slope * density)
                grad += through
                is_last = offs_e[None, :] == last_R[:, None]
                grad -= tl.where(is_last, tl.sum(through, axis=1)[:, None], 0.0)

        if grad_weight_ptr is not None:
            used = valid_R[:, None] & (offs_k < K)[None, :]
            at = t_R.to(tl.int64)[:, None] * K + offs_k[None, :]
            expert = tl.load(expert_ptr + at, mask=used, other=E)
            upstream = tl.load(grad_weight_ptr + at, mask=used, other=0.0)
            upstream = tl.where(expert < E, upstream, 0.0)
            choice = again if AGAIN else expert
            slot = tl.full([BLOCK_R, BLOCK_K], -INFINITY, tl.float32)
            for k in range(K):
                is_k = (offs_k == k)[None, :]
                id_R = tl.sum(tl.where(is_k, choice, 0), axis=1)
                hit = offs_e[None, :] == id_R[:, None]
                slot_R = tl.sum(tl.where(hit & inside, noisy, 0.0), axis=1)
                slot_R = tl.where(id_R < E, slot_R, -INFINITY)
                slot = tl.where(is_k, slot_R[:, None], slot)
            weight = slot_weights(slot, noisy_shift_R, noisy_rest_R, SUM)
            weight = tl.where(choice < E, weight, 0.0)
            slots_R = tl.sum(tl.where(choice < E, upstream * weight, 0.0), axis=1)
            back = weight * upstream
            if SUM == "chosen":
                back -= weight * slots_R[:, None]
            for k in range(K):
                is_k = (offs_k == k)[None, :]
                id_R = tl.sum(tl.where(is_k, choice, 0), axis=1)
                back_R = tl.sum(tl.where(is_k, back, 0.0), axis=1)
                grad += tl.where(offs_e[None, :] == id_R[:, None], back_R[:, None], 0.0)
            if SUM == "experts":
                grad -= noisy_power * (slots_R / (1.0 + noisy_rest_R))[:, None]

        if entropy_ptr is not None:
            at = t_R[:, None] * stride_et + offs_e[None, :]
            given = tl.load(entropy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad *= -1.0 / tau if TEMPERED else -1.0 / (tl.where(given < 0.0, 0.0, given) + floor)
            grad = tl.where(given < 0.0, 0.0, grad)
        elif SIGMOID:
            tail = exp(-tl.abs(x))
            grad *= tl.where(x < 0.0, 1.0, tail) / (1.0 + tail)  # sigmoid(-x)
            if scalar_ptr is not None:
                x_shift_R, x_rest_R, _, _, x_power = moments(x)
                factor_R = z_slope * (x_shift_R + log1p(x_rest_R)) / (1.0 + x_rest_R)
                grad += x_power * factor_R[:, None]
        if PER_MODULE:
            total += tl.where(inside, grad, 0.0)
        else:
            at = t_R.to(tl.int64)[:, None] * E + offs_e[None, :]
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    if PER_MODULE:
        tl.store(grad_ptr + p * E + offs_e, tl.sum(total, axis=0), mask=is_e)


@triton.jit(launch_metadata=moves("part_ptr", "out_ptr"))
def _route_total_kernel(
    part_ptr,  # [P, E] float32
    out_ptr,  # [E]
    P,
    E,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float64)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p[:, None] * E + offs_e[None, :]
        part = tl.load(part_ptr + at, mask=(p < P)[:, None] & (offs_e < E)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    tl.store(out_ptr + offs_e, total.to(out_ptr.dtype.element_ty), mask=offs_e < E)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def route_backward(
    score_TE: Tensor,
    top_k: int,
    entropy_TE: Tensor | None,
    entropy_E: Tensor | None,
    bias_E: Tensor | None,
    noise_TE: Tensor | None,
    expert_TK: Tensor,
    load_E: Tensor,
    importance_E: Tensor,
    grad_weight_TK: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_importance_E: Tensor | None,
    grad_loss_L: Tensor | None,
    *,
    policy: str = "softmax",
    capacity: int | None = None,
    adaptive: str | None = None,
    mass: float = 0.9,
    bands: tuple[float, ...] = (),
    noise_std: float = 0.0,
    **options: Any,
) -> Tensor:
    """Gradient of what ranks the experts: entropy_TE, entropy_E or score_TE. Its dtype."""
    given = inputs_of(
        *(score_TE, entropy_TE, entropy_E, bias_E, noise_TE),
        policy=policy,
        **{**DEFAULTS, **options},
    )
    (T, E), K, f32 = score_TE.shape, top_k, torch.float32
    ranked = next(x for x in (entropy_TE, entropy_E, score_TE) if x is not None)
    grad = torch.empty_like(ranked, memory_format=torch.contiguous_format)
    P, tokens = programs_of(T, given.group)
    per_module = entropy_E is not None
    part = score_TE.new_empty(P, E, dtype=f32) if per_module else grad
    block_e = given.constants["BLOCK_E"]
    wide = {
        "BLOCK_P": max(1, FINISH_TILE // block_e),
        "BLOCK_E": block_e,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    names = ("BLOCK_R", "BLOCK_E", "num_warps", "enable_fp_fusion")
    tile = {name: given.constants[name] for name in names}
    column, win_slope, scalar = _dense(grad_importance_E), None, None
    with torch.cuda.device_of(score_TE):
        if grad_loss_L is not None and T > 0:
            live_tokens = _LIVE_TOKENS * triton.cdiv(tokens, _LIVE_TOKENS)
            L = triton.cdiv(T, live_tokens)
            part_live, part_win = score_TE.new_empty(L, E, dtype=torch.int8), None
            importance = _dense(importance_E)
            _route_live_kernel[(L,)](
                *(given.tensors[0], importance, part_live, T, E, given.strides[0], live_tokens),
                **tile,
            )
            if noise_std > 0:
                part_win, win_slope = (
                    score_TE.new_empty(P, E, dtype=f32),
                    score_TE.new_empty(E, dtype=f32),
                )
                _route_win_kernel[(P,)](
                    *(given.tensors[0], given.tensors[3], part_win, T, E, K),
                    *(given.strides[0], given.strides[2], tokens, float(noise_std)),
                    **tile,
                )
            column, scalar = score_TE.new_empty(E, dtype=f32), score_TE.new_empty(2, dtype=f32)
            _route_shared_kernel[(1,)](
                *(part_live, part_win, _dense(load_E), importance),
                *(_dense(grad_importance_E), _dense(grad_loss_L), column, win_slope, scalar),
                *(L, P, E, float(noise_std)),
                **wide,
            )
        if T > 0:
            _route_backward_kernel[(P,)](
                *(*given.tensors, _dense(expert_TK), _dense(grad_weight_TK)),
                _dense(grad_entropy_T),
                *(column, win_slope, scalar, part),
                *(T, E, K, *given.strides, tokens, *given.numbers, float(mass), float(noise_std)),
                BANDS=tuple(float(b) for b in bands) if adaptive == "bands" else (),
                SUM=given.sums_over,
                MASS=adaptive == "mass",
                AGAIN=(
                    grad_weight_TK is not None
                    and capacity is not None
                    and policy != "expert_choice"
                    and given.sums_over == "chosen"
                ),
                PER_MODULE=per_module,
                BLOCK_K=triton.next_power_of_2(K),
                **given.constants,
            )
        if per_module:
            _route_total_kernel[(1,)](part, grad, P, E, **wide)
    return grad
