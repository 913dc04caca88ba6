"""grouped_gemm: one matrix product per group of consecutive rows, each with its own weights.

    for e, n in [offset[e], offset[e+1]), f:
        y[n, f] = sum_d x[n, d] * w[e, f, d] + bias[e, f]
    for n >= offset[E], f:  y[n, f] = 0            (those rows of x are not read: NaN may lie there)

x_ND       float32 | bfloat16 | float16 | float64   rows sorted by group, any strides
w_EFD      dtype of x, any strides; with transposed=True it is w_EDF, read as w[e, d, f]
offset_E1  int32, offset[0] = 0, ascending, offset[E] <= N: what `dispatch` returns; anything else
           raises on torch and cpu, is trusted on cuda and triton (a check would sync)
bias_EF    dtype of x, or None
returns    y_NF, dtype of x. Sums in float32 (float64 for float64), bias included, rounded once.
An empty group reads nothing. N, E, D and F may be 0; a sum over D = 0 is 0.
Differentiable in x, w and bias, twice. Gradient rows of x from offset[E] on and weight gradients of
empty groups are exactly 0.

grouped_gemm_backward: gradients of the weights (shape and layout of w) and of the bias.

    for e, f, d:  grad_w[e, f, d]  = sum_{n in group e} grad[n, f] * x[n, d]
    for e, f:     grad_bias[e, f]  = sum_{n in group e} grad[n, f]       (shape [0] with bias=False)

The gradient of x is `grouped_gemm` of the output gradient with `transposed` flipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gose_kernels import memory
from gose_kernels.backends import native, reference, triton
from gose_kernels.packing import DTYPES, packed_matrix, path_of
from gose_kernels.registry import Cost, register


def _check_offset(name: str, offset_E1: Tensor) -> None:
    if offset_E1.dim() != 1 or offset_E1.numel() < 1 or offset_E1.dtype != torch.int32:
        raise ValueError(
            f"{name}: offset_E1 must be int32 of shape [E + 1], "
            f"got {offset_E1.dtype} of shape {tuple(offset_E1.shape)}"
        )


def _check(
    x_ND: Tensor, w_EFD: Tensor, offset_E1: Tensor, bias_EF: Tensor | None, transposed: bool
) -> tuple[int, int]:
    """(E, F) of a call whose shapes and dtypes fit together."""
    name = "grouped_gemm"
    if x_ND.dim() != 2:
        raise ValueError(f"{name}: x_ND must have 2 dimensions, got shape {tuple(x_ND.shape)}")
    layout = "w_EDF" if transposed else "w_EFD"
    if w_EFD.dim() != 3:
        raise ValueError(f"{name}: {layout} must have 3 dimensions, got shape {tuple(w_EFD.shape)}")
    num_experts, hidden, width = w_EFD.mT.shape if transposed else w_EFD.shape
    if width != x_ND.shape[1]:
        raise ValueError(
            f"{name}: {layout} must have D = {x_ND.shape[1]} as x_ND, got shape "
            f"{tuple(w_EFD.shape)} with transposed={transposed}"
        )
    if w_EFD.dtype != x_ND.dtype:
        raise ValueError(f"{name}: {layout} must be {x_ND.dtype} as x_ND, got {w_EFD.dtype}")
    _check_offset(name, offset_E1)
    if offset_E1.numel() != num_experts + 1:
        raise ValueError(
            f"{name}: offset_E1 must have E + 1 = {num_experts + 1} entries, "
            f"got {offset_E1.numel()}"
        )
    if bias_EF is not None:
        if bias_EF.shape != (num_experts, hidden):
            raise ValueError(
                f"{name}: bias_EF must have shape {(num_experts, hidden)}, "
                f"got {tuple(bias_EF.shape)}"
            )
        if bias_EF.dtype != x_ND.dtype:
            raise ValueError(f"{name}: bias_EF must be {x_ND.dtype} as x_ND, got {bias_EF.dtype}")
    return num_experts, hidden


def _check_call(
    x_ND: Tensor, w_EFD: Tensor, offset_E1: Tensor, bias_EF: Tensor | None, *, transposed: bool
) -> None:
    _check(x_ND, w_EFD, offset_E1, bias_EF, transposed)


def check_backward(grad_NF: Tensor, x_ND: Tensor, offset_E1: Tensor) -> None:
    name = "grouped_gemm_backward"
    if grad_NF.dim() != 2 or x_ND.dim() != 2 or grad_NF.shape[0] != x_ND.shape[0]:
        raise ValueError(
            f"{name}: grad_NF and x_ND must be matrices with as many rows, "
            f"got shapes {tuple(grad_NF.shape)} and {tuple(x_ND.shape)}"
        )
    if grad_NF.dtype != x_ND.dtype:
        raise ValueError(f"{name}: grad_NF must be {x_ND.dtype} as x_ND, got {grad_NF.dtype}")
    _check_offset(name, offset_E1)


def _check_backward_call(*args: Tensor, **_options: bool) -> None:
    check_backward(*args)


def _groups(name: str, offset_E1: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """The non-empty groups and their rows."""
    offset = offset_E1.tolist()
    if offset[0] != 0 or offset[-1] > num_rows or sorted(offset) != offset:
        raise ValueError(
            f"{name}: offset_E1 must ascend from 0 to at most N={num_rows}, got {offset}"
        )
    for e, (start, stop) in enumerate(pairwise(offset)):
        if stop > start:
            yield e, slice(start, stop)


def grouped_gemm_reference(
    x_ND: Tensor,
    w_EFD: Tensor,
    offset_E1: Tensor,
    bias_EF: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    _, hidden = _check(x_ND, w_EFD, offset_E1, bias_EF, transposed)
    w_EDF = w_EFD if transposed else w_EFD.mT
    y_NF = x_ND.new_zeros(x_ND.shape[0], hidden)
    for e, rows in _groups("grouped_gemm", offset_E1, x_ND.shape[0]):
        if bias_EF is None:
            y_NF[rows] = x_ND[rows] @ w_EDF[e]
        else:
            y_NF[rows] = torch.addmm(bias_EF[e], x_ND[rows], w_EDF[e])
    return y_NF


def grouped_gemm_backward_reference(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, in their layout, and of the bias."""
    check_backward(grad_NF, x_ND, offset_E1)
    grad_w_EFD, grad_bias_EF = (
        t.zero_()
        for t in _backward_fake(grad_NF, x_ND, offset_E1, transposed=transposed, bias=bias)
    )
    for e, rows in _groups("grouped_gemm_backward", offset_E1, x_ND.shape[0]):
        left, right = (x_ND, grad_NF) if transposed else (grad_NF, x_ND)
        grad_w_EFD[e] = left[rows].mT @ right[rows]
        if bias:
            grad_bias_EF[e] = grad_NF[rows].sum(dim=0)
    return grad_w_EFD, grad_bias_EF


