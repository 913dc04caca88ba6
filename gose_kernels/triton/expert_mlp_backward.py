"""expert_mlp's backward on a GPU, from x, the weights and pre: no other activation was kept.

Letters: T tokens, K slots of a token, N = T*K rows, E experts, D width, F hidden, H = 2F with a
gate or F. One GEMM makes the gradient of `a`; its epilogue makes `a` again and from both the
gradient of pre, weight * a for the gradient of w_down, and the gate gradient of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import activations, declares, grouped_gemm, size_of
from gose_kernels.triton.activations import MlpCall, clamped, phi, slope
from gose_kernels.triton.combine import combine
from gose_kernels.triton.dispatch import dispatch
from gose_kernels.triton.expert_mlp import tile_of
from gose_kernels.triton.tiles import (
    GROUP,
    Tile,
    for_operands,
    place,
    precision,
    product,
    rows_of,
    tile_map,
    weight_bytes,
)
from gose_kernels.triton.weight_grad import LEFT, RIGHT, Frozen, bias_grad, weight_grad

BackwardCall = Any  # of ops/mlp_call.py, which this layer does not import

_SLOTS = 256  # of a program that moves gate weights
_GATE_SLOTS, _GATE_COLUMNS = 32, 64


def _row_weight_work(args: Mapping[str, Any]) -> tuple[int, int]:
    return size_of(args["weight_ptr"], args["row_ptr"], args["out_ptr"]), 0


@triton.jit(launch_metadata=declares(_row_weight_work))
def _row_weight_kernel(
    weight_ptr,  # [N] float32, by slot
    row_ptr,  # [N] int32, -1 = unused
    out_ptr,  # [N] float32, by row; rows of no expert are left alone
    N,
    SLOTS: tl.constexpr,
):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_ptr + slot, mask=slot < N, other=-1)
    weight = tl.load(weight_ptr + slot, mask=row >= 0, other=0.0)
    tl.store(out_ptr + row, weight, mask=row >= 0)


@triton.jit
def _pre(
    pre_ptr,  # [rows, H], the tile's first row
    r,
    inside,
    column,
    F,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """gate and up in float32; up is gate where there is no gate."""
    if FORM == "pairs":
        h = column * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS)
        keep = inside[:, None] & (h < 2 * F)[None, :]
        pre = tl.load(pre_ptr + (r * 2 * F)[:, None] + h[None, :], mask=keep, other=0.0)
        gate, up = tl.split(tl.reshape(pre.to(tl.float32), [ROWS, COLUMNS, 2]))
    else:
        f = column * COLUMNS + tl.arange(0, COLUMNS)
        keep = inside[:, None] & (f < F)[None, :]
        at = pre_ptr + (r * (F if FORM == "alone" else 2 * F))[:, None] + f[None, :]
        gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        up = gate
        if FORM == "halves":
            up = tl.load(at + F, mask=keep, other=0.0).to(tl.float32)
    return gate, up


def _hidden_grad_work(args: Mapping[str, Any]) -> tuple[int, int]:
    w, N = args["w_ptr"], args["N"]
    names = ("pre_ptr", "weight_ptr", "grad_pre_ptr", "hidden_ptr", "share_ptr", "token_ptr")
    moved = size_of(args["map_ptr"], *(args[name] for name in names))
    if args["D"]:  # else there is no product
        moved += size_of(args["grad_ptr"]) + weight_bytes(w, N)
    return moved, 2 * N * args["F"] * args["D"]


@triton.jit(launch_metadata=declares(_hidden_grad_work, "grad_ptr"))
def _hidden_grad_kernel(
    grad_ptr,  # [T, D] gradient of out
    w_ptr,  # [E, D, F] by its strides
    pre_ptr,  # [N, H]
    weight_ptr,  # [N] float32, by row
    grad_pre_ptr,  # [N, H] written once if PRE
    hidden_ptr,  # [N, F] weight * a, written once if HIDDEN
    share_ptr,  # [tiles of F, N] float32, written once if SHARE
    token_ptr,  # [N] int32
    map_ptr,  # [3, tiles] int32
    N,
    num_tiles,
    E,
    F,
    D,
    stride_gt,
    stride_gd,
    stride_we,
    stride_wd,
    stride_wf,
    limit,
    alpha,
    shift,
    PHI: tl.constexpr,
    LIMITED: tl.constexpr,
    FORM: tl.constexpr,  # as in expert_mlp.py
    PRE: tl.constexpr,
    HIDDEN: tl.constexpr,
    SHARE: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_F: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, column = place(num_tiles, tl.cdiv(F, COLUMNS), GROUP)
    e, first, r, inside = rows_of(map_ptr, num_tiles, tile, ROWS)
    if (e < 0) | (e == E):
        return
    token = tl.load(token_ptr + first + r).to(tl.int64)
    e = e.to(tl.int64)  # int64: rows and weights pass 2**31 elements
    f = column * COLUMNS + tl.arange(0, COLUMNS)
    valid = f < F
    keep = inside[:, None] & valid[None, :]
    grad_a = product(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        grad_ptr + token * stride_gt,
        w_ptr + e * stride_we + f * stride_wf,
        valid,
        D,
        stride_gd,
        stride_wd,
        DEPTH,
        WHOLE_D,
        WHOLE_F,
        PRECISION,
    )
    H = F if FORM == "alone" else 2 * F
    pre_ptr += first * H
    weight = tl.load(weight_ptr + first + r)[:, None] if PRE or HIDDEN else 0.0
    if HIDDEN or SHARE:
        gate, up = _pre(pre_ptr, r, inside, column, F, FORM, ROWS, COLUMNS)
        gate, up = clamped(gate, up, limit, LIMITED)
        a = phi(gate, alpha, PHI)
        if FORM != "alone":
            a *= up + shift
        if SHARE:
            share = tl.sum(tl.where(keep, grad_a * a, 0.0), axis=1)
            tl.store(share_ptr + column.to(tl.int64) * N + first + r, share, mask=inside)
        if HIDDEN:
            hidden_at = hidden_ptr + first * F + (r * F)[:, None] + f[None, :]
            tl.store(hidden_at, (weight * a).to(hidden_ptr.dtype.element_ty), mask=keep)
    if PRE:
        # pre is read again behind a barrier: kept from above, it would not fit the registers.
        tl.debug_barrier()
        gate, up = _pre(pre_ptr, r, inside, column, F, FORM, ROWS, COLUMNS)
        low, within = clamped(gate, up, limit, LIMITED)
        grad_a *= weight
        into_up = grad_a * phi(low, alpha, PHI)
        if FORM != "alone":
            grad_a *= within + shift
        into_gate = grad_a * slope(low, alpha, PHI)
        if LIMITED:
            into_gate = tl.where(gate > limit, 0.0, into_gate)
            into_up = tl.where(tl.abs(up) > limit, 0.0, into_up)
        grad_pre_ptr += first * H
        if FORM == "pairs":
            h = column * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS)
            both = tl.reshape(tl.join(into_gate, into_up), [ROWS, 2 * COLUMNS])
            tl.store(
                grad_pre_ptr + (r * H)[:, None] + h[None, :],
                both.to(grad_pre_ptr.dtype.element_ty),
                mask=inside[:, None] & (h < H)[None, :],
            )
        else:
            at = grad_pre_ptr + (r * H)[:, None] + f[None, :]
            tl.store(at, into_gate.to(grad_pre_ptr.dtype.element_ty), mask=keep)
            if FORM == "halves":
                tl.store(at + F, into_up.to(grad_pre_ptr.dtype.element_ty), mask=keep)


def _gate_grad_work(args: Mapping[str, Any]) -> tuple[int, int]:
    share, N, bias = args["share_ptr"], args["N"], args["bias_ptr"]
    moved = size_of(share, args["row_ptr"], args["out_ptr"])
    if bias is None:
        return moved, share.numel()
    moved += size_of(bias, args["grad_ptr"], args["expert_ptr"])
    return moved, share.numel() + 2 * N * bias.shape[1]


@triton.jit(launch_metadata=declares(_gate_grad_work))
def _gate_grad_kernel(
    share_ptr,  # [columns, N] float32, by row
    row_ptr,  # [N] int32, by slot
    expert_ptr,  # [N] ids, read if BIAS
    grad_ptr,  # [T, D], read if BIAS
    bias_ptr,  # [E, D], read if BIAS
    out_ptr,  # [N] float32, written once, 0 in unused slots
    columns,
    N,
    K,
    D,
    stride_gt,
    stride_gd,
    BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_ptr + slot, mask=slot < N, other=-1).to(tl.int64)
    used = row >= 0
    total = tl.zeros([SLOTS], tl.float32)
    share_at = share_ptr + row
    for _ in range(columns):
        total += tl.load(share_at, mask=used, other=0.0)
        share_at += N
    if BIAS:
        e = tl.load(expert_ptr + slot, mask=used, other=0).to(tl.int64)
        t = (slot // K).to(tl.int64)
        acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
        for start in range(0, D, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = used[:, None] & (d < D)[None, :]
            grad_at = grad_ptr + (t * stride_gt)[:, None] + (d * stride_gd)[None, :]
            grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + (e * D)[:, None] + d[None, :], mask=inside, other=0.0)
            acc += grad * bias.to(tl.float32)
        total += tl.sum(acc, axis=1)
    tl.store(out_ptr + slot, total, mask=slot < N)


def _row_weight(weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """weight_N float32, in the order of rows."""
    weight_N = weight_TK.new_empty(weight_TK.numel())
    grid = (triton.cdiv(weight_N.numel(), _SLOTS),)
    _row_weight_kernel[grid](
        weight_TK.contiguous(),
        row_TK,
        weight_N,
        weight_N.numel(),
        _SLOTS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return weight_N


def hidden_tile(call: MlpCall, grad_TD: Tensor, tile: Tile) -> Tile:
    """That of the gradient of `a`. The epilogue holds several tiles at once; pairs are taken apart
    in registers, and sizes that 16 does not divide are accessed by the element: an address each."""
    w_EDF = call.w_down_EDF.mT if call.transposed else call.w_down_EDF
    _, D, F = w_EDF.shape
    narrow = call.interleaved or D % 16 > 0 or F % 16 > 0
    columns = tile.columns // (4 if narrow else 2)
    return for_operands(tile, grad_TD, w_EDF)._replace(columns=columns)


def _hidden_grad(
    call: MlpCall,
    back: BackwardCall,
    token_N: Tensor,
    weight_N: Tensor | None,
    map_3M: Tensor,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_pre_NH, hidden_NF = weight * a, and shares of the gate's gradient; [0] if not needed."""
    w_EDF = call.w_down_EDF.mT if call.transposed else call.w_down_EDF
    (E, D, F), N, empty = w_EDF.shape, token_N.numel(), call.x_TD.new_empty
    tile = hidden_tile(call, back.grad_TD, tile)
    grad_pre_NH = empty(back.pre_NH.shape if back.need_pre else 0)
    hidden_NF = empty(N, F) if back.need_down else empty(0)
    shares = (triton.cdiv(F, tile.columns), N) if back.need_weight else (0, N)
    share = empty(shares, dtype=torch.float32)
    num_tiles = map_3M.shape[1]
    grid = (num_tiles * triton.cdiv(F, tile.columns),)
    wanted = back.need_pre or back.need_weight
    if grid[0] and (wanted or back.need_down):
        _hidden_grad_kernel[grid](
            back.grad_TD,
            w_EDF,
            back.pre_NH.contiguous(),
            weight_N,
            grad_pre_NH,
            hidden_NF,
            share,
            token_N,
            map_3M,
            N,
            num_tiles,
            E,
            F,
            D if wanted else 0,  # without a gradient of a there is no product
            *back.grad_TD.stride(),
            *w_EDF.stride(),
            **activations.options_of(call),
            PRE=back.need_pre,
            HIDDEN=back.need_down,
            SHARE=back.need_weight,
            WHOLE_D=D % tile.depth == 0,
            WHOLE_F=F % tile.columns == 0,
            PRECISION=precision(call.x_TD.dtype),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=GROUP,
            **tile.options,
        )
    return grad_pre_NH, hidden_NF, share


