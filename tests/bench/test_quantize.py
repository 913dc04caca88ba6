from __future__ import annotations

import pytest
import torch

import gose_kernels as gk


@pytest.mark.bench
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantize(benchmark, rounding):
    x_P, residual_P = torch.randn(100_000), torch.zeros(100_000)
    _, _, left_P = benchmark(gk.quantize, x_P, residual_P, rounding=rounding)
    assert float(left_P.abs().max()) < float(x_P.abs().max()) / 127


@pytest.mark.bench
def test_dequantize(benchmark):
    x_P = torch.randn(100_000)
    code, scale, _ = gk.quantize(x_P)
    out_P = benchmark(gk.dequantize, code, scale, 100_000)
    assert float((out_P - x_P).abs().max()) < float(x_P.abs().max()) / 127


@pytest.mark.bench
def test_dequantize_add_(benchmark):
    acc_P = torch.zeros(100_000)
    code, scale, _ = gk.quantize(torch.randn(100_000))
    benchmark(gk.dequantize_add_, acc_P, code, scale, weight=0.5)
    assert acc_P.any()
