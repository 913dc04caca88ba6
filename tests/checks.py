"""What every op's tests share: the error rule, and the backends that can run here."""

from __future__ import annotations

import math

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
    _assert_within(got, (same_dtype_reference.double() - truth.double()).abs(), truth)


def _assert_within(got: Tensor, own_error: Tensor, truth: Tensor) -> None:
    """The error rule, given the error of the same-dtype reference for every element."""
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    error_of_truth, error_of_rms = _RULE[got.dtype]
    got, own_error, truth = got.double().cpu(), own_error.cpu(), truth.double().cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    got, own_error, truth = got[finite], own_error[finite], truth[finite]
    if truth.numel() == 0:
        return
    rms = truth.square().mean().sqrt()
    allowed = own_error.nan_to_num(0.0, 0.0, 0.0)
    allowed = allowed.maximum(error_of_truth * truth.abs() + error_of_rms * rms) + 1e-300
    error = (got - truth).abs()
    worst = int((error / allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"element {worst}: got {got[worst]:.9g}, truth {truth[worst]:.9g}, "
        f"error {error[worst]:.3g} > allowed {allowed[worst]:.3g}"
    )


# Whole-tensor relative L2 error of a chain of products that rounds its intermediate once.
_CHAIN_RULE = {
    torch.bfloat16: 2.6e-3,
    torch.float16: 2.6e-3 / 8,
    torch.float32: 1e-6,
    torch.float64: 1e-14,
}


def assert_chain_close_to_truth(
    got: Tensor,
    same_dtype_reference: Tensor,
    truth: Tensor,
    *,
    gradient: bool = False,
    rounded_parts: bool = False,
    through: torch.dtype | None = None,
) -> None:
    """The error rule for chains of long sums, whose rounding errors fall on elements by chance: the
    L2 error of the whole tensor, and per element the rule plus the reference's largest error.

    A gradient is made from a rounded pre-activation and a rounded gradient of it: twice the error.
    Sums of parts that were rounded to the dtype by choice are allowed 3.0e-3 in place of 2.6e-3,
    and three standard deviations more where few elements make the norm. A float32 result of
    intermediates that were rounded to `through` has the rule of that.
    Tensors of few elements have no L2 error worth the name: theirs is a draw.
    """
    scale = 2.0 if gradient else 1.0
    spread = 1.0
    dtype = through or got.dtype
    if rounded_parts and dtype.itemsize == 2:
        scale *= 3.0 / 2.6
        square = truth.double().where(truth.isfinite(), 0.0).square()
        as_if_equal = float(square.sum() ** 2 / square.square().sum().clamp_min(1e-300))
        spread += 3 / math.sqrt(2 * max(as_if_equal, 1.0))
    assert got.dtype == same_dtype_reference.dtype
    truth, finite = truth.double(), truth.isfinite()
    own_error = (same_dtype_reference.double() - truth).abs().where(finite, 0.0)
    error = (got.double() - truth).where(finite, 0.0).norm()
    size = truth.where(finite, 0.0).norm()
    allowed = max(spread * scale * _CHAIN_RULE[dtype] * size, own_error.norm())
    assert truth.numel() < 32 or error <= allowed, f"L2 {error / size:.3g}"
    if truth.numel() > 0:
        error_of_truth, error_of_rms = _RULE[dtype]
        rms = size / math.sqrt(max(1, int(finite.sum())))
        rule = error_of_truth * truth.abs() + error_of_rms * rms
        _assert_within(got, scale * (rule + own_error.max()), truth)


def assert_close_within_ulps(
    got: Tensor, same_dtype_reference: Tensor, truth: Tensor, ulps: int = 4
) -> None:
    """The error rule, and for float32 some ulp of the element itself: in a heavy-tailed tensor 1e-6
    of the rms is below the rounding of the few elements that outweigh the rest."""
    slack = truth.abs() * ulps * 2.0**-23 if got.dtype == torch.float32 else 0 * truth
    # What is not a number moves nothing: the rule itself must meet it.
    moved = truth + (got.double() - truth).clamp(-slack, slack).nan_to_num(0.0, 0.0, 0.0)
    assert_close_to_truth(got, same_dtype_reference, moved)


def backends_of(name: str, *only: str, interpreted: int | None = None) -> list[object]:
    """Every written backend of op `name`, or those named, as a pytest parameter; one that cannot
    run on CPU tensors here is skipped with its reason. Of the cases on triton, which an interpreter
    runs, a sampled run keeps `interpreted`."""
    op = gk.OPS[name]
    assert op.example is not None
    reasons = op.reasons(*op.example(torch.device("cpu"), torch.float32))
    return [
        pytest.param(
            b.name,
            marks=[
                *(
                    [pytest.mark.skip(reason=f"{name} on {b.name}: {reason}")]
                    if (reason := reasons[b.name]) is not None
                    else []
                ),
                *(
                    [pytest.mark.matrix(keep=interpreted)]
                    if interpreted is not None and b.name == "triton"
                    else []
                ),
            ],
            id=b.name,
        )
        for b in op.backends
        if not only or b.name in only
    ]
