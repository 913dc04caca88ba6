"""The ops whose GPU kernels are Triton's alone, as the ladder's tests see them: launchers, calls on
meta tensors that reach every tile, and calls on CPU tensors that are checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops import moe
from gose_kernels.ops.expert_mlp import (
    expert_mlp_backward_reference,
    expert_mlp_reference,
    expert_mlp_train_reference,
)
from gose_kernels.ops.expert_mlp_packed import bind_packed, expert_mlp_packed_reference
from gose_kernels.ops.grouped_gemm import (
    grouped_gemm_backward_reference,
    grouped_gemm_reference,
)
from gose_kernels.ops.mlp_call import BackwardCall, MlpCall, bind_backward
from gose_kernels.ops.squared_grad import squared_grad_reference
from gose_kernels.packing import expert_bytes, unpack_experts
from gose_kernels.quantized import WEIGHTS
from tests import cases
from tests.checks import assert_chain_close_to_truth, assert_close_within_ulps
from tests.expert_mlp_oracle import double, output_grad

Tiles = Iterator[tuple[str, tuple[Any, ...]]]


class OnTriton(NamedTuple):
    source: str  # gose_kernels/triton/<source>.py
    # Arguments of the launcher by name, the widest tile first.
    tiles: Callable[[torch.dtype], Tiles]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)
    kinds: int = 1  # so many of the first tiles are of kernels of their own
    launcher: str = ""  # what takes the tiles, if not the op

    def triton(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"gose_kernels.triton.{self.source}")
        launcher: Callable[..., Any] = getattr(module, self.launcher or name)
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


def _gemm_added_tiles(dtype: torch.dtype) -> Tiles:
    for label, (grad, x, offset_E1) in _gemm_backward_tiles(dtype):
        into = _meta(offset_E1.numel() - 1, grad.shape[1], x.shape[1], dtype=dtype)
        yield label, (grad, x, offset_E1, into)


def _squared_tiles(dtype: torch.dtype) -> Tiles:
    """Every row a sample, then samples of several rows."""
    for F, D in ((512, 512), (19, 37)):
        N = 8 * 256
        x, grad = _meta(N, D, dtype=dtype), _meta(N, F, dtype=dtype)
        offset_E1, sample_N = _meta(9, dtype=torch.int32), _meta(N, dtype=torch.int32)
        yield f"rows-{F}x{D}", (x, grad, None, offset_E1)
        yield f"samples-{F}x{D}", (x, grad, sample_N, offset_E1)


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
    for T in (4096, 256, 64, 16):
        yield f"swiglu-{T}-odd", mlp_call(T, dtype, D=37, F=19)
    yield (
        "swiglu_oai-256-odd",
        mlp_call(256, dtype, "swiglu_oai", D=40, F=24, interleaved=True, transposed=True),
    )
    yield "geglu-256-odd", mlp_call(256, dtype, "geglu", D=37, F=19)


def _mlp_tiles(dtype: torch.dtype) -> Tiles:
    for label, call in _mlp_calls(dtype):
        yield label, (call,)


def mlp_backward_call(call: MlpCall) -> tuple[MlpCall, BackwardCall]:
    """All gradients, of a call as `mlp_call` makes it."""
    pre_NH = call.x_TD.new_empty(call.expert_TK.numel(), call.up_EDH.shape[2])
    grad_TD = torch.empty_like(call.x_TD)
    return call, BackwardCall(pre_NH, grad_TD, need_bias_up=True, need_bias_down=True)


def _mlp_backward_tiles(dtype: torch.dtype) -> Tiles:
    for label, call in _mlp_calls(dtype):
        yield label, mlp_backward_call(call)


def _mlp_added_tiles(dtype: torch.dtype) -> Tiles:
    for label, call in _mlp_calls(dtype):
        into = (_meta(*w.shape, dtype=dtype) for w in (call.w_up_EHD, call.w_down_EDF))
        yield label, (*mlp_backward_call(call), *into)


def _packed_tiles(dtype: torch.dtype) -> Tiles:
    """8 experts, 2 of them for every token; every kind of weights, their widest tiles first."""
    sizes = (("swiglu", 4096, 512, 512), ("swiglu", 256, 512, 512), ("swiglu", 64, 512, 512))
    sizes += (("swiglu", 16, 512, 512), ("gelu", 256, 512, 512), ("swiglu_oai", 256, 512, 512))
    sizes += (("swiglu", 4096, 37, 19), ("swiglu", 16, 37, 19))
    for activation, T, D, F in sizes:
        for weights in (None, *WEIGHTS):
            gated = gk.ops.activations.ACTIVATIONS[activation].gated
            B = expert_bytes(width=D, hidden=F, dtype=dtype, gated=gated, weights=weights)
            args = (
                *(_meta(T, D, dtype=dtype), _meta(T, 2, dtype=torch.float32)),
                *(_meta(T, 2, dtype=torch.int32), _meta(8, B, dtype=torch.uint8), F),
                *(_meta(8, F * (1 + gated), dtype=dtype), _meta(8, D, dtype=dtype)),
            )
            options = {"activation": activation, "weights": weights}
            pairs = activation == "swiglu_oai"
            kind = weights or "packed"
            yield (
                f"{kind}-{activation}-{T}x{F}x{D}",
                bind_packed(*args, **options, interleaved=pairs),
            )


def _score_tiles(dtype: torch.dtype) -> Tiles:
    """Many and few tokens, sizes nothing divides, a router in float32."""
    for T, E, D in ((4096, 128, 512), (16, 128, 512), (4096, 37, 90), (16, 37, 90)):
        router_ED = _meta(E, D, dtype=torch.float32 if T == 16 and E == 37 else dtype)
        yield f"{T}x{E}x{D}", (_meta(T, D, dtype=dtype), router_ED)


OPS: dict[str, OnTriton] = {
    "grouped_gemm": OnTriton("grouped_gemm", _gemm_tiles),
    "grouped_gemm_backward": OnTriton("grouped_gemm", _gemm_backward_tiles),
    "expert_mlp_train": OnTriton("expert_mlp", _mlp_tiles),
    "expert_mlp_backward": OnTriton("expert_mlp_backward", _mlp_backward_tiles),
    "grouped_gemm_backward_add_": OnTriton("grouped_gemm", _gemm_added_tiles),
    "expert_mlp_backward_add_": OnTriton("expert_mlp_backward", _mlp_added_tiles),
    "squared_grad": OnTriton("squared_grad", _squared_tiles, kinds=2),
    "expert_mlp_packed": OnTriton("expert_mlp_packed", _packed_tiles, kinds=3),
    "moe": OnTriton("moe", _score_tiles, launcher="scores"),
}

# Kernels that multiply matrices; their launchers launch others besides.
GEMM_KERNELS = {
    "_grouped_gemm_kernel",
    "_weight_grad_kernel",
    "_up_kernel",
    "_hidden_grad_kernel",
    "_packed_kernel",
    "_score_kernel",
    "_squared_rows_kernel",
    "_squared_samples_kernel",
}

# One for each number of rows of a tile: 16, 32, 64, 128; empty groups, rows of none, odd sizes.
GEMMS = [
    cases.GroupedGemmCase(37, 5, 19, 23, "empty-experts", bias=True, unused=5),
    cases.GroupedGemmCase(40, 3, 136, 64, transposed=True),
    cases.GroupedGemmCase(130, 2, 24, 72, bias=True, strided=True),
    cases.GroupedGemmCase(700, 1, 40, 80, unused=3),
]

# The three forms of pre, every phi, unused slots, frozen experts and units, strided rows; last,
# whole tiles and steps.
LAYERS = [
    cases.ExpertMlpCase("swiglu", T=9, D=20, F=12, kind="unused", bias=True, frozen=True),
    cases.ExpertMlpCase(
        "swiglu_oai", T=9, D=16, F=8, bias=True, options={"transposed": True, "interleaved": True}
    ),
    cases.ExpertMlpCase("gelu", T=9, D=16, F=24, kind="empty-experts", strided=True, frozen=True),
    cases.ExpertMlpCase("geglu_tanh", T=40, E=2, D=16, F=24, scale=4, options={"limit": 1.5}),
    cases.ExpertMlpCase("relu2", T=70, K=1, E=1, D=8, F=8, kind="one-expert", bias=True),
    cases.ExpertMlpCase("swiglu", T=150, K=1, E=1, D=128, F=128, frozen=True),
]

# A router, a capacity, odd sizes and few tokens.
WHOLE_LAYERS = [
    cases.MoeCase(bias=True, options={"renormalize": True}),
    cases.MoeCase(T=37, E=7, D=100, F=37, options={"capacity": 9}),
    cases.MoeCase(T=2, E=40, top_k=3, D=128, F=16, options={"policy": "sigmoid"}),
    cases.MoeCase("logits", options={"activation": "gelu"}),
]

# Samples of any order; rows of none, strides by the element.
SQUARES = [
    cases.SquaredGradCase(40, 11, 7, "rows", E=4, unused=5),
    cases.SquaredGradCase(40, 11, 7, "shuffled", E=4, kind="empty-experts", unused=5),
    cases.SquaredGradCase(33, 132, 37, "runs", strided=True),
    cases.SquaredGradCase(70, 72, 72, "one"),
    cases.SquaredGradCase(70, 72, 72, "rows"),
]

Run = Callable[..., Any]  # of a launcher and its arguments


def check(
    got: Any,
    same: Any,
    truth: Any,
    *,
    gradient: bool = False,
    through: torch.dtype | None = None,
) -> None:
    """The error rule; `same` is the reference in the dtype of the call. Rows of experts are rounded
    before combine sums them."""
    parts = ((p,) if isinstance(p, Tensor) else p for p in (got, same, truth))
    for g, s, t in zip(*parts, strict=True):
        # Three products of tf32 leave some ulp of an element that outweighs the others.
        slack = t.abs() * 4 * 2.0**-23 if g.dtype == torch.float32 else 0 * t
        moved = t + (g.double() - t).clamp(-slack, slack).nan_to_num(0.0, 0.0, 0.0)
        assert_chain_close_to_truth(
            g, s, moved, gradient=gradient, rounded_parts=True, through=through
        )


def check_gemm(run: Run, case: cases.GroupedGemmCase, dtype: torch.dtype) -> None:
    args, options = case.build(dtype)
    launcher = OPS["grouped_gemm"].triton("grouped_gemm")
    got = run(lambda *a: launcher(*a, **options), *args)
    truth = grouped_gemm_reference(*double(args), **options)
    check(got, grouped_gemm_reference(*args, **options), truth)


def _before(weights: Tensor) -> Tensor:
    """A gradient of earlier batches."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(weights.shape, generator=random).to(weights.dtype)


