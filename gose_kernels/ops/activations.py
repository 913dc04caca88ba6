"""Activations of expert MLPs: value and derivative by name.

phi and slope are functions of (g, alpha), elementwise, in the dtype of g, finite for finite g; only
the two silu forms read alpha. What gates, limit and shift mean stands in the contract of
`expert_mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """phi, its derivative (both of (g, alpha)), whether H = 2F, the constant added to up."""

    phi: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    gated: bool
    shift: float = 0.0
    limit: float | None = None


def _silu(g: Tensor, alpha: float) -> Tensor:
    return g * torch.sigmoid(alpha * g)


def _silu_slope(g: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * g)
    return s + alpha * g * s * (1 - s)


def _gelu(g: Tensor, alpha: float) -> Tensor:
    return torch.nn.functional.gelu(g)


def _gelu_slope(g: Tensor, alpha: float) -> Tensor:
    density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-g / math.sqrt(2)) + g * density


def _gelu_tanh(g: Tensor, alpha: float) -> Tensor:
    return torch.nn.functional.gelu(g, approximate="tanh")


def _gelu_tanh_slope(g: Tensor, alpha: float) -> Tensor:
    # tanh is 1 to the last bit beyond 20; the clamp keeps g^2 * (1 - tanh^2) from being inf * 0.
    c = g.clamp(-20, 20)
    t = torch.tanh(math.sqrt(2 / math.pi) * (c + 0.044715 * c**3))
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * c * c)
    return 0.5 * (1 + t) + 0.5 * c * (1 - t * t) * inner_slope


def _relu(g: Tensor, alpha: float) -> Tensor:
    return torch.relu(g)


def _relu_slope(g: Tensor, alpha: float) -> Tensor:
    return (g > 0).to(g.dtype)


def _relu2(g: Tensor, alpha: float) -> Tensor:
    return torch.relu(g).square()


def _relu2_slope(g: Tensor, alpha: float) -> Tensor:
    return 2 * torch.relu(g)


PHIS = (_silu, _gelu, _gelu_tanh, _relu, _relu2)  # Phi of csrc/params.h

ACTIVATIONS = {
    "swiglu": Activation(_silu, _silu_slope, gated=True),
    "swiglu_oai": Activation(_silu, _silu_slope, gated=True, shift=1.0, limit=7.0),
    "geglu": Activation(_gelu, _gelu_slope, gated=True),
    "geglu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope, gated=True),
    "reglu": Activation(_relu, _relu_slope, gated=True),
    "silu": Activation(_silu, _silu_slope, gated=False),
    "gelu": Activation(_gelu, _gelu_slope, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope, gated=False),
    "relu": Activation(_relu, _relu_slope, gated=False),
    "relu2": Activation(_relu2, _relu2_slope, gated=False),
}
