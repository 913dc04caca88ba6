"""expert_mlp on a GPU: a plan of rows, two grouped GEMMs, and the gather-sum of `combine`.

Letters: T tokens, K slots of a token, N = T*K rows, E experts, D width, F hidden, H = 2F with a
gate or F. The contract is in ops/expert_mlp.py. The first GEMM gathers its rows from the tokens and
activates its sums; what leaves it is `a`, and for training `pre`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import activations, declares, grouped_gemm, size_of
from gose_kernels.triton.activations import MlpCall, clamped, phi
from gose_kernels.triton.combine import combine
from gose_kernels.triton.dispatch import dispatch
from gose_kernels.triton.tiles import (
    GROUP,
    Tile,
    ahead,
    for_operands,
    piece_of,
    place,
    precision,
    product,
    row_tile,
    rows_of,
    tile_map,
    weight_bytes,
)


def _up_work(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, N = args["x_ptr"], args["w_ptr"], args["token_ptr"].numel()
    names = ("x_ptr", "bias_ptr", "pre_ptr", "a_ptr", "token_ptr", "map_ptr")
    moved = size_of(*(args[name] for name in names)) + weight_bytes(w, N)
    return moved, 2 * N * w.shape[1] * x.shape[1]


@triton.jit(launch_metadata=declares(_up_work, "x_ptr"))
def _up_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [E, H, D] by its strides
    bias_ptr,  # [E, H], read if BIAS
    pre_ptr,  # [N, H] written once if KEEP, 0 in the rows of no expert
    a_ptr,  # [N, F] written once
    token_ptr,  # [N] int32
    map_ptr,  # [3, tiles] int32
    num_tiles,
    E,
    F,
    D,
    stride_xt,
    stride_xd,
    stride_we,
    stride_wh,
    stride_wd,
    limit,
    alpha,
    shift,
    PHI: tl.constexpr,
    LIMITED: tl.constexpr,
    FORM: tl.constexpr,  # "alone": H = F; "halves": gates, then ups; "pairs": they alternate
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
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
    if e < 0:
        return
    token = tl.load(token_ptr + first + r).to(tl.int64)  # -1 in rows of no expert, where D is 0
    e = e.to(tl.int64)  # int64: rows and weights pass 2**31 elements
    width = tl.where(e < E, D, 0)
    WIDE: tl.constexpr = 2 * COLUMNS if FORM == "pairs" else COLUMNS
    H = F if FORM == "alone" else 2 * F
    h = column * WIDE + tl.arange(0, WIDE)
    valid_h = h < (2 * F if FORM == "pairs" else F)
    x_at = x_ptr + token * stride_xt
    w_at = w_ptr + e * stride_we + h * stride_wh
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    biased = valid_h & (e < E)
    keep = inside[:, None] & valid_h[None, :]
    if FORM == "halves":
        gate, up = _two_products(
            x_at, w_at, w_at + F * stride_wh, valid_h, width, stride_xd, stride_wd,
            ROWS, COLUMNS, DEPTH, WHOLE_D, WHOLE_F, PRECISION,
        )  # fmt: skip
        if BIAS:
            gate += tl.load(bias_ptr + e * H + h, mask=biased, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + e * H + F + h, mask=biased, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            pre_at = pre_ptr + first * H + (r * H)[:, None] + h[None, :]
            tl.store(pre_at, gate.to(pre_ptr.dtype.element_ty), mask=keep)
            tl.store(pre_at + F, up.to(pre_ptr.dtype.element_ty), mask=keep)
    else:
        acc = product(
            acc, x_at, w_at, valid_h, width, stride_xd, stride_wd,
            DEPTH, WHOLE_D, WHOLE_F, PRECISION,
        )  # fmt: skip
        if BIAS:
            acc += tl.load(bias_ptr + e * H + h, mask=biased, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            pre_at = pre_ptr + first * H + (r * H)[:, None] + h[None, :]
            tl.store(pre_at, acc.to(pre_ptr.dtype.element_ty), mask=keep)
        if FORM == "pairs":
            gate, up = tl.split(tl.reshape(acc, [ROWS, COLUMNS, 2]))
        else:
            gate, up = acc, acc
    if FORM == "alone":
        a = phi(gate, alpha, PHI)
    else:
        gate, up = clamped(gate, up, limit, LIMITED)
        a = phi(gate, alpha, PHI) * (up + shift)
    f = column * COLUMNS + tl.arange(0, COLUMNS)
    a_at = a_ptr + first * F + (r * F)[:, None] + f[None, :]
    tl.store(a_at, a.to(a_ptr.dtype.element_ty), mask=inside[:, None] & (f < F)[None, :])


@triton.jit
def _two_products(
    x_at,  # [ROWS] pointers to the rows of x
    gate_at,  # [COLUMNS] pointers to columns of w
    up_at,  # [COLUMNS]
    valid,
    D,
    stride_xd,
    stride_wd,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ gate and x @ up with one pass over x."""
    PIECE: tl.constexpr = piece_of(ROWS, x_at.dtype.element_ty.primitive_bitwidth, DEPTH)
    d = tl.arange(0, PIECE)
    x_at = x_at[:, None] + (d * stride_xd)[None, :]
    gate_at = gate_at[None, :] + (d * stride_wd)[:, None]
    up_at = up_at[None, :] + (d * stride_wd)[:, None]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, DEPTH):
        x_here = ahead(x_at, start, stride_xd)
        gate_here = ahead(gate_at, start, stride_wd)
        up_here = ahead(up_at, start, stride_wd)
        for piece in tl.static_range(0, DEPTH, PIECE):
            depth = d < D - start - piece
            x_piece = x_here + piece * stride_xd
            x = tl.load(x_piece) if WHOLE_D else tl.load(x_piece, mask=depth[None, :], other=0.0)
            if WHOLE_D and WHOLE_F:
                w_gate = tl.load(gate_here + piece * stride_wd)
                w_up = tl.load(up_here + piece * stride_wd)
            else:
                inside = depth[:, None] & valid[None, :]
                w_gate = tl.load(gate_here + piece * stride_wd, mask=inside, other=0.0)
                w_up = tl.load(up_here + piece * stride_wd, mask=inside, other=0.0)
            gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
            up = tl.dot(x, w_up, up, input_precision=PRECISION)
    return gate, up


