"""The ops whose GPU kernels are Triton's alone, as the ladder's tests see them: launchers, calls on
CPU tensors, and calls on meta tensors that reach every tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.expert_mlp import BackwardCall, MlpCall

Tiles = Iterator[tuple[str, tuple[Any, ...]]]


class OnTriton(NamedTuple):
    source: str  # gose_kernels/triton/<source>.py
    # Arguments of the launcher by name, the widest tile first.
    tiles: Callable[[torch.dtype], Tiles]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)

    def triton(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"gose_kernels.triton.{self.source}")
        launcher: Callable[..., Any] = getattr(module, name)
        return launcher


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gemm_tiles(dtype: torch.dtype) -> Tiles:
    """Mean rows of 8 groups that choose each number of rows of a tile; sizes nothing divides."""
    for mean, F, D in (
        (1024, 512, 512),
        (64, 512, 512),
        (16, 512, 512),
        (4, 512, 512),
        (64, 19, 37),
    ):
        x, w = _meta(8 * mean, D, dtype=dtype), _meta(8, F, D, dtype=dtype)
        args = (x, w, _meta(9, dtype=torch.int32), _meta(8, F, dtype=dtype))
        yield f"{mean}x{F}x{D}", args
        if mean == 1024:
            turned = _meta(8, D, F, dtype=dtype).mT
            yield f"{mean}x{F}x{D}-transposed", (x, turned, *args[2:])


def _gemm_backward_tiles(dtype: torch.dtype) -> Tiles:
    for F, D in ((512, 512), (19, 37)):
        N = 8 * 256
        args = (_meta(N, F, dtype=dtype), _meta(N, D, dtype=dtype), _meta(9, dtype=torch.int32))
        yield f"{F}x{D}", args


def mlp_call(
    T: int,
    dtype: torch.dtype,
    activation: str = "swiglu",
    D: int = 512,
    F: int = 512,
    **options: Any,
) -> MlpCall:
    """8 experts, 2 of them for every token, biases and frozen units."""
    E, K = 8, 2
    H = 2 * F if gk.ops.activations.ACTIVATIONS[activation].gated else F
    turned = options.get("transposed", False)
    up = _meta(E, D, H, dtype=dtype) if turned else _meta(E, H, D, dtype=dtype)
    down = _meta(E, F, D, dtype=dtype) if turned else _meta(E, D, F, dtype=dtype)
    return MlpCall(
        *(_meta(T, D, dtype=dtype), _meta(T, K, dtype=torch.float32)),
        *(_meta(T, K, dtype=torch.int32), up, down),
        *(_meta(E, H, dtype=dtype), _meta(E, D, dtype=dtype)),
        *(_meta(E, dtype=torch.bool), _meta(E, F, dtype=torch.bool)),
        activation=activation,
        **options,
    )


def _mlp_calls(dtype: torch.dtype) -> Iterator[tuple[str, MlpCall]]:
    for T in (4096, 256, 64, 16):
        yield f"swiglu-{T}", mlp_call(T, dtype)
    for T in (4096, 16):
        pairs = mlp_call(T, dtype, "swiglu_oai", interleaved=True, transposed=True)
        yield f"swiglu_oai-{T}-interleaved-transposed", pairs
        yield f"gelu-{T}", mlp_call(T, dtype, "gelu")
    for activation in ("geglu", "geglu_tanh", "reglu", "relu2"):
        yield f"{activation}-256", mlp_call(256, dtype, activation)
    yield "swiglu-256-odd", mlp_call(256, dtype, D=37, F=19)


def _mlp_tiles(dtype: torch.dtype) -> Tiles:
    for label, call in _mlp_calls(dtype):
        yield label, (call,)


def _mlp_backward_tiles(dtype: torch.dtype) -> Tiles:
    for label, call in _mlp_calls(dtype):
        pre_NH = _meta(call.expert_TK.numel(), call.up_EDH.shape[2], dtype=dtype)
        grad_TD = _meta(*call.x_TD.shape, dtype=dtype)
        yield label, (call, BackwardCall(pre_NH, grad_TD, need_bias_up=True, need_bias_down=True))


OPS: dict[str, OnTriton] = {
    "grouped_gemm": OnTriton("grouped_gemm", _gemm_tiles),
    "grouped_gemm_backward": OnTriton("grouped_gemm", _gemm_backward_tiles),
    "expert_mlp_train": OnTriton("expert_mlp", _mlp_tiles),
    "expert_mlp_backward": OnTriton("expert_mlp_backward", _mlp_backward_tiles),
}

UNALIGNED = {"64x19x37", "19x37", "swiglu-256-odd"}  # labels of tiles
# Kernels that multiply matrices; their launchers launch others besides.
GEMM_KERNELS = {
    "_grouped_gemm_kernel",
    "_weight_grad_kernel",
    "_up_kernel",
    "_hidden_grad_kernel",
}

assert set(OPS) <= set(gk.OPS)
