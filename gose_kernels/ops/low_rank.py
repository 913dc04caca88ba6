"""low_rank: a matrix as the product of two thin factors, refined from the last call's factor.

    y_MN = x_MN + residual_MN
    p_MR = an orthonormal basis of the columns of y_MN @ q_NR
    q'_NR = y_MN.T @ p_MR
    residual'_MN = y_MN - p_MR @ q'_NR.T          [PowerSGD: Vogels et al. 2019, Algorithm 1]

x_MN         float32 | bfloat16 | float16 | float64, any strides
q_NR         float32 (float64 with a float64 x): q' of the last call (warm start) or random numbers
residual_MN  dtype of q, or None: no error feedback, and the third output is empty
returns      p_MR, q'_NR, residual'_MN, dtype of q, in which everything is computed

The receiver's matrix is p @ q'.T. Both factors go through `quantize` like any tensor; the error
feedback of the pair is then y - p_decoded @ q_decoded.T, which the caller forms.
R * (M + N) must be below M * N: more would send more than the matrix itself, and raises; this also
keeps R below min(M, N). Where y @ q has a rank below R, its missing columns are any orthonormal
completion, so a q of zeros (a matrix that did not change) can start again. Column signs of p and q'
are free in pairs: backends agree on p @ q'.T, not on the factors.
NaN or infinity in y raises. There is no GPU kernel: torch computes it there, and its check of y
waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32

from gose_kernels.backends import native, reference
from gose_kernels.registry import Cost, register


def _check(x_MN: Tensor, q_NR: Tensor, residual_MN: Tensor | None) -> None:
    if x_MN.dim() != 2 or not x_MN.is_floating_point():
        raise ValueError(
            "low_rank: x_MN must be floating point with 2 dimensions, "
            f"got {x_MN.dtype} of shape {tuple(x_MN.shape)}"
        )
    M, N = x_MN.shape
    dtype = torch.promote_types(x_MN.dtype, float32)
    if q_NR.dim() != 2 or q_NR.shape[0] != N or q_NR.dtype != dtype:
        raise ValueError(
            f"low_rank: q_NR must be {dtype} of shape ({N}, R), "
            f"got {q_NR.dtype} of shape {tuple(q_NR.shape)}"
        )
    R = q_NR.shape[1]
    if R < 1 or R * (M + N) >= M * N:
        raise ValueError(
            f"low_rank: rank R={R} must be at least 1 and send less than the matrix, "
            f"R * (M + N) < M * N, got {R * (M + N)} and {M * N}"
        )
    if residual_MN is not None and (residual_MN.shape != x_MN.shape or residual_MN.dtype != dtype):
        raise ValueError(
            f"low_rank: residual_MN must be {dtype} of shape {tuple(x_MN.shape)}, "
            f"got {residual_MN.dtype} of shape {tuple(residual_MN.shape)}"
        )


def low_rank_reference(
    x_MN: Tensor, q_NR: Tensor, residual_MN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x_MN, q_NR, residual_MN)
    y_MN = x_MN.to(q_NR.dtype) if residual_MN is None else x_MN.to(q_NR.dtype) + residual_MN
    if not bool(y_MN.isfinite().all()):
        row, column = (~y_MN.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"low_rank: x_MN + residual_MN must be finite, element ({row}, {column}) is "
            f"{float(y_MN[row, column])}"
        )
    p_MR = torch.linalg.qr(y_MN @ q_NR).Q.contiguous()  # LAPACK gives columns
    q_NR = y_MN.T @ p_MR
    if residual_MN is None:
        return p_MR, q_NR, q_NR.new_empty(0, 0)
    return p_MR, q_NR, y_MN - p_MR @ q_NR.T


def _fake(
    x_MN: Tensor,
    q_NR: Tensor,
    residual_MN: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x_MN, q_NR, residual_MN)
    (M, N), R = x_MN.shape, q_NR.shape[1]
    left_shape = (0, 0) if residual_MN is None else (M, N)
    return q_NR.new_empty(M, R), q_NR.new_empty(N, R), q_NR.new_empty(left_shape)


def _cost(x_MN: Tensor, q_NR: Tensor, residual_MN: Tensor | None = None) -> Cost:
    # y @ q, y.T @ p and p @ q.T with error feedback; orthonormalisation 2 * M * R * R
    (M, N), R = x_MN.shape, q_NR.shape[1]
    products = 2 if residual_MN is None else 3
    moved = x_MN.numel() * x_MN.element_size() + (M + 2 * N) * R * q_NR.element_size()
    moved += 0 if residual_MN is None else 2 * residual_MN.numel() * residual_MN.element_size()
    return Cost(M, moved, 2 * products * M * N * R + 2 * M * R * R)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q_NR = torch.ones(12, 2, device=device, dtype=torch.promote_types(dtype, float32))
    return torch.ones(16, 12, device=device, dtype=dtype), q_NR


low_rank = register(
    "low_rank(Tensor x_MN, Tensor q_NR, Tensor? residual_MN=None, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
    native("cpu", "low_rank", float32, torch.bfloat16, torch.float16),
    reference(low_rank_reference),
    fake=_fake,
    cost=_cost,
    example=_example,
)
