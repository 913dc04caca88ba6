"""moe on a GPU: scores by one GEMM, then the launches of route and of expert_mlp; nothing waits.

Letters: T tokens, E experts, D width. The contract is in ops/moe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import declares, size_of
from gose_kernels.triton.activations import MlpCall
from gose_kernels.triton.expert_mlp import expert_mlp
from gose_kernels.triton.route import route
from gose_kernels.triton.tiles import Tile, for_operands, precision

MoeCall = Any  # of ops/moe.py, which this layer does not import

# A router has few columns: small tiles of rows, so that few tokens too have programs enough.
_FEW_TOKENS = 512
_HALF, _SINGLE = (
    (Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3)),
    (Tile(16, 64, 64, 4, 3), Tile(64, 64, 32, 4, 3)),
)


def _work(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, score = (args[f"{name}_ptr"] for name in ("x", "w", "score"))
    return size_of(x, w, score), 2 * score.numel() * x.shape[1]


@triton.jit(launch_metadata=declares(_work, "x_ptr"))
def _score_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [E, D]
    score_ptr,  # [T, E] float32, written once
    T,
    E,
    D,
    stride_xt,
    stride_xd,
    stride_we,
    stride_wd,
    WIDEN: tl.constexpr,  # x and w are multiplied as float32
    WHOLE: tl.constexpr,  # tiles fit E and D
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(E, COLUMNS)
    t = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    x_at = x_ptr + (tl.minimum(t, T - 1) * stride_xt)[:, None] + (d * stride_xd)[None, :]
    w_at = w_ptr + (e.to(tl.int64) * stride_we)[None, :] + (d * stride_wd)[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, DEPTH):
        if WHOLE:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = d < D - start
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += DEPTH * stride_xd
        w_at += DEPTH * stride_wd
    score_at = score_ptr + t[:, None] * E + e[None, :]
    tl.store(score_at, acc, mask=(t < T)[:, None] & (e < E)[None, :])


def tile_of(num_tokens: int, widen: bool) -> Tile:
    return (_SINGLE if widen else _HALF)[num_tokens > _FEW_TOKENS]


def scores(x_TD: Tensor, w_router_ED: Tensor) -> Tensor:
    """score_TE float32. Products of 16 bits each are exact; else both are read as float32."""
    (T, D), E = x_TD.shape, w_router_ED.shape[0]
    score_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    widen = x_TD.dtype != w_router_ED.dtype or x_TD.dtype == torch.float32
    tile = for_operands(tile_of(T, widen), x_TD, w_router_ED)
    grid = (triton.cdiv(T, tile.rows) * triton.cdiv(E, tile.columns),)
    if grid[0]:
        with torch.cuda.device_of(x_TD):
            _score_kernel[grid](
                x_TD,
                w_router_ED,
                score_TE,
                T,
                E,
                D,
                *x_TD.stride(),
                *w_router_ED.stride(),
                WIDEN=widen,
                WHOLE=D % tile.depth == 0 and E % tile.columns == 0,
                PRECISION=precision(torch.float32 if widen else x_TD.dtype),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                DEPTH=tile.depth,
                **tile.options,
            )
    return score_TE


def _score(call: MoeCall) -> Tensor:
    if call.w_router_ED is not None:
        return scores(call.x_TD, call.w_router_ED)
    if call.logits_TE is not None:
        logits_TE: Tensor = call.logits_TE.float()
        return logits_TE
    zeros_TE: Tensor = call.x_TD.new_zeros(
        call.x_TD.shape[0], call.w_up_EHD.shape[0], dtype=torch.float32
    )
    return zeros_TE


def moe(call: MoeCall, mlp: MlpCall, of_route: dict[str, Any]) -> tuple[Tensor, ...]:
    """out_TD and the outputs of route. `mlp` is the layer's call but for weight_TK, expert_TK."""
    entropies = (call.entropy_TE, call.entropy_E, call.bias_E, call.noise_TE)
    routing = route(_score(call), call.top_k, *entropies, **of_route)
    return expert_mlp(mlp._replace(weight_TK=routing[0], expert_TK=routing[1])), *routing