def _gate_grad(call: MlpCall, back: BackwardCall, row_TK: Tensor, share: Tensor) -> Tensor:
    """grad_weight_TK float32, 0 in unused slots."""
    (T, K), D = call.weight_TK.shape, call.x_TD.shape[1]
    grad_weight_TK = share.new_empty(T, K)
    bias = call.bias_down_ED
    _gate_grad_kernel[(triton.cdiv(T * K, _GATE_SLOTS),)](
        share,
        row_TK,
        call.expert_TK.contiguous(),
        back.grad_TD,
        None if bias is None else bias.contiguous(),
        grad_weight_TK,
        share.shape[0],
        T * K,
        K,
        D,
        *back.grad_TD.stride(),
        BIAS=bias is not None,
        SLOTS=_GATE_SLOTS,
        COLUMNS=_GATE_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_weight_TK


def _x_grad(
    call: MlpCall, grad_pre_NH: Tensor, row_TK: Tensor, map_3M: Tensor, tile: Tile
) -> Tensor:
    w_EHD = call.w_up_EHD.mT if call.transposed else call.w_up_EHD
    grad_x_ND = grouped_gemm.launch(grad_pre_NH, w_EHD.mT, None, map_3M, tile)
    return combine(grad_x_ND, torch.ones_like(row_TK, dtype=torch.float32), row_TK)


def _of_weights(
    units_N: Tensor,
    tokens_T: Tensor,
    offset_E1: Tensor,
    token_N: Tensor,
    units_first: bool,
    frozen: Frozen,
    into: Tensor | None,
) -> Tensor:
    """The gradient of weights between hidden units, which have rows, and what tokens have."""
    if units_first:
        left, right, gather, units = units_N, tokens_T, RIGHT, LEFT
    else:
        left, right, gather, units = tokens_T, units_N, LEFT, RIGHT
    return weight_grad(
        left,
        right,
        offset_E1,
        token_N=token_N,
        gather=gather,
        frozen=frozen,
        units=units,
        into=into,
    )


def expert_mlp_backward(
    call: MlpCall,
    back: BackwardCall,
    into_up: Tensor | None = None,
    into_down: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, w_up, w_down, bias_up and bias_down; [0] for one not needed. Those of
    the weights are added to what is given for them."""
    E, _, D = call.down_EFD.shape
    H, N = call.up_EDH.shape[2], call.expert_TK.numel()
    x_TD, none = call.x_TD, call.x_TD.new_empty(0)
    if N == 0:
        zeros = x_TD.new_zeros
        return (
            zeros(x_TD.shape) if back.need_x else none,
            call.weight_TK.new_zeros(call.weight_TK.shape if back.need_weight else 0),
            zeros(call.w_up_EHD.shape) if back.need_up and into_up is None else none,
            zeros(call.w_down_EDF.shape) if back.need_down and into_down is None else none,
            zeros(E, H) if back.need_bias_up else none,
            zeros(E, D) if back.need_bias_down else none,
        )
    with torch.cuda.device_of(x_TD):
        row_TK, token_N, offset_E1 = dispatch(call.expert_TK, E)
        tile = tile_of(call, E)
        map_3M = tile_map(offset_E1, N, tile.rows)
        weighted = back.need_pre or back.need_down or back.need_bias_down
        weight_N = _row_weight(call.weight_TK, row_TK) if weighted else None
        grad_pre_NH, hidden_NF, share = _hidden_grad(call, back, token_N, weight_N, map_3M, tile)
        frozen = Frozen(call.frozen_E, call.frozen_EF)
        frozen_up = frozen._replace(pairs=call.interleaved)
        grad_x = _x_grad(call, grad_pre_NH, row_TK, map_3M, tile) if back.need_x else none
        grad_weight = call.weight_TK.new_empty(0)
        if back.need_weight:
            grad_weight = _gate_grad(call, back, row_TK, share)
        tokens = (offset_E1, token_N)
        grad_up = grad_down = none
        if back.need_up:
            grad_up = _of_weights(
                grad_pre_NH, x_TD, *tokens, not call.transposed, frozen_up, into_up
            )
        if back.need_down:
            grad_down = _of_weights(
                hidden_NF, back.grad_TD, *tokens, call.transposed, frozen, into_down
            )
        grad_bias_up = grad_bias_down = none
        if back.need_bias_up:
            grad_bias_up = bias_grad(grad_pre_NH, offset_E1, frozen=frozen_up, units=True)
        if back.need_bias_down:
            grad_bias_down = bias_grad(
                back.grad_TD, offset_E1, token_N=token_N, weight_N=weight_N, frozen=frozen
            )
    return grad_x, grad_weight, grad_up, grad_down, grad_bias_up, grad_bias_down


def expert_mlp_backward_add_(
    call: MlpCall, back: BackwardCall, grad_up: Tensor | None, grad_down: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias_up and bias_down; those of the weights go to what is given."""
    x, weight, _, _, *biases = expert_mlp_backward(call, back, grad_up, grad_down)
    return x, weight, *biases
