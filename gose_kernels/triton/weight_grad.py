"""Gradients of expert weights and biases: one program per expert and tile of its matrix, which sums
the expert's rows in order. What is frozen is written as 0 and costs no product. Where a gradient is
added to what is there, what is frozen and experts without rows are neither read nor written.

Letters: N rows sorted by expert, E experts, E1 = E+1, A x B a weight matrix, U hidden units of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import declares, size_of
from gose_kernels.triton.tiles import Tile, ahead, by_element, piece_of_rows, precision

_HALF, _SINGLE = Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 4, 3)
_BIAS_ROWS, _BIAS_COLUMNS = 32, 128

Side = Literal["", "left", "right"]
LEFT: Side = "left"
RIGHT: Side = "right"


class Frozen(NamedTuple):
    """Experts, and hidden units of them, whose gradient is 0."""

    experts_E: Tensor | None = None  # bool
    units_EU: Tensor | None = None  # bool
    pairs: bool = False  # two neighbours belong to a unit, else u and u + U do

    def arguments(self, units: bool) -> dict[str, Any]:
        units_EU = self.units_EU if units else None
        return {
            "frozen_ptr": None if self.experts_E is None else _bytes(self.experts_E),
            "unit_ptr": None if units_EU is None else _bytes(units_EU),
            "U": 1 if units_EU is None else max(1, units_EU.shape[1]),
            "FROZEN": self.experts_E is not None,
            "PAIRS": self.pairs,
        }


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


@triton.jit
def _live_units(unit_ptr, e, a, valid, U, PAIRS: tl.constexpr):
    """Which of the elements a belong to a unit that is not frozen."""
    unit = a // 2 if PAIRS else a % U
    return tl.load(unit_ptr + e * U + unit, mask=valid, other=1) == 0


@triton.jit
def _rows_at(at, n, stride, GATHERED: tl.constexpr, TURNED: tl.constexpr):
    """Pointers to the rows n, unless tokens will say which they are."""
    row = n.to(tl.int64) * stride
    return at if GATHERED else at + (row[None, :] if TURNED else row[:, None])


@triton.jit
def _columns(
    at,  # [columns] by [PIECE] pointers to the first rows of this step; to row 0 if GATHERED
    token_ptr,
    n,  # [PIECE] rows
    piece,
    last,
    valid,  # [columns]
    stride,
    GATHERED: tl.constexpr,
    TURNED: tl.constexpr,  # at and what is loaded have columns first
    WHOLE: tl.constexpr,  # all rows and columns are there
):
    """What a product reads of one side."""
    if GATHERED:
        token = tl.load(token_ptr + n) if WHOLE else tl.load(token_ptr + n, mask=n < last, other=0)
        row = token.to(tl.uint32).to(tl.int64) * stride  # of 32 bits without a sign: one multiply
        at = at + (row[None, :] if TURNED else row[:, None])
    else:
        at = ahead(at, piece, stride)
    if WHOLE:
        return tl.load(at)
    inside = n < last
    keep = valid[:, None] & inside[None, :] if TURNED else inside[:, None] & valid[None, :]
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def _product(
    acc,
    left_at,
    right_at,
    token_ptr,
    n,
    piece,
    last,
    valid_a,
    valid_b,
    stride_ln,
    stride_rn,
    GATHER: tl.constexpr,
    WHOLE_A: tl.constexpr,
    WHOLE_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + left^T @ right over the rows n. Loaded turned, so that both sides are copied
    asynchronously as they stand."""
    GATHER_A: tl.constexpr = GATHER == "left"
    GATHER_B: tl.constexpr = GATHER == "right"
    step = (token_ptr, n, piece, last)
    left = _columns(left_at, *step, valid_a, stride_ln, GATHER_A, True, WHOLE_A)
    right = _columns(right_at, *step, valid_b, stride_rn, GATHER_B, False, WHOLE_B)
    return tl.dot(left, right, acc, input_precision=PRECISION)


def _weight_grad_work(args: Mapping[str, Any]) -> tuple[int, int]:
    """Nothing counts as frozen; the rows of both sides, of tokens or not, are read once."""
    left, right, token, out = (args[f"{n}_ptr"] for n in ("left", "right", "token", "out"))
    N = left.shape[0] if token is None else token.numel()
    frozen = size_of(args["frozen_ptr"], args["unit_ptr"])
    written = (2 if args["ADD"] else 1) * size_of(out)
    moved = size_of(left, right, token, args["offset_ptr"]) + written + frozen
    return moved, 2 * N * left.shape[1] * right.shape[1]