def _check_added(got: Tensor, before: Tensor, same: Tensor, truth: Tensor) -> None:
    """The sum, rounded once; what has no gradient keeps its bits."""
    untouched = truth == 0
    assert torch.equal(got[untouched], before[untouched])
    check((got,), (before + same,), (before.double() + truth,), gradient=True)


def check_gemm_backward(
    run: Run, case: cases.GroupedGemmCase, dtype: torch.dtype, add: bool = False
) -> None:
    (x_ND, w, offset_E1, _), options = case.build(dtype)
    grad_NF = torch.randn(case.N, case.F, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_NF[case.N - case.unused :] = torch.nan
    args = (grad_NF, x_ND, offset_E1)
    name = "grouped_gemm_backward_add_" if add else "grouped_gemm_backward"
    launcher, before = OPS[name].triton(name), _before(w)

    def launch(*args: Tensor) -> tuple[Tensor, Tensor]:
        if not add:
            made: tuple[Tensor, Tensor] = launcher(*args, bias=True, **options)
            return made
        into = before.clone()
        return into, launcher(*args, into, bias=True, **options)

    got = run(launch, *args)
    same = grouped_gemm_backward_reference(*args, bias=True, **options)
    truth = grouped_gemm_backward_reference(*double(args), bias=True, **options)
    if add:
        _check_added(got[0], before, same[0], truth[0])
        got, same, truth = got[1:], same[1:], truth[1:]
    check(got, same, truth)


def check_squares(run: Run, case: cases.SquaredGradCase, dtype: torch.dtype) -> None:
    args = case.build(dtype)
    got = run(OPS["squared_grad"].triton("squared_grad"), *args)
    same, truth = squared_grad_reference(*args), squared_grad_reference(*double(args))
    for one, own, true in zip(got, same, truth, strict=True):
        assert_close_within_ulps(one, own, true)


def check_forward(run: Run, case: cases.ExpertMlpCase, dtype: torch.dtype) -> Tensor:
    """The kept pre_NH."""
    args, options = case.build(dtype)
    got = run(OPS["expert_mlp_train"].triton("expert_mlp_train"), MlpCall(*args, **options))
    same = expert_mlp_train_reference(*args, **options)
    check(got, same, expert_mlp_train_reference(*double(args), **options))
    pre_NH: Tensor = got[1]
    return pre_NH


def check_packed(
    run: Run, case: cases.ExpertMlpCase, dtype: torch.dtype, weights: str | None
) -> None:
    """Against the weights that stand in the panels."""
    (*routed, up, down, bias_up, bias_down, _, _), options = case.build(dtype)
    gated = gk.ops.activations.ACTIVATIONS[case.activation].gated
    layout = {name: options.get(name, False) for name in ("interleaved", "transposed")}
    options.pop("transposed", None)
    if weights is None:
        packed_EB = gk.pack_experts(up, down, gated=gated, **layout)
    else:
        packed_EB = gk.quantize_experts(up, down, weights=weights, gated=gated, **layout)
    args, options = (packed_EB, case.F, bias_up, bias_down), {**options, "weights": weights}
    got = run(
        OPS["expert_mlp_packed"].triton("expert_mlp_packed"),
        *bind_packed(*routed, *args, **options),
    )
    sizes = {"width": case.D, "hidden": case.F, "gated": gated, "weights": weights}
    exact = torch.float64 if weights else dtype
    own_up, own_down = unpack_experts(packed_EB, dtype=exact, **sizes)
    if layout["interleaved"]:  # they come with gates first
        own_up = own_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    options.pop("weights")
    layer = (*double((*routed, own_up, own_down, bias_up, bias_down)), None, None)
    truth = expert_mlp_reference(*layer, **options)
    same = expert_mlp_packed_reference(*routed, *args, **options, weights=weights)
    check((got,), (same,), (truth,))


def check_moe(run: Run, case: cases.MoeCase, dtype: torch.dtype) -> None:
    """Routed as the reference is; then the layer of these weights."""
    args, options = case.build(dtype)
    launcher = importlib.import_module("gose_kernels.triton.moe").moe
    got = run(launcher, *moe.bind(*args, **options))
    same = moe.moe_reference(*args, **options)
    assert torch.equal(got[2], same[2])
    assert torch.equal(got[4], same[4])
    for i in (1, 3, 5, 6):
        torch.testing.assert_close(got[i], same[i])
    x_TD, up_EHD, down_EDF = args[:3]
    given = (x_TD, got[1], got[2], up_EHD, down_EDF, *args[6:8])
    mlp = {name: options[name] for name in ("activation",) if name in options}
    truth = expert_mlp_reference(*double(given), **mlp)
    check((got[0],), (expert_mlp_reference(*given, **mlp),), (truth,))


def check_backward(
    run: Run,
    case: cases.ExpertMlpCase,
    dtype: torch.dtype,
    pre_NH: Tensor | None = None,
    add: bool = False,
) -> None:
    """From what a forward pass kept, by default the reference's."""
    args, options = case.build(dtype)
    grad_TD = output_grad(case, dtype)
    own_NH = expert_mlp_train_reference(*args, **options)[1]
    exact_NH = expert_mlp_train_reference(*double(args), **options)[1]
    options |= {"need_bias_up": case.bias, "need_bias_down": case.bias}
    given = own_NH if pre_NH is None else pre_NH
    name = "expert_mlp_backward_add_" if add else "expert_mlp_backward"
    launcher, before = OPS[name].triton(name), [_before(w) for w in args[3:5]]

    def launch(*call: Any) -> tuple[Tensor, ...]:
        if not add:
            made: tuple[Tensor, ...] = launcher(*call)
            return made
        into = [b.clone() for b in before]
        x, weight, *biases = launcher(*call, *into)
        return x, weight, *into, *biases

    got = run(launch, *bind_backward((*args, given, grad_TD), options))
    same = expert_mlp_backward_reference(*args, own_NH, grad_TD, **options)
    truth = expert_mlp_backward_reference(*double(args), exact_NH, grad_TD.double(), **options)
    if add:
        for i, b in zip((2, 3), before, strict=True):
            _check_added(got[i], b, same[i], truth[i])
        got, same, truth = ((*g[:2], *g[4:]) for g in (got, same, truth))
    check(got, same, truth, gradient=True, through=dtype)


assert set(OPS) <= set(gk.OPS)