def _cpu(
    x_ND: Tensor,
    w_EFD: Tensor,
    offset_E1: Tensor,
    bias_EF: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """From the packed copy of weights that stand; those that are trained are packed on the way."""
    _, hidden = _check(x_ND, w_EFD, offset_E1, bias_EF, transposed)
    native_ops = torch.ops.gose_native
    packed = packed_matrix(w_EFD, transposed=transposed, changing=w_EFD.requires_grad)
    y_NF: Tensor
    if packed is None:
        y_NF = native_ops.grouped_gemm_raw(x_ND, w_EFD, offset_E1, bias_EF, transposed)
    else:
        y_NF = native_ops.grouped_gemm(x_ND, packed.packed_EB, offset_E1, bias_EF, hidden)
    return y_NF


def _cpu_backward(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:
    check_backward(grad_NF, x_ND, offset_E1)
    num_experts, (hidden, width) = offset_E1.numel() - 1, (grad_NF.shape[1], x_ND.shape[1])
    shape = (num_experts, width, hidden) if transposed else (num_experts, hidden, width)
    grad_w_EFD = memory.take(shape, x_ND.dtype)
    grad_bias_EF = torch.ops.gose_native.grouped_gemm_backward(
        grad_NF, x_ND, offset_E1, grad_w_EFD, transposed, bias, False
    )
    return grad_w_EFD, grad_bias_EF


def _fake(
    x_ND: Tensor,
    w_EFD: Tensor,
    offset_E1: Tensor,
    bias_EF: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    _, hidden = _check(x_ND, w_EFD, offset_E1, bias_EF, transposed)
    return x_ND.new_empty(x_ND.shape[0], hidden)


def _backward_fake(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    check_backward(grad_NF, x_ND, offset_E1)
    num_experts, hidden, width = offset_E1.numel() - 1, grad_NF.shape[1], x_ND.shape[1]
    shape = (num_experts, width, hidden) if transposed else (num_experts, hidden, width)
    return x_ND.new_empty(shape), x_ND.new_empty((num_experts, hidden) if bias else (0,))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x_ND, w_EFD, offset_E1, _ = inputs
    ctx.save_for_backward(x_ND, w_EFD, offset_E1)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, w_EFD, offset_E1 = ctx.saved_tensors
    transposed, backend = ctx.options["transposed"], ctx.options["backend"]
    # torch leaves out trailing arguments that have their default.
    needs_x, needs_w, _, needs_bias = (*ctx.needs_input_grad, False)[:4]
    grad_x_ND = grad_w_EFD = grad_bias_EF = None
    if needs_x:
        grad_x_ND = torch.ops.gose.grouped_gemm(
            grad_NF, w_EFD, offset_E1, transposed=not transposed, backend=backend
        )
    into = memory.gradients_to_add_to((w_EFD,), (needs_w,))
    if into is not None:
        grad_bias_EF = torch.ops.gose.grouped_gemm_backward_add_(
            *(grad_NF, x_ND, offset_E1, *into),
            transposed=transposed,
            bias=needs_bias,
            backend=backend,
        )
    elif needs_w or needs_bias:
        grad_w_EFD, grad_bias_EF = torch.ops.gose.grouped_gemm_backward(
            grad_NF, x_ND, offset_E1, transposed=transposed, bias=needs_bias, backend=backend
        )
    return grad_x_ND, grad_w_EFD, None, grad_bias_EF if needs_bias else None


def _backward_setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward_of_backward(
    ctx: Any, cotangent_w_EFD: Tensor, cotangent_bias_EF: Tensor
) -> tuple[Tensor | None, ...]:
    """grad_w is linear in grad and in x, so both gradients are grouped products."""
    grad_NF, x_ND, offset_E1 = ctx.saved_tensors
    transposed, backend = ctx.options["transposed"], ctx.options["backend"]
    of_grad_NF = of_x_ND = None
    if ctx.needs_input_grad[0]:
        of_grad_NF = torch.ops.gose.grouped_gemm(
            x_ND,
            cotangent_w_EFD,
            offset_E1,
            cotangent_bias_EF if ctx.options["bias"] else None,
            transposed=transposed,
            backend=backend,
        )
    if ctx.needs_input_grad[1]:
        of_x_ND = torch.ops.gose.grouped_gemm(
            grad_NF, cotangent_w_EFD, offset_E1, transposed=not transposed, backend=backend
        )
    return of_grad_NF, of_x_ND, None


def _cost(
    x_ND: Tensor,
    w_EFD: Tensor,
    offset_E1: Tensor,
    bias_EF: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Cost:
    """Every row used; no more weight matrices read than there are rows."""
    (rows, width), hidden = x_ND.shape, w_EFD.shape[2 if transposed else 1]
    groups = min(rows, w_EFD.shape[0])
    elements = rows * (width + hidden) + groups * hidden * (width + (bias_EF is not None))
    moved = elements * x_ND.element_size() + offset_E1.numel() * 4
    return Cost(rows, moved, 2 * rows * width * hidden)


def backward_cost(
    grad_NF: Tensor,
    x_ND: Tensor,
    offset_E1: Tensor,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> Cost:
    """Every row used; the gradient of every group is written."""
    (rows, hidden), width = grad_NF.shape, x_ND.shape[1]
    groups = offset_E1.numel() - 1
    elements = rows * (width + hidden) + groups * hidden * (width + bias)
    moved = elements * x_ND.element_size() + offset_E1.numel() * 4
    return Cost(rows, moved, 2 * rows * width * hidden)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    N, E, F, D = 6, 3, 5, 4
    return (
        torch.ones(N, D, device=device, dtype=dtype),
        torch.ones(E, F, D, device=device, dtype=dtype),
        torch.arange(0, N + 1, N // E, device=device, dtype=torch.int32),
    )


def backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_ND, _, offset_E1 = _example(device, dtype)
    return torch.ones(x_ND.shape[0], 5, device=device, dtype=dtype), x_ND, offset_E1


grouped_gemm = register(
    "grouped_gemm(Tensor x_ND, Tensor w_EFD, Tensor offset_E1, Tensor? bias_EF=None, *, "
    "bool transposed=False, str? backend=None) -> Tensor",
    triton("grouped_gemm", "grouped_gemm", *DTYPES, check=_check_call),
    native("cpu", _cpu, *DTYPES, path=path_of),
    reference(grouped_gemm_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
    autocast=("x_ND", "w_EFD", "bias_EF"),
)

grouped_gemm_backward = register(
    "grouped_gemm_backward(Tensor grad_NF, Tensor x_ND, Tensor offset_E1, *, "
    "bool transposed=False, bool bias=False, str? backend=None) -> (Tensor, Tensor)",
    triton("grouped_gemm", "grouped_gemm_backward", *DTYPES, check=_check_backward_call),
    native("cpu", _cpu_backward, *DTYPES),
    reference(grouped_gemm_backward_reference),
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_of_backward,
    cost=backward_cost,
    example=backward_example,
)
