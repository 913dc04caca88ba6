"""expert_mlp_backward_add_ and grouped_gemm_backward_add_: weight gradients added to what is there.

    expert_mlp_backward_add_:    grad_up += d up, grad_down += d down
    grouped_gemm_backward_add_:  grad_w += d w

Arguments as of expert_mlp_backward and grouped_gemm_backward, then the gradients that are added
to: contiguous, in shape, layout and dtype of the weights; None where one is not wanted. Returned
are the other gradients. In the kernels a sum is rounded once, with what was there; gradients of
experts without rows and of what is frozen keep their bits. Autograd runs these within
`memory.fused_grad_accumulation()`. They have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gose_kernels.backends import native, reference, triton
from gose_kernels.ops import expert_mlp as mlp
from gose_kernels.ops import grouped_gemm as gemm
from gose_kernels.ops.mlp_call import (
    BackwardCall,
    MlpCall,
    bind_backward,
    check_backward,
    empty_gradients,
)
from gose_kernels.packing import DTYPES
from gose_kernels.registry import Cost, register


def _check_into(op: str, name: str, into: Tensor | None, shape: Any, dtype: torch.dtype) -> None:
    if into is None:
        return
    if tuple(into.shape) != tuple(shape) or into.dtype != dtype or not into.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, {dtype} of shape {tuple(shape)}, got {into.dtype} "
            f"of shape {tuple(into.shape)}, strides {into.stride()}"
        )


def _mlp_call(
    *args: Any, **options: Any
) -> tuple[MlpCall, BackwardCall, Tensor | None, Tensor | None]:
    grad_up, grad_down = args[11:13]
    needs = {"need_up": grad_up is not None, "need_down": grad_down is not None}
    call, back = bind_backward(args[:11], {**options, **needs})
    check_backward(call, back)
    op, dtype = "expert_mlp_backward_add_", call.x_TD.dtype
    _check_into(op, "grad_up", grad_up, call.w_up_EHD.shape, dtype)
    _check_into(op, "grad_down", grad_down, call.w_down_EDF.shape, dtype)
    return call, back, grad_up, grad_down


def expert_mlp_backward_add_reference_(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call, back, grad_up, grad_down = _mlp_call(*args, **options)
    others = {name: value for name, value in back._asdict().items() if name not in back._fields[:2]}
    of_call = {name: getattr(call, name) for name in call._fields[9:]}
    x, weight, up, down, *biases = mlp.expert_mlp_backward_reference(
        *args[:11], **of_call, **others
    )
    for into, made in ((grad_up, up), (grad_down, down)):
        if into is not None:
            into += made
    return x, weight, *biases


def _cpu_mlp(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call, back, grad_up, grad_down = _mlp_call(*args, **options)
    return mlp.native_backward(call, back, grad_up, grad_down, add=True)


def _mlp_fake(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    call, back, *_ = _mlp_call(*args, **options)
    x, weight, _, _, *biases = empty_gradients(call, back)
    return x, weight, *biases


def _mlp_cost(*args: Any, **options: Any) -> Cost:
    """Every slot used, nothing frozen."""
    into = args[11:13]
    needs = {"need_up": into[0] is not None, "need_down": into[1] is not None}
    made = mlp.backward_cost(*args[:11], **options, **needs)
    read = sum(t.numel() * t.element_size() for t in into if t is not None)
    return made._replace(bytes=made.bytes + read)


def _mlp_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    args = mlp.backward_example(device, dtype)
    up, down = args[3:5]
    assert up is not None and down is not None
    return *args, torch.ones_like(up), torch.ones_like(down)


def _check_gemm(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    grad_w: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> None:
    gemm.check_backward(grad_NF, x_ND, offset_E1)
    D, F = x_ND.shape[1], grad_NF.shape[1]
    shape = (offset_E1.numel() - 1, *((D, F) if transposed else (F, D)))
    _check_into("grouped_gemm_backward_add_", "grad_w", grad_w, shape, x_ND.dtype)


def grouped_gemm_backward_add_reference_(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    grad_w: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> Tensor:
    """The gradient of the bias, [0] without one."""
    _check_gemm(grad_NF, x_ND, offset_E1, grad_w, transposed=transposed)
    made, grad_bias_EF = gemm.grouped_gemm_backward_reference(
        grad_NF, x_ND, offset_E1, transposed=transposed, bias=bias
    )
    grad_w += made
    return grad_bias_EF


def _cpu_gemm(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    grad_w: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> Tensor:
    _check_gemm(grad_NF, x_ND, offset_E1, grad_w, transposed=transposed)
    grad_bias_EF: Tensor = torch.ops.gose_native.grouped_gemm_backward(
        grad_NF, x_ND, offset_E1, grad_w, transposed, bias, True
    )
    return grad_bias_EF


def _gemm_fake(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    grad_w: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
    backend: str | None = None,
) -> Tensor:
    _check_gemm(grad_NF, x_ND, offset_E1, grad_w, transposed=transposed)
    return x_ND.new_empty((offset_E1.numel() - 1, grad_NF.shape[1]) if bias else (0,))


def _gemm_cost(*args: Any, **options: Any) -> Cost:
    """Every row used; the gradient of every group is read and written."""
    made = gemm.backward_cost(*args[:3], **options)
    return made._replace(bytes=made.bytes + args[3].numel() * args[3].element_size())


def _gemm_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    grad_NF, x_ND, offset_E1 = gemm.backward_example(device, dtype)
    into = x_ND.new_ones(offset_E1.numel() - 1, grad_NF.shape[1], x_ND.shape[1])
    return grad_NF, x_ND, offset_E1, into


expert_mlp_backward_add_ = register(
    f"expert_mlp_backward_add_({mlp.TENSORS.format(none='')}, Tensor pre_NH, Tensor grad_TD, "
    f"Tensor(a!)? grad_up, Tensor(b!)? grad_down, *, {mlp.OPTIONS}, bool need_x=True, "
    "bool need_weight=True, bool need_bias_up=False, bool need_bias_down=False, "
    "str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    triton(
        "expert_mlp_backward",
        "expert_mlp_backward_add_",
        *DTYPES,
        bind=_mlp_call,
        writes=(11, 12),
    ),
    native("cpu", _cpu_mlp, *DTYPES, writes=(11, 12)),
    reference(expert_mlp_backward_add_reference_),
    fake=_mlp_fake,
    cost=_mlp_cost,
    example=_mlp_example,
)

grouped_gemm_backward_add_ = register(
    "grouped_gemm_backward_add_(Tensor grad_NF, Tensor x_ND, Tensor offset_E1, "
    "Tensor(a!) grad_w, *, bool transposed=False, bool bias=False, str? backend=None) -> Tensor",
    triton(
        "grouped_gemm",
        "grouped_gemm_backward_add_",
        *DTYPES,
        check=_check_gemm,
        writes=(3,),
    ),
    native("cpu", _cpu_gemm, *DTYPES, writes=(3,)),
    reference(grouped_gemm_backward_add_reference_),
    fake=_gemm_fake,
    cost=_gemm_cost,
    example=_gemm_example,
)
