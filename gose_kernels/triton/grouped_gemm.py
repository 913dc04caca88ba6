"""grouped_gemm on a GPU: one program per tile of a group's rows and of columns.

Letters: N rows, E groups, D width, F hidden. The contract is in ops/grouped_gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import declares, size_of
from gose_kernels.triton.tiles import (
    GROUP,
    Tile,
    for_operands,
    place,
    precision,
    product,
    row_tile,
    rows_of,
    tile_map,
    weight_bytes,
)
from gose_kernels.triton.weight_grad import bias_grad, weight_grad


def _work(args: Mapping[str, Any]) -> tuple[int, int]:
    x, y = args["x_ptr"], args["y_ptr"]
    moved = size_of(x, y, args["bias_ptr"], args["map_ptr"])
    return moved + weight_bytes(args["w_ptr"], y.shape[0]), 2 * y.numel() * x.shape[1]


@triton.jit(launch_metadata=declares(_work, "x_ptr"))
def _grouped_gemm_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [E, F, D] by its strides
    bias_ptr,  # [E, F], read if BIAS
    y_ptr,  # [N, F] written once, 0 in the rows of no group
    map_ptr,  # [3, tiles] int32
    num_tiles,
    E,
    F,
    D,
    stride_xn,
    stride_xd,
    stride_we,
    stride_wf,
    stride_wd,
    BIAS: tl.constexpr,
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
    e = e.to(tl.int64)  # int64: rows and weights pass 2**31 elements
    f = column * COLUMNS + tl.arange(0, COLUMNS)
    valid = f < F
    acc = product(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        x_ptr + (first + r) * stride_xn,
        w_ptr + e * stride_we + f * stride_wf,
        valid,
        tl.where(e < E, D, 0),
        stride_xd,
        stride_wd,
        DEPTH,
        WHOLE_D,
        WHOLE_F,
        PRECISION,
    )
    if BIAS:
        bias = tl.load(bias_ptr + e * F + f, mask=valid & (e < E), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_at = y_ptr + first * F + (r * F)[:, None] + f[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & valid[None, :])


def launch(
    x_ND: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, map_3M: Tensor, tile: Tile
) -> Tensor:
    """y_NF for tiles that `map_3M` was made for; 0 in the rows of no group."""
    (N, D), (E, F, _) = x_ND.shape, w_EFD.shape
    y_NF = x_ND.new_empty(N, F)
    tile = for_operands(tile, x_ND, w_EFD)
    num_tiles = map_3M.shape[1]
    grid = (num_tiles * triton.cdiv(F, tile.columns),)
    if grid[0]:
        with torch.cuda.device_of(x_ND):
            _grouped_gemm_kernel[grid](
                x_ND,
                w_EFD,
                None if bias_EF is None else bias_EF.contiguous(),
                y_NF,
                map_3M,
                num_tiles,
                E,
                F,
                D,
                *x_ND.stride(),
                *w_EFD.stride(),
                BIAS=bias_EF is not None,
                WHOLE_D=D % tile.depth == 0,
                WHOLE_F=F % tile.columns == 0,
                PRECISION=precision(x_ND.dtype),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                DEPTH=tile.depth,
                GROUP=GROUP,
                **tile.options,
            )
    return y_NF


def grouped_gemm(
    x_ND: Tensor,
    w_EFD: Tensor,
    offset_E1: Tensor,
    bias_EF: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """y_NF, dtype of x; offsets are trusted."""
    w_EFD = w_EFD.mT if transposed else w_EFD
    (N, _), (E, F, _) = x_ND.shape, w_EFD.shape
    if N == 0 or F == 0:
        return x_ND.new_empty(N, F)
    tile = row_tile(N, E, N, x_ND.dtype)
    return launch(x_ND, w_EFD, bias_EF, tile_map(offset_E1, N, tile.rows), tile)


def grouped_gemm_backward(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, in their layout, added to `into` if that is given, and of the bias
    ([0] without one)."""
    left, right = (x_ND, grad_NF) if transposed else (grad_NF, x_ND)
    grad_w = weight_grad(left, right, offset_E1, into=into)
    return grad_w, bias_grad(grad_NF, offset_E1) if bias else x_ND.new_empty(0)


def grouped_gemm_backward_add_(
    grad_NF: Tensor, x_ND: Tensor, offset_E1: Tensor, grad_w: Tensor, **options: bool
) -> Tensor:
    """The gradient of the bias ([0] without one); that of the weights is added to grad_w."""
    return grouped_gemm_backward(grad_NF, x_ND, offset_E1, **options, into=grad_w)[1]
