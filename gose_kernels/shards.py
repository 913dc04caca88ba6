"""Parameters that are DTensors (FSDP2), as the optimizers see them: one rank's piece.

A tensor that is no DTensor is its own piece. Masks and the indices of elements are those of the
whole tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gose_kernels import masks
from gose_kernels.masks import Importance

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _dtensor(t: Tensor) -> DTensor | None:
    if type(t) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return t if isinstance(t, DTensor) else None


def local(t: Tensor) -> Tensor:
    """This rank's piece, sharing its memory."""
    whole_t = _dtensor(t)
    return t if whole_t is None else whole_t.to_local()


def whole(t: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks."""
    whole_t = _dtensor(t)
    return t if whole_t is None else whole_t.full_tensor()


def layout(t: Tensor) -> tuple[object, ...]:
    """Mesh and placements; () for a tensor that is no DTensor."""
    whole_t = _dtensor(t)
    return () if whole_t is None else (whole_t.device_mesh, whole_t.placements)


def local_grad(param: Tensor) -> Tensor:
    """This rank's piece of the gradient, cut as the parameter is."""
    assert param.grad is not None
    whole_p, grad = _dtensor(param), _dtensor(param.grad)
    if whole_p is None or grad is None:
        return local(param.grad)
    return grad.redistribute(whole_p.device_mesh, whole_p.placements).to_local()


def _cut_dims(t: DTensor) -> list[tuple[int, int, int]]:
    """(dimension, this rank's first index, its size) of every dimension that is sharded."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    dims = sorted({p.dim for p in t.placements if isinstance(p, Shard)})
    return [(dim, offsets[dim], sizes[dim]) for dim in dims]


def first_element(param: Tensor) -> int:
    """Index of this rank's first element in the whole tensor.

    Raises ValueError where its elements are no run of the whole: sharded over a later dimension.
    """
    whole_p = _dtensor(param)
    if whole_p is None:
        return 0
    out = 0
    for dim, offset, _ in _cut_dims(whole_p):
        if dim != 0:
            raise ValueError(
                "bfloat16='stochastic' needs parameters sharded over dimension 0, got "
                f"placements {whole_p.placements}"
            )
        out += offset * math.prod(whole_p.shape[1:])
    return out


def cut(argument: str, param: Tensor, mask: Tensor | Importance) -> Tensor | Importance:
    """The part of a mask of the whole tensor (or of a DTensor like param) that is this rank's.

    Sharded dimensions come out with a value per index. Raises ValueError where that would need a
    copy of scores, which must stay those of the caller.
    """
    whole_p = _dtensor(param)
    if whole_p is None:
        return mask
    values = mask.score if isinstance(mask, Importance) else mask
    if (whole_mask := _dtensor(values)) is not None:
        if whole_mask.placements != whole_p.placements:
            raise ValueError(
                f"{argument} must have the placements of the parameter {whole_p.placements}, "
                f"got {whole_mask.placements}"
            )
        values = whole_mask.to_local()
    else:
        masks.check_divides(argument, values, "the parameter", whole_p.shape)
        values = values.reshape((1,) * (whole_p.dim() - values.dim()) + tuple(values.shape))
        for dim, offset, size in _cut_dims(whole_p):
            if values.shape[dim] != whole_p.shape[dim]:
                if isinstance(mask, Importance):
                    raise ValueError(
                        f"{argument} must have scores for every index of the sharded dimension "
                        f"{dim}, got shape {tuple(values.shape)}"
                    )
                shape = list(values.shape)
                shape[dim] = whole_p.shape[dim]
                values = masks.spread(values, shape)
            values = values.narrow(dim, offset, size)
    if isinstance(mask, Importance):
        return Importance(values, mask.threshold)
    return values


def like(param: Tensor, piece: Tensor) -> Tensor:
    """A DTensor of pieces that are cut as the parameter is, where that is one."""
    whole_p = _dtensor(param)
    if whole_p is None:
        return piece
    from torch.distributed.tensor import DTensor

    shape = list(piece.shape)
    for dim, _, _ in _cut_dims(whole_p):
        shape[dim] = whole_p.shape[dim]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        piece,
        whole_p.device_mesh,
        whole_p.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def sum_over(param: Tensor, value: Tensor) -> Tensor:
    """The sum of every rank's value over the dimensions of the mesh that shard the parameter."""
    whole_p = _dtensor(param)
    if whole_p is not None:
        for mesh_dim, placement in enumerate(whole_p.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=whole_p.device_mesh.get_group(mesh_dim))
    return value
