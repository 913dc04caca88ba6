"""What every op's tests share: the error rule, and the backends that can run here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gose_kernels as gk

# Per element: |error| <= a * |truth| + b * rms(truth), or the same-dtype reference's own error if
# that is larger (it pays for the dtype, not for the kernel).
_RULE = {
    torch.bfloat16: (2.0**-8, 2.0**-9),
    torch.float16: (2.0**-11, 2.0**-12),
    torch.float32: (0.0, 1e-6),
    torch.float64: (0.0, 1e-14),
}


def assert_close_to_truth(got: Tensor, same_dtype_reference: Tensor, truth: Tensor) -> None:
    """The error rule: `truth` is the float64 reference, dtypes and shapes must agree exactly.

    Elements that the truth has as NaN or infinite must be the same in `got`.
    """
    assert got.dtype == same_dtype_reference.dtype
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    error_of_truth, error_of_rms = _RULE[got.dtype]
    got, same_dtype_reference = got.double().cpu(), same_dtype_reference.double().cpu()
    truth = truth.double().cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    truth = truth[finite]
    if truth.numel() == 0:
        return
    got, same_dtype_reference = got[finite], same_dtype_reference[finite]
    rms = truth.square().mean().sqrt()
    allowed = (same_dtype_reference - truth).abs().nan_to_num(0.0, 0.0, 0.0)
    allowed = allowed.maximum(error_of_truth * truth.abs() + error_of_rms * rms) + 1e-300
    error = (got - truth).abs()
    worst = int((error / allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"element {worst}: got {got[worst]:.9g}, truth {truth[worst]:.9g}, "
        f"error {error[worst]:.3g} > allowed {allowed[worst]:.3g}"
    )


def assert_close_within_ulps(
    got: Tensor, same_dtype_reference: Tensor, truth: Tensor, ulps: int = 4
) -> None:
    """The error rule, and for float32 some ulp of the element itself: in a heavy-tailed tensor 1e-6
    of the rms is below the rounding of the few elements that outweigh the rest."""
    slack = truth.abs() * ulps * 2.0**-23 if got.dtype == torch.float32 else 0 * truth
    moved = truth + (got.double() - truth).clamp(-slack, slack)
    assert_close_to_truth(got, same_dtype_reference, moved)


def backends_of(name: str) -> list[object]:
    """Every written backend of op `name` as a pytest parameter; one that cannot run on CPU tensors
    here is skipped with its reason."""
    op = gk.OPS[name]
    assert op.example is not None
    reasons = op.reasons(*op.example(torch.device("cpu"), torch.float32))
    return [
        pytest.param(
            b.name,
            marks=[]
            if (reason := reasons[b.name]) is None
            else pytest.mark.skip(reason=f"{name} on {b.name}: {reason}"),
            id=b.name,
        )
        for b in op.backends
    ]
