"""Frozen masks on a GPU: what masks say of units, the elements that share a mask value."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels import masks

# Kinds, as constants of a kernel.
NONE, BYTES, BITS, SCORES = (tl.constexpr(n) for n in range(4))
_KINDS = {torch.bool: BYTES.value, torch.uint8: BITS.value, torch.float32: SCORES.value}


@triton.jit
def is_frozen(frozen_ptr, unit, inside, threshold, KIND: tl.constexpr):
    """What masks say of units; outside: frozen."""
    if KIND == NONE:
        frozen = unit < 0
    elif KIND == BYTES:
        frozen = tl.load(frozen_ptr + unit, mask=inside, other=1) != 0
    elif KIND == BITS:
        byte = tl.load(frozen_ptr + (unit >> 3), mask=inside, other=255).to(tl.int32)
        frozen = ((byte >> (unit & 7).to(tl.int32)) & 1) != 0
    else:
        frozen = tl.load(frozen_ptr + unit, mask=inside, other=0.0) >= threshold
    return frozen | (inside == 0)


def units_of(frozen: Tensor | None, tensor: Tensor) -> tuple[Tensor | None, int, int]:
    """The mask with a value per unit, the number of units, the kind."""
    if frozen is None:
        return None, 1, NONE.value
    kind = _KINDS[frozen.dtype]
    if frozen.dtype == torch.uint8:
        return frozen.contiguous(), tensor.numel(), kind
    own = masks.unit_shape(frozen.shape, tensor.shape)
    return masks.spread(frozen, own).contiguous(), math.prod(own), kind
