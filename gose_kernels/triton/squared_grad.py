"""squared_grad on a GPU: one program per expert and tile of its matrix, which makes the gradient of
one sample after the other in registers and adds its square.

Letters: N rows, E experts, E1 = E+1, D width, F hidden. The contract is in ops/squared_grad.py.
Rows of a sample stand anywhere: a stable sort by (expert, sample) gives the order in which they are
read. Where every row is a sample the squares of the rows are multiplied, as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import declares, size_of
from gose_kernels.triton.tiles import Tile, by_element, precision

# A sample's rows are the sum: short steps, so that the last one wastes little.
_ROWS, _SAMPLES_HALF, _SAMPLES = (
    Tile(64, 64, 32, 4, 3),
    Tile(64, 128, 16, 4, 4),
    Tile(64, 64, 16, 4, 4),
)
_ELEMENT_COLUMNS = 32  # of tiles accessed by the element
_BIAS_ROWS, _BIAS_COLUMNS = 32, 128


class _Order(NamedTuple):
    """Rows by expert and sample."""

    row_N: Tensor  # int32
    stop_N: Tensor  # int32: where the sample of each place ends


def _order(sample_N: Tensor, offset_E1: Tensor | None) -> _Order:
    key_N = sample_N.long()
    if offset_E1 is not None:
        n = torch.arange(sample_N.numel(), device=sample_N.device, dtype=torch.int32)
        key_N = key_N + (torch.bucketize(n, offset_E1[1:].contiguous(), right=True) << 32)
    key_N, row_N = key_N.sort(stable=True)
    stop_N = torch.searchsorted(key_N, key_N, right=True, out_int32=True)
    return _Order(row_N.int(), stop_N)


def _work(args: Mapping[str, Any]) -> tuple[int, int]:
    names = ("grad", "x", "row", "stop", "offset", "out")
    grad, x, *_ = given = [args.get(f"{name}_ptr") for name in names]
    assert grad is not None
    assert x is not None
    return size_of(*given), 2 * x.shape[0] * x.shape[1] * grad.shape[1]


@triton.jit
def _bounds(offset_ptr, e, N):
    """The first row of an expert and the one after its last."""
    first, last = 0, N
    if offset_ptr is not None:
        first = tl.load(offset_ptr + e)
        last = tl.load(offset_ptr + e + 1)
    return first, last


@triton.jit
def _tile(F, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Expert, rows and columns of its matrix, of a program."""
    across = tl.cdiv(D, COLUMNS)
    tiles = tl.cdiv(F, ROWS) * across
    tile = tl.program_id(0) % tiles
    f = tile // across * ROWS + tl.arange(0, ROWS)
    d = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    return (tl.program_id(0) // tiles).to(tl.int64), f, d  # int64: squares pass 2**31 elements


@triton.jit(launch_metadata=declares(_work))
def _squared_rows_kernel(
    grad_ptr,  # [N, F]
    x_ptr,  # [N, D]
    offset_ptr,  # [E1] int32, or None: one expert has all rows
    out_ptr,  # [E, F, D] float32, written once
    N,
    F,
    D,
    stride_gn,
    stride_gf,
    stride_xn,
    stride_xd,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    e, f, d = _tile(F, D, ROWS, COLUMNS)
    valid_f, valid_d = f < F, d < D
    first, last = _bounds(offset_ptr, e, N)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_at = grad_ptr + (f * stride_gf)[None, :]
    x_at = x_ptr + (d * stride_xd)[None, :]
    for start in range(first, last, DEPTH):
        n = start + tl.arange(0, DEPTH)
        inside, row = (n < last)[:, None], n.to(tl.int64)[:, None]
        grad = tl.load(grad_at + row * stride_gn, mask=inside & valid_f[None, :], other=0.0)
        x = tl.load(x_at + row * stride_xn, mask=inside & valid_d[None, :], other=0.0)
        grad, x = grad.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(grad * grad), x * x, acc, input_precision=PRECISION)
    out_at = out_ptr + (e * F + f)[:, None] * D + d[None, :]
    tl.store(out_at, acc, mask=valid_f[:, None] & valid_d[None, :])


@triton.jit(launch_metadata=declares(_work, "x_ptr"))
def _squared_samples_kernel(
    grad_ptr,  # [N, F]
    x_ptr,  # [N, D]
    row_ptr,  # [N] int32 rows by expert and sample
    stop_ptr,  # [N] int32: where the sample of each place ends
    offset_ptr,  # [E1] int32, or None: one expert has all rows
    out_ptr,  # [E, F, D] float32, written once
    N,
    F,
    D,
    stride_gn,
    stride_gf,
    stride_xn,
    stride_xd,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    e, f, d = _tile(F, D, ROWS, COLUMNS)
    valid_f, valid_d = f < F, d < D
    first, last = _bounds(offset_ptr, e, N)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_at = grad_ptr + (f * stride_gf)[None, :]
    x_at = x_ptr + (d * stride_xd)[None, :]
    while first < last:
        stop = tl.load(stop_ptr + first)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(first, stop, DEPTH):
            n = start + tl.arange(0, DEPTH)
            inside = n < stop
            row = tl.load(row_ptr + n, mask=inside, other=0).to(tl.int64)[:, None]
            inside = inside[:, None]
            grad = tl.load(grad_at + row * stride_gn, mask=inside & valid_f[None, :], other=0.0)
            x = tl.load(x_at + row * stride_xn, mask=inside & valid_d[None, :], other=0.0)
            acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)
        total += acc * acc
        first = stop
    out_at = out_ptr + (e * F + f)[:, None] * D + d[None, :]
    tl.store(out_at, total, mask=valid_f[:, None] & valid_d[None, :])


def _bias_work(args: Mapping[str, Any]) -> tuple[int, int]:
    names = ("grad", "row", "stop", "offset", "out")
    return size_of(*(args[f"{name}_ptr"] for name in names)), args["grad_ptr"].numel()


@triton.jit(launch_metadata=declares(_bias_work))
def _squared_bias_kernel(
    grad_ptr,  # [N, F]
    row_ptr,  # [N] int32 rows by expert and sample, or None: every row is a sample
    stop_ptr,  # [N] int32: where the sample of each place ends, or None
    offset_ptr,  # [E1] int32, or None: one expert has all rows
    out_ptr,  # [E, F] float32, written once
    N,
    F,
    stride_gn,
    stride_gf,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = f < F
    first, last = _bounds(offset_ptr, e, N)
    grad_at = grad_ptr + (f * stride_gf)[None, :]
    if stop_ptr is None:
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(first, last, ROWS):
            n = start + tl.arange(0, ROWS)
            inside = (n < last)[:, None] & valid[None, :]
            row = n.to(tl.int64)[:, None]
            grad = tl.load(grad_at + row * stride_gn, mask=inside, other=0.0).to(tl.float32)
            acc += grad * grad
        total = tl.sum(acc, axis=0)
    else:
        total = tl.zeros([COLUMNS], tl.float32)
        while first < last:
            stop = tl.load(stop_ptr + first)
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(first, stop, ROWS):
                n = start + tl.arange(0, ROWS)
                row = tl.load(row_ptr + n, mask=n < stop, other=0).to(tl.int64)[:, None]
                inside = (n < stop)[:, None] & valid[None, :]
                acc += tl.load(grad_at + row * stride_gn, mask=inside, other=0.0).to(tl.float32)
            sums = tl.sum(acc, axis=0)
            total += sums * sums
            first = stop
    tl.store(out_ptr + e * F + f, total, mask=valid)


def tile_of(dtype: torch.dtype, samples: bool) -> Tile:
    if not samples:
        return _ROWS
    return _SAMPLES if dtype == torch.float32 else _SAMPLES_HALF


def squared_grad(
    x_ND: Tensor,
    grad_NF: Tensor,
    sample_N: Tensor | None = None,
    offset_E1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """square_EFD, square_bias_EF in float32; offsets are trusted."""
    (N, D), F = x_ND.shape, grad_NF.shape[1]
    E = 1 if offset_E1 is None else offset_E1.numel() - 1
    experts = () if offset_E1 is None else (E,)
    square_EFD = x_ND.new_empty((*experts, F, D), dtype=torch.float32)
    square_bias_EF = x_ND.new_empty((*experts, F), dtype=torch.float32)
    if E == 0 or F == 0:
        return square_EFD, square_bias_EF
    offset_E1 = None if offset_E1 is None else offset_E1.contiguous()
    samples = sample_N is not None
    tile = tile_of(x_ND.dtype, samples)
    if by_element(x_ND) or by_element(grad_NF):
        tile = tile._replace(columns=_ELEMENT_COLUMNS)
    grid = (E * triton.cdiv(F, tile.rows) * triton.cdiv(D, tile.columns),)
    with torch.cuda.device_of(x_ND):
        order = () if sample_N is None else _order(sample_N, offset_E1)
        kernel = _squared_samples_kernel if samples else _squared_rows_kernel
        if grid[0]:
            kernel[grid](
                grad_NF,
                x_ND,
                *order,
                offset_E1,
                square_EFD,
                N,
                F,
                D,
                *grad_NF.stride(),
                *x_ND.stride(),
                PRECISION=precision(x_ND.dtype if samples else torch.float32),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                DEPTH=tile.depth,
                **tile.options,
            )
        _squared_bias_kernel[(E, triton.cdiv(F, _BIAS_COLUMNS))](
            grad_NF,
            *(order or (None, None)),
            offset_E1,
            square_bias_EF,
            N,
            F,
            *grad_NF.stride(),
            ROWS=_BIAS_ROWS,
            COLUMNS=_BIAS_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return square_EFD, square_bias_EF