@triton.jit(launch_metadata=declares(_weight_grad_work, "left_ptr"))
def _weight_grad_kernel(
    left_ptr,  # [N or tokens, A]
    right_ptr,  # [N or tokens, B]
    token_ptr,  # [N] int32 row of the gathered side, read if GATHER
    offset_ptr,  # [E1] int32
    out_ptr,  # [E, A, B] written once, read before if ADD
    A,
    B,
    stride_ln,
    stride_la,
    stride_rn,
    stride_rb,
    frozen_ptr,  # [E] uint8, read if FROZEN
    unit_ptr,  # [E, U] uint8, read if UNITS
    U,
    FROZEN: tl.constexpr,
    PAIRS: tl.constexpr,
    UNITS: tl.constexpr,  # the side whose elements belong to units, or ""
    GATHER: tl.constexpr,  # "left", "right" or ""
    ADD: tl.constexpr,
    WHOLE_A: tl.constexpr,
    WHOLE_B: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(B, COLUMNS)
    tiles = tl.cdiv(A, ROWS) * across
    e = (tl.program_id(0) // tiles).to(tl.int64)  # int64: weights pass 2**31 elements
    tile = tl.program_id(0) % tiles
    a = tile // across * ROWS + tl.arange(0, ROWS)
    b = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    valid_a, valid_b = a < A, b < B
    first = tl.load(offset_ptr + e)
    last = tl.load(offset_ptr + e + 1)
    if FROZEN:
        last = tl.where(tl.load(frozen_ptr + e) != 0, first, last)
    if UNITS == "left":
        live = _live_units(unit_ptr, e, a, valid_a, U, PAIRS)
        last = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, last, first)
    elif UNITS == "right":
        live = _live_units(unit_ptr, e, b, valid_b, U, PAIRS)
        last = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, last, first)
    if ADD and last <= first:
        return
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    PIECE: tl.constexpr = piece_of_rows(left_ptr.dtype.element_ty.primitive_bitwidth, DEPTH)
    strides, valid = (stride_ln, stride_rn), (valid_a, valid_b)
    left_at = left_ptr + (a * stride_la)[:, None]
    right_at = right_ptr + (b * stride_rb)[None, :]
    whole = first + (last - first) // DEPTH * DEPTH
    r = tl.arange(0, PIECE)
    left_here = _rows_at(left_at, first + r, stride_ln, GATHER == "left", True)
    right_here = _rows_at(right_at, first + r, stride_rn, GATHER == "right", False)
    for start in range(first, whole, DEPTH):
        for piece in tl.static_range(0, DEPTH, PIECE):
            step = (left_here, right_here, token_ptr, start + piece + r, piece, last)
            acc = _product(acc, *step, *valid, *strides, GATHER, WHOLE_A, WHOLE_B, PRECISION)
        if GATHER != "left":
            left_here = ahead(left_here, DEPTH, stride_ln)
        if GATHER != "right":
            right_here = ahead(right_here, DEPTH, stride_rn)
    # The rows that are left, in a loop of few registers: masks would cost some in every step.
    if PIECE > 16:
        r = tl.arange(0, 16)
        left_here = _rows_at(left_at, whole + r, stride_ln, GATHER == "left", True)
        right_here = _rows_at(right_at, whole + r, stride_rn, GATHER == "right", False)
    for piece in tl.range(0, last - whole, 16, num_stages=1):
        step = (left_here, right_here, token_ptr, whole + piece + r, piece, last)
        acc = _product(acc, *step, *valid, *strides, GATHER, False, False, PRECISION)
    # Loaded behind a barrier, or it would fill registers in every step.
    tl.debug_barrier()
    if UNITS == "left":
        live = _live_units(unit_ptr, e, a, valid_a, U, PAIRS)
    elif UNITS == "right":
        live = _live_units(unit_ptr, e, b, valid_b, U, PAIRS)
    out_at = out_ptr + (e * A + a)[:, None] * B + b[None, :]
    keep = valid_a[:, None] & valid_b[None, :]
    if ADD:
        if UNITS == "left":
            keep &= live[:, None]
        elif UNITS == "right":
            keep &= live[None, :]
        acc += tl.load(out_at, mask=keep, other=0.0).to(tl.float32)
    # Selected, not multiplied: what is frozen may be NaN.
    elif UNITS == "left":
        acc = tl.where(live[:, None], acc, 0.0)
    elif UNITS == "right":
        acc = tl.where(live[None, :], acc, 0.0)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=keep)


def _bias_grad_work(args: Mapping[str, Any]) -> tuple[int, int]:
    names = ("grad", "weight", "token", "offset", "out", "frozen", "unit")
    grad, weight, token, *_ = given = [args[f"{name}_ptr"] for name in names]
    N = grad.shape[0] if token is None else token.numel()
    return size_of(*given), N * grad.shape[1] * (1 if weight is None else 2)


