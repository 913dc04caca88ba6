"""Memory that is kept between calls: large gradients, and the CPU kernels' scratch.

The gradient of a mixture of experts is hundreds of megabytes: to map, zero and unmap it page by
page at every step costs more than the arithmetic. `take` gives out the memory of a gradient that
nobody holds any more (`zero_grad(set_to_none=True)`, torch's default, lets go of it), else new
memory. Within `fused_grad_accumulation()` later micro-batches add to the first one's gradient and
make none of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from gose_kernels import native

_SMALLEST = 4 << 20  # bytes; the allocator keeps smaller blocks by itself
_MOST_IDLE = 4  # blocks of other sizes that may lie idle

_blocks: list[Tensor] = []
_lock = threading.Lock()


_fusing = 0  # contexts that are entered


class Held(NamedTuple):
    """Bytes kept between calls."""

    gradients: int
    scratch: int


def _idle(block: Tensor) -> bool:
    # The block itself and the storage object made here; every gradient on it is one more.
    return torch._C._storage_Use_Count(block.untyped_storage()._cdata) <= 2


def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous CPU tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    with _lock, torch.no_grad():
        block = next((b for b in _blocks if b.numel() == size and _idle(b)), None)
        if block is None:
            idle = {id(b) for b in [b for b in _blocks if _idle(b)][_MOST_IDLE:]}
            _blocks[:] = [b for b in _blocks if id(b) not in idle]
            block = torch.empty(size, dtype=torch.uint8)
            _blocks.append(block)
        return block.view(dtype).view(shape)


@contextmanager
def fused_grad_accumulation() -> Iterator[None]:
    """Within it, `backward()` adds the gradients of expert weights to their `.grad` in the kernel
    that makes them, with one rounding: no second gradient is made, experts without tokens and what
    is frozen are neither read nor written.

        for batch in micro_batches:
            with gk.memory.fused_grad_accumulation():
                loss(batch).backward()

    Without a `.grad` (the first micro-batch), with hooks on the weights, with
    create_graph=True or under torch.compile gradients take their usual way. For `backward()` alone:
    a call of `torch.autograd.grad` within it would change `.grad` and find no gradient. Holds for
    every thread of the process. The name and idea are Megatron-LM's gradient accumulation fusion.
    """
    global _fusing
    with _lock:
        _fusing += 1
    try:
        yield
    finally:
        with _lock:
            _fusing -= 1


def gradients_to_add_to(
    weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None] | None:
    """`.grad` of every weight that needs a gradient; None if one of them must have its own."""
    if not _fusing or torch.is_grad_enabled() or not any(needed):
        return None
    found: list[Tensor | None] = []
    for w, need in zip(weights, needed, strict=True):
        grad = w.grad if need and w.is_leaf else None
        hooks = w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None)
        if need and (
            grad is None
            or hooks
            or (grad.dtype, grad.shape) != (w.dtype, w.shape)
            or not grad.is_contiguous()
            or type(grad) is not Tensor
        ):
            return None
        found.append(grad)
    return found


def held() -> Held:
    """What is kept now, whether in use or idle."""
    loaded = native.why_not() is None
    scratch = int(torch.ops.gose_native.scratch_bytes()) if loaded else 0
    return Held(sum(block.numel() for block in _blocks), scratch)


def release() -> None:
    """Give idle memory back to the system; what is in use goes when it is let go of."""
    with _lock:
        _blocks.clear()
    if native.why_not() is None:
        torch.ops.gose_native.release_scratch()
