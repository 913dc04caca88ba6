"""distill_loss and its gradient on a GPU: a program per tile of samples, three passes over their
logits, the first from memory: largest values, sums of exponentials, terms and slopes.

Letters: B samples, C classes, J listed classes. Tiles are [R, C] of R samples. The contract is in
ops/distill_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import BYTES_PER_LOAD, moves, threads_per_warp
from gose_kernels.triton.floats import exp, log1p

_MAX_COLUMNS = 1024  # of a tile: longer rows are walked
_MAX_WARPS = 4
_MEAN_BLOCK = 1024
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _log_ratio(a, b):
    """float32 log(a / b) of float64 numbers, precise where the two are close."""
    above = a >= b
    apart = tl.where(above, (a - b) / b, (b - a) / a).to(tl.float32)
    return tl.where(above, log1p(apart), -log1p(apart))


@triton.jit
def _outcome(p, q, e):
    """What an outcome of probability p, q = p * exp(-e) of the student, adds to KL, and q - p."""
    f = -e
    series = f * (1.0 / 9.0) + 1.0  # exp(f) - 1 - f = f^2 / 2 * series, by Taylor
    for i in tl.static_range(6):
        series = f * (1.0 / (8 - i)) * series + 1.0
    rest = f * f * 0.5 * series
    near = tl.abs(f) < 0.5
    difference = q - p
    term = tl.where(near, p * rest, p * e + difference)
    slope = tl.where(near & (p != 0.0), p * (f + rest), difference)
    return tl.where(p == 0.0, q, term), slope


@triton.jit
def _logits(ptr, n_R, stride, offs, inside):
    at = n_R[:, None] * stride + offs[None, :]
    return tl.load(ptr + at, mask=inside, other=-_INFINITY).to(tl.float32)


@triton.jit
def _target(label_ptr, soft_ptr, n_R, valid_R, stride_lb, offs_c, inside, keep, spread):
    """y' of a tile, 0 beyond it."""
    if soft_ptr is not None:
        at = n_R[:, None] * stride_lb + offs_c[None, :]
        y = tl.load(soft_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        label_R = tl.load(label_ptr + n_R, mask=valid_R, other=-1)
        y = tl.where(offs_c[None, :] == label_R[:, None], 1.0, 0.0)
    return tl.where(inside, keep * y + spread, 0.0)


_MOVED = (
    *("student_ptr", "teacher_ptr", "label_ptr", "soft_ptr", "weight_ptr", "task_weight_ptr"),
    *("id_ptr", "tail_ptr", "seen_ptr", "term_ptr", "grad_ptr"),
)


@triton.jit(launch_metadata=moves(*_MOVED, once="student_ptr", operations=14))
def _distill_kernel(
    student_ptr,  # [B, C]
    teacher_ptr,  # [B, C], or [B, J] logits of the listed classes
    label_ptr,  # [B] int64, or None with
    soft_ptr,  # [B, C]
    weight_ptr,  # [B] or None
    task_weight_ptr,  # [B] or None
    id_ptr,  # [B, J] int64, or None
    tail_ptr,  # [B]
    seen_ptr,  # [B, C] int8, 1 at the listed classes
    term_ptr,  # [B] float32
    grad_ptr,  # [B, C], or None: not wanted
    B,
    C,
    J,
    stride_sb,
    stride_tb,
    stride_lb,
    task_weight,
    inverse_tau,
    keep,  # 1 - label_smoothing
    spread,  # label_smoothing / C
    kl_scale,  # tau^2 / r
    grad_scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    n_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid_R = n_R < B
    weight_R = tl.full([ROWS], 1.0, tl.float32)
    if weight_ptr is not None:
        weight_R = tl.load(weight_ptr + n_R, mask=valid_R, other=0.0).to(tl.float32)
    task_R = tl.zeros([ROWS], tl.float32) + task_weight
    if task_weight_ptr is not None:
        task_R = tl.load(task_weight_ptr + n_R, mask=valid_R, other=0.0).to(tl.float32)
    ce_factor_R = weight_R * task_R  # 0 leaves the part out
    kl_factor_R = weight_R * (1.0 - task_R) * kl_scale

    top_R = tl.full([ROWS], -_INFINITY, tl.float32)
    top_t_R = tl.full([ROWS], -_INFINITY, tl.float32)
    top_rest_R = tl.full([ROWS], -_INFINITY, tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = valid_R[:, None] & (offs_c < C)[None, :]
        x = _logits(student_ptr, n_R, stride_sb, offs_c, inside)
        top_R = tl.maximum(top_R, tl.max(x, axis=1))  # leaves NaN aside, which shows in the sums
        if id_ptr is None:
            y = _logits(teacher_ptr, n_R, stride_tb, offs_c, inside)
            top_t_R = tl.maximum(top_t_R, tl.max(y, axis=1))
        else:
            seen = tl.load(seen_ptr + n_R[:, None] * C + offs_c[None, :], mask=inside, other=1)
            top_rest_R = tl.maximum(top_rest_R, tl.max(tl.where(seen == 0, x, -_INFINITY), axis=1))
    top_rest_R = tl.where(top_rest_R == -_INFINITY, 0.0, top_rest_R)

    # float64: at a high temperature slopes are differences of nearly equal probabilities, and the
    # rounding of a total moves them all.
    total_R = tl.zeros([ROWS], tl.float64)
    total_q_R = tl.zeros([ROWS], tl.float64)
    total_p_R = tl.zeros([ROWS], tl.float64)
    total_rest_R = tl.zeros([ROWS], tl.float64)
    sum_y_R = tl.zeros([ROWS], tl.float64)
    sum_yz_R = tl.zeros([ROWS], tl.float64)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = valid_R[:, None] & (offs_c < C)[None, :]
        x = _logits(student_ptr, n_R, stride_sb, offs_c, inside)
        z = x - top_R[:, None]
        total_R += tl.sum(tl.where(inside, exp(z), 0.0).to(tl.float64), axis=1)
        target = _target(label_ptr, soft_ptr, n_R, valid_R, stride_lb, offs_c, inside, keep, spread)
        sum_y_R += tl.sum(target.to(tl.float64), axis=1)
        sum_yz_R += tl.sum(tl.where(target == 0.0, 0.0, target * z).to(tl.float64), axis=1)
        if id_ptr is None:
            y = _logits(teacher_ptr, n_R, stride_tb, offs_c, inside)
            power = exp((y - top_t_R[:, None]) * inverse_tau)
            total_p_R += tl.sum(tl.where(inside, power, 0.0).to(tl.float64), axis=1)
            power = exp(z * inverse_tau)
            total_q_R += tl.sum(tl.where(inside, power, 0.0).to(tl.float64), axis=1)
        else:
            seen = tl.load(seen_ptr + n_R[:, None] * C + offs_c[None, :], mask=inside, other=1)
            power = exp((x - top_rest_R[:, None]) * inverse_tau)
            total_rest_R += tl.sum(tl.where(seen == 0, power, 0.0).to(tl.float64), axis=1)
    log_total_R = log1p((total_R - 1.0).to(tl.float32))
    sum_target_R = sum_y_R.to(tl.float32)
    ce_R = sum_target_R * log_total_R - sum_yz_R.to(tl.float32)
    ce_scale_R = ce_factor_R * grad_scale
    kl_scale_R = kl_factor_R * inverse_tau * grad_scale
    share_R = sum_target_R * (1.0 / total_R).to(tl.float32)

    kl_R = tl.zeros([ROWS], tl.float64)
    slope_rest_R = tl.zeros([ROWS], tl.float32)
    if id_ptr is not None:
        # The J listed classes, and all others as one outcome.
        offs_j = tl.arange(0, BLOCK_J)
        listed = valid_R[:, None] & (offs_j < J)[None, :]
        y_RJ = _logits(teacher_ptr, n_R, stride_tb, offs_j, listed)
        at_RJ = n_R[:, None] * J + offs_j[None, :]
        class_RJ = tl.load(id_ptr + at_RJ, mask=listed, other=0)
        x_RJ = tl.load(
            student_ptr + n_R[:, None] * stride_sb + class_RJ, mask=listed, other=-_INFINITY
        ).to(tl.float32)
        tail_R = tl.load(tail_ptr + n_R, mask=valid_R, other=0.0).to(tl.float32)
        z_RJ = x_RJ - top_R[:, None]
        z_t_RJ = y_RJ - tl.max(y_RJ, axis=1)[:, None]
        power_q = tl.where(listed, exp(z_RJ * inverse_tau), 0.0)
        power_p = tl.where(listed, exp(z_t_RJ * inverse_tau), 0.0)
        rest_R = total_rest_R.to(tl.float32)
        log_rest_R = (top_rest_R - top_R) * inverse_tau + tl.log(rest_R)
        power_rest_R = exp(log_rest_R)
        total_q_R = tl.sum(power_q.to(tl.float64), axis=1) + power_rest_R.to(tl.float64)
        # Infinite for tail = 1: p = 0.
        total_p_R = tl.sum(power_p.to(tl.float64), axis=1) / (1.0 - tail_R.to(tl.float64))
        shift_R = tl.where(tail_R < 1.0, _log_ratio(total_p_R, total_q_R), _INFINITY)
        inverse_q_R = (1.0 / total_q_R).to(tl.float32)
        inverse_p_R = (1.0 / total_p_R).to(tl.float32)
        q_rest_R = power_rest_R * inverse_q_R
        e_R = tl.where(
            q_rest_R > 1e-30,
            _log_ratio(tail_R.to(tl.float64), q_rest_R.to(tl.float64)),
            tl.log(tail_R) - (log_rest_R - tl.log(total_q_R.to(tl.float32))),
        )
        term_R, difference_R = _outcome(tail_R, q_rest_R, e_R)
        slope_rest_R = tl.where(rest_R > 0.0, difference_R / rest_R, 0.0 * rest_R)
        term_RJ, difference_RJ = _outcome(
            power_p * inverse_p_R[:, None],
            power_q * inverse_q_R[:, None],
            (z_t_RJ - z_RJ) * inverse_tau - shift_R[:, None],
        )
        kl_R = tl.sum(tl.where(listed, term_RJ, 0.0).to(tl.float64), axis=1) + term_R.to(tl.float64)
        listed_slope = tl.where(
            kl_scale_R[:, None] != 0.0, difference_RJ * kl_scale_R[:, None], 0.0
        )
        if soft_ptr is not None:
            target_RJ = tl.load(
                soft_ptr + n_R[:, None] * stride_lb + class_RJ, mask=listed, other=0.0
            )
            target_RJ = target_RJ.to(tl.float32)
        else:
            label_R = tl.load(label_ptr + n_R, mask=valid_R, other=-1)
            target_RJ = tl.where(class_RJ == label_R[:, None], 1.0, 0.0)
        ce_slope_RJ = exp(z_RJ) * share_R[:, None] - (keep * target_RJ + spread)
        listed_slope += tl.where(ce_scale_R[:, None] != 0.0, ce_slope_RJ * ce_scale_R[:, None], 0.0)
    inverse_q_R = (1.0 / total_q_R).to(tl.float32)
    inverse_p_R = (1.0 / total_p_R).to(tl.float32)
    shift_R = _log_ratio(total_p_R, total_q_R)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = valid_R[:, None] & (offs_c < C)[None, :]
        x = _logits(student_ptr, n_R, stride_sb, offs_c, inside)
        z = x - top_R[:, None]
        if id_ptr is None:
            z_t = _logits(teacher_ptr, n_R, stride_tb, offs_c, inside) - top_t_R[:, None]
            term, difference = _outcome(
                exp(z_t * inverse_tau) * inverse_p_R[:, None],
                exp(z * inverse_tau) * inverse_q_R[:, None],
                (z_t - z) * inverse_tau - shift_R[:, None],
            )
            kl_R += tl.sum(tl.where(inside, term, 0.0).to(tl.float64), axis=1)
        else:
            difference = exp((x - top_rest_R[:, None]) * inverse_tau) * slope_rest_R[:, None]
        if grad_ptr is not None:
            slope = tl.where(kl_scale_R[:, None] != 0.0, difference * kl_scale_R[:, None], 0.0)
            target = _target(
                label_ptr, soft_ptr, n_R, valid_R, stride_lb, offs_c, inside, keep, spread
            )
            ce_slope = exp(z) * share_R[:, None] - target
            slope += tl.where(ce_scale_R[:, None] != 0.0, ce_slope * ce_scale_R[:, None], 0.0)
            at = n_R[:, None] * C + offs_c[None, :]
            stored = inside
            if id_ptr is not None:  # listed classes have slopes of their own
                stored = inside & (tl.load(seen_ptr + at, mask=inside, other=1) == 0)
            tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=stored)
    if grad_ptr is not None and id_ptr is not None:
        slope = listed_slope.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + n_R[:, None] * C + class_RJ, slope, mask=listed)
    ce_part_R = tl.where(ce_factor_R != 0.0, ce_factor_R * ce_R, 0.0)
    kl_part_R = tl.where(kl_factor_R != 0.0, kl_factor_R * kl_R.to(tl.float32), 0.0)
    tl.store(term_ptr + n_R, ce_part_R + kl_part_R, mask=valid_R)


@triton.jit(launch_metadata=moves("term_ptr", "loss_ptr"))
def _distill_mean_kernel(
    term_ptr,  # [B] float32
    loss_ptr,  # [1] float32
    B,
    count,  # B, or 1 without a sample
    BLOCK: tl.constexpr,
):
    total_N = tl.zeros([BLOCK], tl.float64)
    for start in range(0, B, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total_N += tl.load(term_ptr + n, mask=n < B, other=0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(total_N, axis=0) / count).to(tl.float32))


def _tile(C: int, item_bytes: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: 16 bytes a thread, as many rows as fill the warps. Up
    to 64 columns of 2 bytes 8: eight elements a thread spill for sm_100 there."""
    columns, lanes = triton.next_power_of_2(C), threads_per_warp()
    item_load = 8 if item_bytes == 2 and columns <= 64 else BYTES_PER_LOAD
    most = _MAX_WARPS * lanes * item_load // item_bytes
    columns = min(columns, _MAX_COLUMNS, most)
    rows = max(1, most // columns)
    warps = rows * columns * item_bytes // (item_load * lanes)
    return rows, columns, max(1, min(_MAX_WARPS, warps))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _run(
    with_grad: bool,
    student_BC: Tensor,
    teacher: Tensor,
    label: Tensor,
    weight_B: Tensor | None,
    task_weight_B: Tensor | None,
    teacher_id_BJ: Tensor | None,
    teacher_tail_B: Tensor | None,
    *,
    task_weight: float,
    tau: float,
    label_smoothing: float,
    kl_reduction: str,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    B, C = student_BC.shape
    J, listed, mean = teacher.shape[1], teacher_id_BJ is not None, reduction == "mean"
    student_BC, teacher = _unit_columns(student_BC), _unit_columns(teacher)
    hard = label.dim() == 1
    label = label.contiguous() if hard else _unit_columns(label)
    term_B = student_BC.new_empty(B, dtype=torch.float32)
    grad_BC = student_BC.new_empty(B, C) if with_grad else None
    seen_BC = None
    if teacher_id_BJ is not None:
        teacher_id_BJ = teacher_id_BJ.contiguous()
        seen_BC = torch.zeros(B, C, dtype=torch.int8, device=student_BC.device)
        seen_BC.scatter_(1, teacher_id_BJ, 1)
    rows, columns, num_warps = _tile(C, student_BC.element_size())
    per_sample = (weight_B, task_weight_B)
    with torch.cuda.device_of(student_BC):
        if B > 0:
            _distill_kernel[(triton.cdiv(B, rows),)](
                *(student_BC, teacher, label if hard else None, None if hard else label),
                *(None if x is None else x.contiguous() for x in per_sample),
                teacher_id_BJ,
                None if teacher_tail_B is None else teacher_tail_B.contiguous(),
                *(seen_BC, term_B, grad_BC, B, C, J),
                *(student_BC.stride(0), teacher.stride(0), 0 if hard else label.stride(0)),
                *(float(task_weight), 1.0 / tau, 1.0 - label_smoothing, label_smoothing / C),
                tau * tau / (C if kl_reduction == "numel" else 1),
                1.0 / B if mean else 1.0,
                rows,
                columns,
                triton.next_power_of_2(J) if listed else 1,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
        if not mean:
            return term_B, grad_BC
        loss = student_BC.new_empty((), dtype=torch.float32)
        _distill_mean_kernel[(1,)](
            term_B, loss, B, max(B, 1), _MEAN_BLOCK, num_warps=_MAX_WARPS, enable_fp_fusion=True
        )
    return loss, grad_BC


_DEFAULTS: dict[str, Any] = {
    "task_weight": 0.5,
    "tau": 1.0,
    "label_smoothing": 0.0,
    "kl_reduction": "batchmean",
    "reduction": "mean",
}
_OPTIONAL = 4  # weight_B, task_weight_B, teacher_id_BJ, teacher_tail_B


def distill_loss(
    student_BC: Tensor, teacher: Tensor, label: Tensor, *optional: Tensor | None, **options: Any
) -> Tensor:
    """The loss, or term_B; labels, ids, weights and tails are trusted."""
    given = (*optional, *(None,) * (_OPTIONAL - len(optional)))
    return _run(False, student_BC, teacher, label, *given, **{**_DEFAULTS, **options})[0]


def distill_loss_train(
    student_BC: Tensor, teacher: Tensor, label: Tensor, *optional: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same and grad_BC, dtype of student."""
    given = (*optional, *(None,) * (_OPTIONAL - len(optional)))
    loss, grad_BC = _run(True, student_BC, teacher, label, *given, **{**_DEFAULTS, **options})
    assert grad_BC is not None
    return loss, grad_BC
