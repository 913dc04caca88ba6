"""Elementary functions with an error of about one ulp, for kernels whose results are differences of
nearly equal numbers, or tiny."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, precise where x is tiny: log of the rounded sum, and its rounding."""
    u = 1.0 + x
    exact = tl.log(u) + (x - (u - 1.0)) / u
    return tl.where(u == float("inf"), u, exact)


@triton.jit
def exp(x):
    """e**x: the instruction's argument x * log2(e), rounded, would cost |x| ulp [Cody & Waite]."""
    x = tl.where(x < -150.0, -150.0, tl.where(x > 100.0, 100.0, x))  # beyond: 0, inf; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) - n * -2.12194440e-4  # n times the first part is exact
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)
