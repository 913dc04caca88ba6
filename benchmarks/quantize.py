"""The codecs against the same arithmetic in torch, eager and compiled, and against memory.

    python -m benchmarks quantize [--quick] [--threads N] [--rounds N]

float32 values, format int8_b256_f32. A row's `ratio` is the compiled chain's time over ours;
`floor` is the time its bytes take at the bandwidth of torch's own reads and copies, over ours.
Freed memory is kept by the allocator for every way (see _interleave.keep_freed_memory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import _interleave

_BLOCK = 256


def _scales(y_GN: Tensor) -> Tensor:
    return y_GN.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127


def _nearest(x_P: Tensor) -> tuple[Tensor, Tensor]:
    y_GN = x_P.view(-1, _BLOCK)
    scale_G1 = _scales(y_GN)
    return (y_GN / scale_G1).round().to(torch.int8), scale_G1


def _stochastic(x_P: Tensor) -> tuple[Tensor, Tensor]:
    y_GN = x_P.view(-1, _BLOCK)
    scale_G1 = _scales(y_GN)
    q_GN = (y_GN / scale_G1 + torch.rand_like(y_GN)).floor().clamp(-127, 127)
    return q_GN.to(torch.int8), scale_G1


def _feedback(x_P: Tensor, residual_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y_GN = (x_P + residual_P).view(-1, _BLOCK)
    scale_G1 = _scales(y_GN)
    q_GN = (y_GN / scale_G1 + torch.rand_like(y_GN)).floor().clamp(-127, 127)
    return q_GN.to(torch.int8), scale_G1, y_GN - q_GN * scale_G1


def _dequantize(code_GN: Tensor, scale_G1: Tensor) -> Tensor:
    return (code_GN.float() * scale_G1).view(-1)


def _accumulate(acc_P: Tensor, code_GN: Tensor, scale_G1: Tensor) -> Tensor:
    return acc_P.add_((code_GN.float() * scale_G1).view(-1), alpha=0.5)


def _check(x_P: Tensor) -> None:
    """Both sides code alike: at most one code apart where a scale rounds otherwise."""
    code, _, _ = gk.quantize(x_P)
    chain, _ = _nearest(x_P)
    apart = (code.view(torch.int8).int() - chain.view(-1).int()).abs()
    if int(apart.max()) > 1 or float(apart.float().mean()) > 1e-3:
        raise RuntimeError("benchmarks: quantize and its chain do not code alike")


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """A row for each op: medians, ratio to the compiled chain, share of its floor."""
    _interleave.keep_freed_memory()
    P = 1 << 20 if quick else 50_000_128
    generator = torch.Generator().manual_seed(0)
    x_P = torch.randn(P, generator=generator)
    residual_P = 0.01 * torch.randn(P, generator=generator)
    acc_P = torch.zeros(P)
    _check(x_P[: 1 << 20])
    code, scale, _ = gk.quantize(x_P)
    code_GN, scale_G1 = code.view(torch.int8).view(-1, _BLOCK), scale[:, None]
    ours: dict[str, tuple[Callable[[], object], int, Callable[..., object], tuple[Tensor, ...]]] = {
        "nearest": (lambda: gk.quantize(x_P), 5, _nearest, (x_P,)),
        "stochastic": (
            lambda: gk.quantize(x_P, rounding="stochastic", seed=1),
            5,
            _stochastic,
            (x_P,),
        ),
        "stochastic + error feedback": (
            lambda: gk.quantize(x_P, residual_P, rounding="stochastic", seed=1),
            13,
            _feedback,
            (x_P, residual_P),
        ),
        "dequantize": (lambda: gk.dequantize(code, scale, P), 5, _dequantize, (code_GN, scale_G1)),
        "dequantize and add": (
            lambda: gk.dequantize_add_(acc_P, code, scale, weight=0.5),
            9,
            _accumulate,
            (acc_P, code_GN, scale_G1),
        ),
    }
    bytes_a_second = _interleave.bandwidth()
    rows = []
    for name, (own, bytes_each, chain, args) in ours.items():
        compiled = torch.compile(chain)
        ways: dict[str, _interleave.Way] = {
            "gose": own,
            "compiled": partial(compiled, *args),
            "eager": partial(chain, *args),
        }
        times = _interleave.seconds(ways, rounds)
        median = times["gose"]["median"]
        rows.append(
            {
                "op": name,
                **{f"{way}_ms": 1e3 * t["median"] for way, t in times.items()},
                "gose_low_ms": 1e3 * times["gose"]["low"],
                "ratio": times["compiled"]["median"] / median,
                "floor": bytes_each * P / bytes_a_second / median,
            }
        )
    return {"rows": rows, "elements": P, "bytes_a_second": bytes_a_second}


def main(argv: Sequence[str]) -> int:
    return _interleave.run("quantize", __doc__, argv, measure)