def tile_of(call: MlpCall, num_experts: int) -> Tile:
    """The tile of a call: no expert has more rows than there are tokens, or slots where K > E."""
    T, K = call.expert_TK.shape
    most = T if num_experts >= K else T * K
    return row_tile(T * K, num_experts, most, call.x_TD.dtype)


def up_tile(call: MlpCall, tile: Tile) -> Tile:
    """The first GEMM's: with a gate, two products share the columns of a tile."""
    tile = for_operands(tile, call.x_TD, call.w_up_EHD.mT if call.transposed else call.w_up_EHD)
    return tile._replace(columns=tile.columns // 2) if call.act.gated else tile


def _up(
    call: MlpCall, token_N: Tensor, map_3M: Tensor, tile: Tile, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """a_NF and, if kept, pre_NH."""
    w_EHD = call.w_up_EHD.mT if call.transposed else call.w_up_EHD
    (E, H, D), F, N = w_EHD.shape, call.down_EFD.shape[1], token_N.numel()
    tile = up_tile(call, tile)
    a_NF = call.x_TD.new_empty(N, F)
    pre_NH = call.x_TD.new_empty(N, H) if keep else None
    num_tiles = map_3M.shape[1]
    grid = (num_tiles * triton.cdiv(F, tile.columns),)
    if grid[0]:
        _up_kernel[grid](
            call.x_TD,
            w_EHD,
            None if call.bias_up_EH is None else call.bias_up_EH.contiguous(),
            pre_NH,
            a_NF,
            token_N,
            map_3M,
            num_tiles,
            E,
            F,
            D,
            *call.x_TD.stride(),
            *w_EHD.stride(),
            **activations.options_of(call),
            BIAS=call.bias_up_EH is not None,
            KEEP=keep,
            WHOLE_D=D % tile.depth == 0,
            WHOLE_F=F % tile.columns == 0,
            PRECISION=precision(call.x_TD.dtype),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=GROUP,
            **tile.options,
        )
    return a_NF, pre_NH


def _forward(call: MlpCall, keep: bool) -> tuple[Tensor, Tensor]:
    """out_TD and, if kept, pre_NH; expert ids are trusted."""
    E = call.down_EFD.shape[0]
    N, empty = call.expert_TK.numel(), call.x_TD.new_empty
    if N == 0 or (call.x_TD.numel() == 0 and not keep):
        return call.x_TD.new_zeros(call.x_TD.shape), empty(N if keep else 0, call.up_EDH.shape[2])
    with torch.cuda.device_of(call.x_TD):
        row_TK, token_N, offset_E1 = dispatch(call.expert_TK, E)
        tile = tile_of(call, E)
        map_3M = tile_map(offset_E1, N, tile.rows)
        a_NF, pre_NH = _up(call, token_N, map_3M, tile, keep)
        w_EDF = call.w_down_EDF.mT if call.transposed else call.w_down_EDF
        y_ND = grouped_gemm.launch(a_NF, w_EDF, call.bias_down_ED, map_3M, tile)
        out_TD = combine(y_ND, call.weight_TK, row_TK)
    return out_TD, empty(0) if pre_NH is None else pre_NH


def expert_mlp(call: MlpCall) -> Tensor:
    """out_TD, dtype of x."""
    return _forward(call, keep=False)[0]


def expert_mlp_train(call: MlpCall) -> tuple[Tensor, Tensor]:
    """out_TD and pre_NH, dtype of x."""
    return _forward(call, keep=True)
