"""What equal to eager means: within the error rule of the dtype, or no worse than eager itself."""

from __future__ import annotations

import torch
from torch import Tensor

# Whole tensor, relative L2; one element, of its own size and of the rms.
_RULE = {
    torch.bfloat16: (2.6e-3, 2.0**-8, 2.0**-9),
    torch.float32: (1e-6, 2.0**-21, 1e-6),  # 4 ulp of the few elements that outweigh the rest
}
# Eager rounds in other places than we do: errors are compared as sizes, not one by one.
_MORE_L2, _MORE_WORST = 1.2, 3.0


@torch.no_grad()
def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


def assert_equals_eager(
    name: str, ours: Tensor, eager: Tensor, truth: Tensor, rule: float | None = None
) -> None:
    """ours, eager: the same tensor of both, in one dtype; truth: eager's, computed in float64.

    rule: relative L2 that is allowed in any case; None: that of the dtype. Elements follow it.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape, name
    of_dtype, of_element, of_rms = _RULE[ours.dtype]
    truth = truth.double()
    allowed = max(rule or of_dtype, _MORE_L2 * relative_error(eager, truth))
    got = relative_error(ours, truth)
    assert got <= allowed, f"{name}: relative error {got:.3g} > {allowed:.3g}"
    worst_of_eager = (eager.double() - truth).abs().max()
    allowed_each = of_element * truth.abs() + of_rms * truth.square().mean().sqrt()
    allowed_each *= (rule or of_dtype) / of_dtype
    error = (ours.double() - truth).abs()
    excess = error - allowed_each.clamp_min(_MORE_WORST * worst_of_eager)
    at = int(excess.argmax())
    assert excess.max() <= 0, f"{name}: element {at} is off by {error.flatten()[at]:.3g}"
