"""Activations of expert MLPs and their slopes inside kernels; ops/activations.py has the formulas.

Letters: F hidden units; gate and up are two halves of the pre-activation.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

MlpCall = Any  # of ops/mlp_call.py, which this layer does not import


def options_of(call: MlpCall) -> dict[str, Any]:
    """What kernels with an activation take."""
    limited = call.act.gated and call.clamp != float("inf")
    return {
        "limit": float(call.clamp) if limited else 0.0,
        "alpha": float(call.scale),
        "shift": float(call.act.shift),
        "PHI": call.phi,
        "LIMITED": limited,
        # Gates lie before the ups, alternate with them, or there are none.
        "FORM": "alone" if not call.act.gated else "pairs" if call.interleaved else "halves",
    }


@triton.jit
def phi(g, alpha, PHI: tl.constexpr):
    if PHI == "silu":
        out = g * tl.sigmoid(alpha * g)
    elif PHI == "gelu":
        out = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif PHI == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u), exact far below 0 too
        out = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        out = tl.where(g < 0.0, 0.0, g)  # NaN stays
        if PHI == "relu2":
            out *= out
    return out


@triton.jit
def slope(g, alpha, PHI: tl.constexpr):
    """The derivative of phi, finite for finite g."""
    if PHI == "silu":
        s = tl.sigmoid(alpha * g)
        out = s + alpha * g * s * (1.0 - s)
    elif PHI == "gelu":
        density = tl.exp(-0.5 * g * g) * 0.3989422804014327
        out = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * density
    elif PHI == "gelu_tanh":
        # Beyond 20 the sigmoid is 0 or 1: the clamp keeps its slope from being inf * 0.
        c = tl.where(g > 20.0, 20.0, tl.where(g < -20.0, -20.0, g))
        s = tl.sigmoid(1.5957691216057308 * (c + 0.044715 * c * c * c))
        out = s + c * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * c * c)
    elif PHI == "relu":
        out = tl.where(g > 0.0, 1.0, 0.0)
    else:
        out = 2.0 * tl.where(g < 0.0, 0.0, g)
    return out


@triton.jit
def clamped(gate, up, limit, LIMITED: tl.constexpr):
    """gate at most limit, up within it; NaN stays."""
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up
