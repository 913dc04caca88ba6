"""The brute force of expert_mlp: its contract a slot at a time, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests import cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
# Relative L2 error of the reference, whose intermediate results have the dtype of x.
REFERENCE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "reglu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda g: functional.relu(g) ** 2,
}


def _act(
    pre_H: Tensor, activation: str, interleaved: bool, limit: float | None, alpha: float
) -> Tensor:
    if activation not in cases._GATED:
        return PHI[activation](pre_H)
    F = pre_H.shape[0] // 2
    gate, up = (pre_H[::2], pre_H[1::2]) if interleaved else (pre_H[:F], pre_H[F:])
    limit = 7.0 if limit is None and activation == "swiglu_oai" else limit
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return PHI[activation](gate) * up


def oracle(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    bias_up_EH: Tensor | None,
    bias_down_ED: Tensor | None,
    *_frozen: Tensor | None,
    activation: str = "swiglu",
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
) -> Tensor:
    """The contract, a slot at a time; differentiable."""
    if transposed:
        up_EHD, down_EDF = up_EHD.mT, down_EDF.mT
    out = []
    for t in range(x_TD.shape[0]):
        token = torch.zeros(x_TD.shape[1], dtype=x_TD.dtype)
        for k in range(weight_TK.shape[1]):
            e = int(expert_TK[t, k])
            if e == up_EHD.shape[0]:
                continue
            pre = up_EHD[e] @ x_TD[t] + (0 if bias_up_EH is None else bias_up_EH[e])
            y = down_EDF[e] @ _act(pre, activation, interleaved, limit, alpha)
            token = token + weight_TK[t, k] * (y + (0 if bias_down_ED is None else bias_down_ED[e]))
        out.append(token)
    return torch.stack(out) if out else torch.zeros_like(x_TD)


def forward_error_bound(
    args: tuple[Any, ...], options: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    """TD float64: how far rounding carries each output of a kernel that sums in float32 and rounds
    the hidden units and the outputs to `dtype`. args: in float64, weights neither transposed nor
    interleaved, no limit.

    First-order analysis with independent roundings (Higham and Mary, 2019) at 5 standard
    deviations. For shapes where a few sums decide the whole tensor, so that its norm is a draw.
    """
    x_TD, weight_TK, expert_TK, up_EHD, down_EDF, bias_up_EH, bias_down_ED, *_ = args
    rounding, single = torch.finfo(dtype).eps / 2, 2.0**-24
    bound_TD = rounding * oracle(*args, **options).abs()
    for t, k in product(range(x_TD.shape[0]), range(weight_TK.shape[1])):
        e = int(expert_TK[t, k])
        if e == up_EHD.shape[0]:
            continue
        terms_HD = up_EHD[e] * x_TD[t]
        pre_H = terms_HD.sum(1) + (0 if bias_up_EH is None else bias_up_EH[e])
        pre_H.requires_grad_()
        hidden_F = _act(pre_H, options["activation"], False, None, options.get("alpha", 1.702))
        slope_H = torch.autograd.grad(hidden_F.sum(), pre_H)[0].abs()
        pre_H, hidden_F = pre_H.detach(), hidden_F.detach()
        error_2F = (slope_H * _error_of_sum(terms_HD, pre_H, single)).reshape(-1, len(hidden_F))
        # gelu(x) = x / 2 * (1 + erf): for x << 0 the rounding of erf outweighs that of the product.
        linear_F = pre_H.abs().reshape(-1, len(hidden_F)).prod(0)
        error_F = error_2F.sum(0) + single * (4 * hidden_F.abs() + linear_F)
        terms_DF = down_EDF[e] * hidden_F
        y_D = terms_DF.sum(1) + (0 if bias_down_ED is None else bias_down_ED[e])
        rounded_D = (rounding * terms_DF.abs()).sum(1).minimum(3 * rounding * terms_DF.norm(dim=1))
        error_D = (down_EDF[e] * error_F).norm(dim=1) + rounded_D
        error_D += _error_of_sum(terms_DF, y_D, single)
        bound_TD[t] += weight_TK[t, k].abs() * (error_D + 2 * single * y_D.abs())
    return bound_TD


def _error_of_sum(terms: Tensor, total: Tensor, unit: float) -> Tensor:
    """5 standard deviations of a sequential sum over the last dimension."""
    return 2 * unit * math.sqrt(terms.shape[-1]) * (terms.norm(dim=-1) + total.abs())


def double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if a is not None and a.is_floating_point() else a for a in args)


def underflows(case: cases.ExpertMlpCase, dtype: torch.dtype) -> bool:
    """Products of two tiny numbers are subnormal in float16."""
    return dtype == torch.float16 and case.scale < 1


def output_grad(case: cases.ExpertMlpCase, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.T, case.D, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients_of(
    function: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any], grad: Tensor
) -> list[Tensor]:
    """Gradients of the floating-point arguments, zeros where there is none."""
    leaves = [
        a.detach().requires_grad_() if a is not None and a.is_floating_point() else a for a in args
    ]
    out = function(*leaves, **options)
    wanted = [a for a in leaves if a is not None and a.requires_grad]
    if not out.requires_grad:
        return [torch.zeros_like(a) for a in wanted]
    got = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for g, a in zip(got, wanted, strict=True)]


def freeze(case: cases.ExpertMlpCase, args: tuple[Any, ...], gradients: list[Tensor]) -> None:
    """Zero the gradients of what is frozen, by its definition."""
    frozen_E, frozen_EF = args[7:]
    if frozen_E is None:
        return
    transposed = case.options.get("transposed", False)
    up_EHD, down_EDF = (g.mT if transposed else g for g in gradients[2:4])
    frozen_EF = frozen_EF | frozen_E[:, None]
    frozen_EH = frozen_EF
    if case.activation in cases._GATED:
        frozen_EH = torch.cat([frozen_EF, frozen_EF], dim=1)
        if case.options.get("interleaved", False):
            frozen_EH = frozen_EF.repeat_interleave(2, dim=1)
    up_EHD[frozen_EH] = 0
    down_EDF.mT[frozen_EF] = 0
    if case.bias:
        gradients[4][frozen_EH] = 0
        gradients[5][frozen_E] = 0


def true_gradients(
    case: cases.ExpertMlpCase, args: tuple[Any, ...], options: dict[str, Any], grad: Tensor
) -> list[Tensor]:
    gradients = gradients_of(oracle, double(args), options, grad.double())
    freeze(case, args, gradients)
    return gradients
