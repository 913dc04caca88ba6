"""masked_square_sum: sums of squares of gradients without their frozen elements, for norms.

    out[n] = sum of grad[n][i]**2 over the elements i that are not frozen

grad       list of float32 | bfloat16 | float64 tensors of one dtype, any strides
frozen     a mask per gradient, or an empty list; masks and threshold as in masked_update
returns    float64 [len(grad)], summed in float64: no overflow, the same bits for any number of
           threads. A NaN of a live element spreads, one of a frozen element does not.
Frozen rows and blocks are not read. cuda and triton wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gose_kernels import masks
from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register

_DTYPES = (torch.float32, torch.bfloat16)


def _check(grad: Sequence[Tensor], frozen: Sequence[Tensor], threshold: Sequence[float]) -> None:
    name = "masked_square_sum"
    if len(frozen) not in (0, len(grad)):
        raise ValueError(f"{name}: frozen must have {len(grad)} tensors, got {len(frozen)}")
    masks.check_thresholds(name, frozen, threshold, len(grad))
    masks.check_dtype(name, "grad", grad)
    for n, mask in enumerate(frozen):
        masks.check_mask(f"{name}: frozen[{n}]", mask, f"grad[{n}]", grad[n].shape)


def masked_square_sum_reference(
    grad: Sequence[Tensor], frozen: Sequence[Tensor], *, threshold: Sequence[float] = ()
) -> Tensor:
    _check(grad, frozen, threshold)
    sums = []
    for n, g in enumerate(grad):
        wide = g.double()
        if frozen:
            limit = threshold[n] if threshold else 0.0
            wide = torch.where(masks.as_bool(frozen[n], limit, g.shape), 0.0, wide)
        sums.append(wide.square().sum())
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _fake(
    grad: Sequence[Tensor],
    frozen: Sequence[Tensor],
    *,
    threshold: Sequence[float] = (),
    backend: str | None = None,
) -> Tensor:
    _check(grad, frozen, threshold)
    return (grad[0] if grad else torch.empty(0)).new_empty(len(grad), dtype=torch.float64)


def _unless(grad: Sequence[Tensor], *_args: object, **_options: object) -> str | None:
    return None if len(grad) > 0 else "takes at least one tensor, got none"


def _cost(grad: Sequence[Tensor], frozen: Sequence[Tensor], **_options: object) -> Cost:
    elements = sum(g.numel() for g in grad)
    moved = sum(t.numel() * t.element_size() for t in (*grad, *frozen))
    return Cost(elements, moved + 8 * len(grad), 2 * elements)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    return [torch.ones(4, 8, device=device, dtype=dtype)], [
        torch.zeros(4, 1, device=device, dtype=torch.bool)
    ]


masked_square_sum = register(
    "masked_square_sum(Tensor[] grad, Tensor[] frozen, *, float[] threshold=[], "
    "str? backend=None) -> Tensor",
    native("cuda", "masked_square_sum", *_DTYPES, unless=_unless),
    triton("masked_square_sum", "masked_square_sum", *_DTYPES, check=_check, unless=_unless),
    native("cpu", "masked_square_sum", *_DTYPES, unless=_unless),
    reference(masked_square_sum_reference),
    fake=_fake,
    cost=_cost,
    example=_example,
)
