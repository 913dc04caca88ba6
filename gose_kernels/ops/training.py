"""Ops that become other ops where a gradient is needed.

A fused op saves nothing for a backward. `register_training(op, graph)` makes autograd run `graph`
in its place: the same outputs from differentiable ops. Without a gradient the fused op runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gose_kernels.registry import Op

_LIBRARY = torch.library.Library("gose", "FRAGMENT")


def register_training(op: Op, graph: Callable[..., Any]) -> None:
    """Run graph(*positional, **options) instead of `op` where an argument requires a gradient."""

    def autograd(keys: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return graph(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            below = keys & torch._C._after_autograd_keyset
            return op.overload.redispatch(below, *args, **options)

    _LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)
