"""What route and its backward share on a GPU: tiles of tokens, and the arguments of a call.

Letters: T tokens, E experts, K experts per token, P programs. Tiles are [R, E] or [R, K] of R
tokens, padded to powers of two. The contract is in ops/route.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton.floats import exp, log1p

WARPS, MAX_WARPS = 4, 16
_TILE = 1024  # elements: 8 a thread
_TOKENS = 16  # of a program at least
_PROGRAMS = 512  # at most, while a count of slots fits in 16 bits; each sums its own tokens
_MOST_TOKENS = 8192  # twice as many fit
FINISH_TILE = 2048
INFINITY = tl.constexpr(float("inf"))
DEFAULTS: dict[str, Any] = {
    "softmax_before": True,
    "renormalize": False,
    "gate": "softmax",
    "num_groups": 1,
    "top_groups": 1,
    "entropy_floor": 0.05,
    "tau": None,
}


@triton.jit
def moments(x):
    """shift, rest, sum_z, n, power of rows as in triton/entropy.py; power = exp(x - shift)."""
    offered = x != -INFINITY
    top_R = tl.max(x, axis=1)  # leaves NaN aside, which then shows in the sums
    n_R = tl.sum(offered.to(tl.int32), axis=1)
    shift_R = tl.where(top_R == -INFINITY, 0.0, top_R)
    z = x - shift_R[:, None]
    power = exp(z)
    is_top = z == 0.0
    tops_R = tl.sum((offered & is_top).to(tl.int32), axis=1)
    rest_R = tl.sum(tl.where(is_top, 0.0, power), axis=1)
    rest_R += tl.where(top_R == -INFINITY, 0, tops_R - 1).to(tl.float32)
    sum_R = tl.sum(tl.where(offered, power * z, 0.0), axis=1)
    return shift_R, rest_R, sum_R, n_R, power


@triton.jit
def entropy_of(rest_R, sum_R, n_R):
    nats_R = log1p(rest_R) - sum_R / (1.0 + rest_R)
    log_n_R = tl.log(tl.maximum(n_R, 2).to(tl.float32))
    share_R = tl.where(n_R > 1, nats_R / log_n_R, 0.0 * nats_R)
    return tl.where(share_R < 0.0, 0.0, tl.where(share_R > 1.0, 1.0, share_R))  # NaN stays


@triton.jit
def best(key, offs, count):
    """Largest key of every row, and its place: the smallest of equal ones, `count` if all -inf."""
    value_R = tl.max(key, axis=1)
    at_R = tl.min(tl.where(key == value_R[:, None], offs[None, :], count), axis=1)
    return value_R, tl.where(value_R == -INFINITY, count, at_R)


@triton.jit
def _in_best_groups(
    key, offs_e, E, num_groups, top_groups, SIGMOID: tl.constexpr, GROUPS: tl.constexpr
):
    """The keys of the best groups, -inf elsewhere."""
    size = E // num_groups
    offs_g = tl.arange(0, GROUPS)
    score = tl.full([key.shape[0], GROUPS], -INFINITY, tl.float32)
    for g in range(num_groups):
        inside = tl.where((offs_e // size == g)[None, :], key, -INFINITY)
        best_R, at_R = best(inside, offs_e, E)
        if SIGMOID:
            inside = tl.where(offs_e[None, :] == at_R[:, None], -INFINITY, inside)
            next_R = tl.max(inside, axis=1)
            best_R += tl.where(next_R == -INFINITY, 0.0, next_R)
        score = tl.where((offs_g == g)[None, :], best_R[:, None], score)
    kept = tl.zeros(key.shape, tl.int1)
    for _ in range(top_groups):
        _, group_R = best(score, offs_g, num_groups)
        score = tl.where(offs_g[None, :] == group_R[:, None], -INFINITY, score)
        kept |= (offs_e // size)[None, :] == group_R[:, None]
    return tl.where(kept, key, -INFINITY)


@triton.jit
def widen(
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
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """score, a, a with noise, key."""
    inside = valid_R[:, None] & (offs_e < E)[None, :]
    x = tl.load(
        score_ptr + t_R[:, None] * stride_st + offs_e[None, :], mask=inside, other=-INFINITY
    ).to(tl.float32)
    gone = x == -INFINITY
    a = x
    key = x
    if entropy_ptr is not None:
        H = tl.load(
            entropy_ptr + t_R[:, None] * stride_et + offs_e[None, :], mask=inside, other=0.0
        )
        H = H.to(tl.float32)
        H = tl.where(H < 0.0, 0.0, H)
        key = -H
        a = tl.where(gone, -INFINITY, -H / tau if TEMPERED else -tl.log(H + floor))
    elif SIGMOID:
        tail = exp(-tl.abs(x))
        a = tl.where(gone, -INFINITY, tl.where(x > 0.0, 0.0, x) - log1p(tail))
        if bias_ptr is not None or GROUPS > 0:
            key = tl.where(x < 0.0, tail, 1.0) / (1.0 + tail)
            if bias_ptr is not None:
                key += tl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)[
                    None, :
                ]
    noisy = a
    if noise_ptr is not None:
        noise = tl.load(
            noise_ptr + t_R[:, None] * stride_nt + offs_e[None, :], mask=inside, other=0.0
        )
        noisy = a + noise.to(tl.float32)
        key = noisy
    key = tl.where(gone | (key != key), -INFINITY, key)
    if GROUPS > 0:
        key = _in_best_groups(key, offs_e, E, num_groups, top_groups, SIGMOID, GROUPS)
    return x, a, noisy, key


@triton.jit
def normal_below(x):
    """Probability that a standard normal number is below x, to 1.2e-7 of itself on the lower side
    [Numerical Recipes, erfcc]."""
    z = tl.abs(x) * 0.70710678118654752
    t = 1.0 / (1.0 + 0.5 * z)
    y = t * 0.17087277 - 0.82215223
    y = y * t + 1.48851587
    y = y * t - 1.13520398
    y = y * t + 0.27886807
    y = y * t - 0.18628806
    y = y * t + 0.09678418
    y = y * t + 0.37409196
    y = y * t + 1.00002368
    y = y * t - 1.26551223
    tail = 0.5 * t * exp(y - z * z)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def margin(a, threshold_R, noise_std):
    """(score - threshold) / noise_std; infinite where there is no K-th expert: all of them win."""
    all_R = threshold_R == -INFINITY
    apart = (a - tl.where(all_R, 0.0, threshold_R)[:, None]) / noise_std
    margin = tl.where(all_R[:, None], INFINITY, apart)
    return tl.where(a == -INFINITY, -INFINITY, margin)


@triton.jit
def slot_weights(slot, noisy_shift_R, noisy_rest_R, SUM: tl.constexpr):
    """Weights of slots that hold a of their expert with its noise, -inf where unused."""
    if SUM == "nothing":
        return exp(slot)
    if SUM == "experts":
        return exp(slot - noisy_shift_R[:, None]) / (1.0 + noisy_rest_R)[:, None]
    top_R = tl.max(slot, axis=1)
    power = exp(slot - tl.where(top_R == -INFINITY, 0.0, top_R)[:, None])
    total_R = tl.sum(power, axis=1)
    return power * tl.where(total_R == 0.0, 0.0, 1.0 / total_R)[:, None]


def _unit_columns(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def programs_of(T: int, group: int) -> tuple[int, int]:
    """Programs, and tokens of each: whole groups, and few enough programs to add up quickly."""
    tokens = min(group * max(1, triton.cdiv(T, group * _PROGRAMS)), _MOST_TOKENS)
    return triton.cdiv(T, tokens), tokens


class Inputs(NamedTuple):
    """What widen takes of a call: tensors and strides, numbers, constants."""

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    sums_over: str
    group: int  # tokens that a program sums at least, whole tiles


def inputs_of(
    score_TE: Tensor,
    entropy_TE: Tensor | None,
    entropy_E: Tensor | None,
    bias_E: Tensor | None,
    noise_TE: Tensor | None,
    *,
    policy: str,
    softmax_before: bool,
    renormalize: bool,
    gate: str,
    num_groups: int,
    top_groups: int,
    entropy_floor: float,
    tau: float | None,
    **_others: Any,
) -> Inputs:
    block_e, grouped = triton.next_power_of_2(score_TE.shape[1]), policy == "group_limited"
    rows = max(1, _TILE // block_e)
    sigmoid = policy == "sigmoid" or (grouped and gate == "sigmoid")
    sums_over = "experts" if softmax_before else "chosen"
    if policy == "egs" or renormalize:
        sums_over = "chosen"
    elif sigmoid:
        sums_over = "nothing"
    entropy = entropy_E if entropy_TE is None else entropy_TE
    tensors = tuple(_unit_columns(x) for x in (score_TE, entropy, bias_E, noise_TE))
    return Inputs(
        tensors,
        tuple(0 if x is None or x.dim() < 2 else x.stride(0) for x in (*tensors[:2], tensors[3])),
        (num_groups, top_groups, float(entropy_floor), float(tau or 0.0)),
        {
            "SIGMOID": sigmoid,
            "TEMPERED": tau is not None,
            "GROUPS": triton.next_power_of_2(num_groups) if grouped else 0,
            "BLOCK_R": rows,
            "BLOCK_E": block_e,
            "num_warps": max(WARPS, min(MAX_WARPS, block_e // 256)),
            "enable_fp_fusion": True,
        },
        sums_over,
        rows * triton.cdiv(_TOKENS, rows),
    )