@triton.jit(launch_metadata=declares(_bias_grad_work))
def _bias_grad_kernel(
    grad_ptr,  # [N or tokens, A]
    weight_ptr,  # [N] float32, read if WEIGHTED
    token_ptr,  # [N] int32 row of grad, read if GATHER
    offset_ptr,  # [E1] int32
    out_ptr,  # [E, A] written once
    A,
    stride_gn,
    stride_ga,
    frozen_ptr,  # [E] uint8, read if FROZEN
    unit_ptr,  # [E, U] uint8, read if UNITS
    U,
    FROZEN: tl.constexpr,
    PAIRS: tl.constexpr,
    UNITS: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = a < A
    first = tl.load(offset_ptr + e)
    last = tl.load(offset_ptr + e + 1)
    if FROZEN:
        last = tl.where(tl.load(frozen_ptr + e) != 0, first, last)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        n = start + tl.arange(0, ROWS)
        inside = n < last
        row = n.to(tl.int64)
        if GATHER:
            row = tl.load(token_ptr + n, mask=inside, other=0).to(tl.int64)
        grad = tl.load(
            grad_ptr + (row * stride_gn)[:, None] + (a * stride_ga)[None, :],
            mask=inside[:, None] & valid[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            grad = tl.load(weight_ptr + n, mask=inside, other=0.0)[:, None] * grad
        acc += grad
    total = tl.sum(acc, axis=0)
    if UNITS:
        total = tl.where(_live_units(unit_ptr, e, a, valid, U, PAIRS), total, 0.0)
    tl.store(out_ptr + e * A + a, total.to(out_ptr.dtype.element_ty), mask=valid)


def tile_of(dtype: torch.dtype) -> Tile:
    return _SINGLE if dtype == torch.float32 else _HALF


def tile_for(left: Tensor, right: Tensor) -> Tile:
    """Of what is accessed by the element fewer columns: an address each must fit the registers."""
    tile = tile_of(left.dtype)
    if by_element(left) or by_element(right):
        return tile._replace(columns=tile.columns // 2)
    return tile


def weight_grad(
    left: Tensor,
    right: Tensor,
    offset_E1: Tensor,
    *,
    token_N: Tensor | None = None,
    gather: Side = "",
    frozen: Frozen | None = None,
    units: Side = "",
    into: Tensor | None = None,
) -> Tensor:
    """[E, A, B]: left^T @ right over the rows of every expert; the gathered side has tokens. Added
    to a contiguous `into`, which is then returned."""
    E, A, B = offset_E1.numel() - 1, left.shape[1], right.shape[1]
    out_EAB = left.new_empty(E, A, B) if into is None else into
    tile = tile_for(left, right)
    grid = (E * triton.cdiv(A, tile.rows) * triton.cdiv(B, tile.columns),)
    frozen = frozen or Frozen()
    if grid[0]:
        with torch.cuda.device_of(left):
            _weight_grad_kernel[grid](
                left,
                right,
                token_N,
                offset_E1.contiguous(),
                out_EAB,
                A,
                B,
                *left.stride(),
                *right.stride(),
                **frozen.arguments(units != ""),
                UNITS=units if frozen.units_EU is not None else "",
                GATHER=gather,
                ADD=into is not None,
                WHOLE_A=A % tile.rows == 0,
                WHOLE_B=B % tile.columns == 0,
                PRECISION=precision(left.dtype),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                DEPTH=tile.depth,
                **tile.options,
            )
    return out_EAB


def bias_grad(
    grad: Tensor,
    offset_E1: Tensor,
    *,
    token_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    frozen: Frozen | None = None,
    units: bool = False,
) -> Tensor:
    """[E, A]: the sum of every expert's rows of grad, of its tokens' rows if those are given."""
    E, A = offset_E1.numel() - 1, grad.shape[1]
    out_EA = grad.new_empty(E, A)
    frozen = frozen or Frozen()
    if out_EA.numel():
        with torch.cuda.device_of(grad):
            _bias_grad_kernel[(E, triton.cdiv(A, _BIAS_COLUMNS))](
                grad,
                weight_N,
                token_N,
                offset_E1.contiguous(),
                out_EA,
                A,
                *grad.stride(),
                **frozen.arguments(units),
                UNITS=units and frozen.units_EU is not None,
                GATHER=token_N is not None,
                WEIGHTED=weight_N is not None,
                ROWS=_BIAS_ROWS,
                COLUMNS=_BIAS_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out_EA
