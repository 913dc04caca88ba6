"""Quantized expert weights: integers and scales, in the panels of 32 columns that kernels read.

A column is one output of a layer: row h of w_up_EHD, row d of w_down_EDF. Of its K weights w:

    int8   r = max(max_k |w[k]| / 127, 2^-100)
           w[k] ~ q[k] * r,  q[k] = round(w[k] / r)
    int4   r = max(max_k |w[k]| / 7680, 2^-100)
           w[k] ~ LEVELS[q[k]] * s[k // 16] * r

round goes to nearest, ties to even. The s of a block of 16 weights is the float8_e4m3fn number with
the least squared error of twelve: those at -2 .. 3 places from block maximum / (30 * r), of either
sign. q[k] is the nearest level, of two as near the lower one. A level times an s is exact in
bfloat16. Per weight int8 takes 8 bits, int4 4.5, and 32 bits a column.
Gaussian weights, error of a SwiGLU layer's output: 1.4e-2 with int8, 0.12 with int4. Sixteen evenly
spaced levels would give 0.13; a block of 32 at best 0.127, whatever its levels.
Weights below 2^-101 (int8) and 2^-106 (int4) become 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = ("int8", "int4")  # Weights of csrc/params.h, from 1 on
LEVELS = (-30, -24, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 12, 16, 20, 26)
_PANEL, _BLOCK = 32, 16


def check_weights(op: str, weights: str) -> None:
    """ValueError for an unknown kind."""
    if weights not in WEIGHTS:
        names = ", ".join(WEIGHTS)
        raise ValueError(f"{op}: weights must be one of {names}, got {weights!r}")


def panel_bytes(K: int, weights: str) -> int:
    """Bytes of the 32 columns of a panel; K a multiple of 32."""
    of_q = K * _PANEL if weights == "int8" else K * _PANEL // 2 + K // _BLOCK * _PANEL
    return of_q + 4 * _PANEL


def dequantized(panels_B: Tensor, K: int, weights: str, dtype: torch.dtype) -> Tensor:
    """[..., columns, K] of panels uint8 [..., panels * panel_bytes], K a multiple of 32: products
    in float32, for float64 exact ones."""
    panels_PB = panels_B.unflatten(-1, (-1, panel_bytes(K, weights)))
    of_r = panels_PB[..., -4 * _PANEL :].contiguous()
    r_P1C = of_r.view(torch.float32).unsqueeze(-2)
    if weights == "int8":
        w_PKC = panels_PB[..., : K * _PANEL].unflatten(-1, (K, _PANEL)).view(torch.int8).float()
    else:
        # 32 steps: 4 words of each column, then 2 s of each.
        steps = panels_PB[..., : -4 * _PANEL].unflatten(-1, (-1, 18 * _PANEL))
        of_s = steps[..., 16 * _PANEL :].unflatten(-1, (-1, _PANEL)).flatten(-3, -2)
        s_PKC = of_s.contiguous().view(torch.float8_e4m3fn).float().repeat_interleave(_BLOCK, -2)
        # A word holds 8 steps of a column, low bits first: 0 2 4 6, then 1 3 5 7.
        byte = steps[..., : 16 * _PANEL].flatten(-2).unflatten(-1, (K // 8, _PANEL, 2, 2))
        q = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)  # [..., odd, half of step]
        q_PKC = q.movedim(-3, -1).transpose(-3, -2).flatten(-4, -2)
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=panels_B.device)
        w_PKC = levels[q_PKC.int()] * s_PKC
    exact = torch.promote_types(dtype, torch.float32)
    w_PCK: Tensor = (w_PKC.to(exact) * r_P1C).mT.to(dtype)
    return w_PCK.flatten(-3, -2)
