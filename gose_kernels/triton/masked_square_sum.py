"""masked_square_sum on a GPU: a launch per tensor, whose programs write their sums, and a last one
that adds up those of every tensor.

Letters: P elements in U units of INNER (elements that share a mask value; one unit without a mask).
The contract is in ops/masked_square_sum.py. Frozen units are not loaded, nor are vectors of frozen
elements. Every sum has one order; squares of float32 are exact in float64, so contraction changes
no bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import BYTES_PER_LOAD, declares, size_of, threads_per_warp
from gose_kernels.triton.masks import NONE, SCORES, is_frozen, units_of

_ELEMENTS = 4096  # of a program
_PASSES = (
    2  # over them where each has a mask value: ptxas reserves stack for one pass, and for four
)
_PARTS = 128  # sums that are added side by side
_WARPS = 4  # not to be tuned: the order of a sum depends on it


def _square_work(args: Mapping[str, Any]) -> tuple[int, int]:
    """As if all were live: what is frozen is known on the device alone."""
    P = args["U"] * args["INNER"]
    mask = size_of(args["frozen_ptr"]) if args["KIND"] != NONE.value else 0
    passes = args["PASSES"] if args["ELEMENTS"] else 1
    parts = -(-P // (passes * args["ROWS"] * args["COLUMNS"]))
    return P * args["grad_ptr"].element_size() + mask + 8 * (parts + 1), 2 * P


@triton.jit(
    launch_metadata=declares(_square_work, "part_ptr"), do_not_specialize=("tensor", "first")
)
def _square_kernel(
    grad_ptr,  # [U, INNER]
    frozen_ptr,  # by KIND: a byte, a bit or a score of each unit; or anything
    part_ptr,  # float64 [parts of all tensors]: from `first` on, one of each program
    end_ptr,  # int64 [tensors] where the parts of a tensor end
    U,
    INNER,
    threshold,
    tensor,
    first,
    KIND: tl.constexpr,
    ELEMENTS: tl.constexpr,  # every element is a unit
    PASSES: tl.constexpr,  # of ROWS vectors of elements
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if ELEMENTS:  # vectors along the columns: they are loaded where any of their elements is live
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for step in range(PASSES):
            row = ((program * PASSES + step) * ROWS + tl.arange(0, ROWS))[:, None]
            at = row * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = at < INNER
            live = is_frozen(frozen_ptr, at, inside, threshold, KIND) == 0
            moved = inside & (tl.max(live.to(tl.int32), axis=1)[:, None] > 0)
            x = tl.load(grad_ptr + at, mask=moved, other=0.0).to(tl.float64)
            total += tl.where(live, x * x, 0.0)
        part = tl.sum(total)
    else:
        across = tl.cdiv(INNER, COLUMNS)
        unit = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
        column = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        live = is_frozen(frozen_ptr, unit, unit < U, threshold, KIND) == 0
        live = live & (column < INNER)
        x = tl.load(grad_ptr + unit * INNER + column, mask=live, other=0.0).to(tl.float64)
        part = tl.sum(x * x)
    tl.store(part_ptr + first + program, part)
    if tl.program_id(0) == 0:
        tl.store(end_ptr + tensor, first + tl.num_programs(0).to(tl.int64))


def _total_work(args: Mapping[str, Any]) -> tuple[int, int]:
    parts = args["part_ptr"]
    return size_of(parts, args["end_ptr"], args["out_ptr"]), parts.numel()


@triton.jit(launch_metadata=declares(_total_work, "part_ptr"))
def _total_kernel(
    part_ptr,  # float64 [parts of all tensors]
    end_ptr,  # int64 [tensors]
    out_ptr,  # float64 [tensors]
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    first = tl.load(end_ptr + n - 1, mask=n > 0, other=0)
    end = tl.load(end_ptr + n)
    total = tl.zeros([BLOCK], tl.float64)
    while first < end:
        at = first + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + at, mask=at < end, other=0.0)
        first += BLOCK
    tl.store(out_ptr + n, tl.sum(total))


class _Entry:
    """A tensor of the list as the kernel sees it."""

    def __init__(self, grad: Tensor, frozen: Tensor | None) -> None:
        self.grad, numel = grad.contiguous(), grad.numel()
        self.mask, units, self.kind = units_of(frozen, grad)
        self.elements = units == numel > 0 and self.kind != NONE.value
        if self.elements:
            self.sizes, columns = (1, numel), BYTES_PER_LOAD // grad.element_size()
            if self.kind == SCORES.value:
                columns = BYTES_PER_LOAD // 4
            self.tile = (_ELEMENTS // _PASSES // columns, columns)
            self.programs = triton.cdiv(numel, _ELEMENTS)
        else:
            self.sizes = (units, numel // units) if numel > 0 else (0, 1)
            self.tile = _tile(*self.sizes, grad.element_size())
            tiles = (triton.cdiv(n, own) for n, own in zip(self.sizes, self.tile, strict=True))
            self.programs = max(1, math.prod(tiles))  # without elements one that writes 0


def _tile(units: int, inner: int, item_bytes: int) -> tuple[int, int]:
    """Units and columns of a program: 16 bytes a thread of a unit, then units, then columns."""
    units, inner = (triton.next_power_of_2(max(1, n)) for n in (units, inner))
    loaded = _WARPS * threads_per_warp() * BYTES_PER_LOAD // item_bytes
    rows = min(units, _ELEMENTS // min(inner, loaded))
    return rows, min(inner, _ELEMENTS // rows)


def masked_square_sum(
    grad: Sequence[Tensor], frozen: Sequence[Tensor], *, threshold: Sequence[float] = ()
) -> Tensor:
    """The sum of every tensor."""
    entries = [_Entry(g, frozen[n] if frozen else None) for n, g in enumerate(grad)]
    part = grad[0].new_empty(sum(e.programs for e in entries), dtype=torch.float64)
    end = grad[0].new_empty(len(entries), dtype=torch.int64)
    out = torch.empty_like(end, dtype=torch.float64)
    first = 0
    with torch.cuda.device_of(grad[0]):
        for n, e in enumerate(entries):
            _square_kernel[(e.programs,)](
                e.grad,
                e.grad if e.mask is None else e.mask,
                part,
                end,
                *e.sizes,
                float(threshold[n]) if threshold else 0.0,
                n,
                first,
                KIND=e.kind,
                ELEMENTS=e.elements,
                PASSES=_PASSES,
                ROWS=e.tile[0],
                COLUMNS=e.tile[1],
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
            first += e.programs
        _total_kernel[(len(entries),)](
            part, end, out, BLOCK=_PARTS, num_warps=_WARPS, enable_fp_fusion=True
        )
    return out
