"""entropy: how unsure each row of class scores is; 0 = certain, 1 = uniform.

    p = softmax_c(logits[..., c]),  n = number of c with logits[..., c] > -inf
    out[...] = -sum_c p[c] * log p[c] / log n,  0 where n <= 1

logits_BMC  float32 | bfloat16 | float16 | float64   any leading dimensions, any strides;
                                                     -inf = class not offered
returns     entropy_BM in [0, 1], float32 (float64 for float64): the shape without the classes

Computed from the logits, in float32 for 16-bit logits too. With z = logits - max and m = sum p * z:
H = log1p(sum of exp(z) over all but one maximum) - m. Neither term is negative, so H is neither and
keeps its relative precision next to a one-hot row, where -sum p * log p has lost it.
Gradient: d out / d logits[j] = -p[j] * (log p[j] + H) / log n = -p[j] * (z[j] - m) / log n: finite
everywhere, 0 where logits[j] = -inf or n <= 1. A row with NaN or +inf gives NaN. C = 0 raises.
The factor 1 / log n makes modules with different label spaces comparable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32

from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register


def _check(name: str, logits_BMC: Tensor) -> None:
    if logits_BMC.dim() < 1 or logits_BMC.shape[-1] < 1:
        raise ValueError(
            f"{name}: logits_BMC must have a last dimension of at least one class, "
            f"got shape {tuple(logits_BMC.shape)}"
        )
    if not logits_BMC.is_floating_point():
        raise ValueError(f"{name}: logits_BMC must be floating point, got {logits_BMC.dtype}")


def _check_forward(logits_BMC: Tensor) -> None:
    _check("entropy", logits_BMC)


def _check_backward(grad_BM: Tensor, logits_BMC: Tensor) -> None:
    _check("entropy_backward", logits_BMC)
    if grad_BM.shape != logits_BMC.shape[:-1]:
        raise ValueError(
            f"entropy_backward: grad_BM must have shape {tuple(logits_BMC.shape[:-1])}, "
            f"got {tuple(grad_BM.shape)}"
        )
    wanted = torch.promote_types(logits_BMC.dtype, float32)
    if grad_BM.dtype != wanted:
        raise ValueError(
            f"entropy_backward: grad_BM must be {wanted} for logits_BMC of {logits_BMC.dtype}, "
            f"got {grad_BM.dtype}"
        )


def _moments(logits_BMC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, p, sum p * z, entropy in nats and log n of every row, in at least float32."""
    logit = logits_BMC.to(torch.promote_types(logits_BMC.dtype, float32))
    offered = logit != -torch.inf
    top = logit.argmax(dim=-1, keepdim=True)
    highest = logit.gather(-1, top)
    z = logit - highest.masked_fill(highest == -torch.inf, 0)  # -inf - -inf would be NaN
    power = z.exp()
    rest = power.scatter(-1, top, 0).sum(dim=-1, keepdim=True)  # without the maximum's own 1
    p = power / (rest + 1)
    mean_z = torch.where(offered, p * z, 0).sum(dim=-1, keepdim=True)
    log_n = offered.sum(dim=-1, keepdim=True).to(logit.dtype).log()
    return z, p, mean_z, rest.log1p() - mean_z, log_n


def entropy_reference(logits_BMC: Tensor) -> Tensor:
    _check_forward(logits_BMC)
    *_, nats, log_n = _moments(logits_BMC)
    return torch.where(log_n > 0, nats / log_n, 0 * nats).clamp(0, 1).squeeze(-1)


def entropy_backward_reference(grad_BM: Tensor, logits_BMC: Tensor) -> Tensor:
    """Gradient of entropy with respect to logits_BMC, in its dtype."""
    _check_backward(grad_BM, logits_BMC)
    z, p, mean_z, nats, log_n = _moments(logits_BMC)
    live = (log_n > 0) & (logits_BMC != -torch.inf)
    slope = torch.where(live, -p * (z - mean_z) / log_n, 0 * nats)
    return (grad_BM.unsqueeze(-1) * slope).to(logits_BMC.dtype)


def _fake(logits_BMC: Tensor, *, backend: str | None = None) -> Tensor:
    _check_forward(logits_BMC)
    return logits_BMC.new_empty(
        logits_BMC.shape[:-1], dtype=torch.promote_types(logits_BMC.dtype, float32)
    )


def _backward_fake(grad_BM: Tensor, logits_BMC: Tensor, *, backend: str | None = None) -> Tensor:
    _check_backward(grad_BM, logits_BMC)
    return logits_BMC.new_empty(logits_BMC.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.backend = keyword_only_inputs["backend"]


def _backward(ctx: Any, grad_BM: Tensor) -> Tensor:
    (logits_BMC,) = ctx.saved_tensors
    grad: Tensor = torch.ops.gose.entropy_backward(grad_BM, logits_BMC, backend=ctx.backend)
    return grad


def _cost(logits_BMC: Tensor) -> Cost:
    rows = logits_BMC.shape[:-1].numel()
    moved = logits_BMC.numel() * logits_BMC.element_size() + rows * 4
    return Cost(rows, moved, 2 * logits_BMC.numel())


def _backward_cost(grad_BM: Tensor, logits_BMC: Tensor) -> Cost:
    moved = 2 * logits_BMC.numel() * logits_BMC.element_size() + grad_BM.numel() * 4
    return Cost(grad_BM.numel(), moved, 4 * logits_BMC.numel())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.ones(2, 3, 8, device=device, dtype=dtype),)


def _backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad_BM = torch.ones(2, 3, device=device, dtype=torch.promote_types(dtype, float32))
    return grad_BM, *_example(device, dtype)


entropy = register(
    "entropy(Tensor logits_BMC, *, str? backend=None) -> Tensor",
    native("cuda", "entropy", float32, bfloat16, float16),
    triton("entropy", "entropy", float32, bfloat16, float16, check=_check_forward),
    native("cpu", "entropy", float32, bfloat16, float16),
    reference(entropy_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
)

entropy_backward = register(
    "entropy_backward(Tensor grad_BM, Tensor logits_BMC, *, str? backend=None) -> Tensor",
    native("cuda", "entropy_backward", float32, bfloat16, float16),
    triton("entropy", "entropy_backward", float32, bfloat16, float16, check=_check_backward),
    native("cpu", "entropy_backward", float32, bfloat16, float16),
    reference(entropy_backward_reference),
    fake=_backward_fake,
    cost=_backward_cost,
    example=_backward_example,
)
