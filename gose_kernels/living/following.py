"""What an optimizer keeps of a parameter with a row per expert: it follows the rows."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from gose_kernels.optim import MaskedOptimizer


def carry(optimizer: Optimizer | None, p: Tensor, values: Tensor, source: list[int]) -> None:
    """The state of row i is what that of row source[i] was, none for -1; `values`: p's new ones.

    Of another than gk.optim.Masked*, state of the parameter's shape moves and the rest stays.
    """
    if isinstance(optimizer, MaskedOptimizer):
        if optimizer.has(p):
            optimizer.rearrange(p, values, source)
    elif optimizer is not None:
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                optimizer.state[p][name] = rows_from(value, source)


def rows_from(tensor: Tensor, source: list[int]) -> Tensor:
    """Row i of row source[i], zeros for -1."""
    values = tensor.new_zeros(len(source), *tensor.shape[1:])
    for into, of in enumerate(source):
        if of >= 0:
            values[into] = tensor[of]
    return values


def freeze_rows(optimizer: MaskedOptimizer, p: Tensor, frozen_E: Tensor) -> None:
    """These rows of a parameter that the optimizer has, and no others, frozen."""
    if not optimizer.has(p):
        return
    frozen = frozen_E.view(-1, *[1] * (p.dim() - 1))
    before = optimizer.frozen.get(p)
    if before is None or before.shape != frozen.shape or not before.equal(frozen):
        optimizer.set_frozen(p, frozen)
