"""Quantized expert weights: the integers and scales of their formula, and layers that use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.quantized import LEVELS, WEIGHTS
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of
from tests.expert_mlp_oracle import DTYPES, NAMES, double, oracle

pytestmark = pytest.mark.skipif(
    gk.native.why_not() is not None, reason=f"quantized: {gk.native.why_not()}"
)

SIZES = [(1, 1), (16, 32), (33, 17), (37, 130), (130, 37)]
ERROR_LIMIT = {"int8": 1.5e-2, "int4": 0.12}


def _int8(w_RK: Tensor) -> Tensor:
    r_R1 = (w_RK.abs().amax(dim=1, keepdim=True) / 127).clamp_min(2.0**-100)
    return (w_RK / r_R1).round() * r_R1


def _int4(w_RK: Tensor) -> Tensor:
    """The formula in float32, every operation rounded as the kernel rounds it."""
    columns = w_RK.shape[1]
    w_RBS = torch.nn.functional.pad(w_RK, (0, -columns % 16)).unflatten(1, (-1, 16))
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    between = (levels[1:] + levels[:-1]) / 2
    r_R11 = (w_RBS.abs().amax(dim=(1, 2), keepdim=True) / 7680).clamp_min(2.0**-100)
    t_RBS = w_RBS / r_R11
    base = (t_RBS.abs().amax(dim=2, keepdim=True) / 30).view(torch.int32) >> 20
    best, least = torch.zeros_like(t_RBS), torch.full_like(t_RBS[..., :1], torch.inf)
    for place in range(-2, 4):
        code = (base - 960 + place).clamp(8, 126).to(torch.uint8)
        for sign in (1, -1):
            s = sign * code.view(torch.float8_e4m3fn).float()
            value = levels[torch.bucketize(t_RBS * (1 / s), between)] * s
            error = torch.zeros_like(least)
            for miss in (value - t_RBS).unbind(dim=2):  # one after the other, as the kernel adds
                error[..., 0] += miss * miss
            best = torch.where(error < least, value, best)
            least = torch.minimum(least, error)
    return (best * r_R11).flatten(1)[:, :columns]


def _by_formula(w_ECK: Tensor, weights: str) -> Tensor:
    rows = w_ECK.float().flatten(0, 1)
    return (_int8(rows) if weights == "int8" else _int4(rows)).view(w_ECK.shape)


def _weights(
    width: int, hidden: int, *, gated: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Gaussian weights with rows of zeros, of huge, tiny and subnormal numbers, and a lone one."""
    random = torch.Generator().manual_seed(width * 1000 + hidden)
    shapes = (2, 2 * hidden if gated else hidden, width), (2, width, hidden)
    up, down = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    huge, tiny = torch.finfo(dtype).max / 8, torch.finfo(dtype).tiny
    for e, scale in enumerate((0.0, huge, tiny, tiny / 64)):
        for w in (up, down):
            w[e % 2, e % w.shape[1]] *= scale
    up[1, -1], up[1, -1, -1] = 0, 3
    return up, down


def _quantize(
    up: Tensor, down: Tensor, weights: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor]:
    """The quantized weights, gates first."""
    packed_EB = gk.quantize_experts(up, down, weights=weights, **options)
    transposed, gated = options.get("transposed", False), options.get("gated", True)
    hidden = down.shape[1] if transposed else down.shape[2]
    return gk.unpack_experts(
        packed_EB,
        width=down.shape[2] if transposed else down.shape[1],
        hidden=hidden,
        dtype=dtype,
        gated=gated,
        weights=weights,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_integers_and_scales_are_those_of_the_formula(
    weights: str, gated: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, at every level."""
    for width, hidden in SIZES:
        up, down = _weights(width, hidden, gated=gated, dtype=dtype)
        got = _quantize(up, down, weights, gated=gated)
        for one, w in zip(got, (up, down), strict=True):
            assert torch.equal(one, _by_formula(w, weights))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_layouts_hold_the_same_numbers(weights: str) -> None:
    up, down = _weights(37, 21, dtype=torch.bfloat16)
    want = _quantize(up, down, weights)
    pairs = up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    turned = (up.mT.contiguous(), down.mT.contiguous())
    for given, options in (
        ((pairs, down), {"interleaved": True}),
        (turned, {"transposed": True}),
        ((pairs.mT.contiguous(), turned[1]), {"interleaved": True, "transposed": True}),
    ):
        for a, b in zip(_quantize(*given, weights, **options), want, strict=True):
            assert torch.equal(a, b)
    packed_EB = gk.quantize_experts(up, down, weights=weights)
    wide = torch.full((2, packed_EB.shape[1] + 128), 0xA5, dtype=torch.uint8)
    for e in range(2):
        into = wide[e : e + 1, : packed_EB.shape[1]]
        gk.quantize_experts(up[e : e + 1], down[e : e + 1], weights=weights, out=into)
    assert torch.equal(wide[:, : packed_EB.shape[1]], packed_EB)
    assert bool((wide[:, packed_EB.shape[1] :] == 0xA5).all())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_bytes_and_bits_for_any_number_of_threads(weights: str) -> None:
    args, _ = cases.ExpertMlpCase(T=40, K=3, E=5, D=130, F=70).build(torch.bfloat16)
    x, weight, expert, up, down, *_ = args
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            packed_EB = gk.quantize_experts(up, down, weights=weights)
            out = gk.expert_mlp_packed(
                x, weight, expert, packed_EB, 70, weights=weights, backend="cpu"
            )
            found.append((packed_EB, out))
    finally:
        torch.set_num_threads(threads)
    for packed_EB, out in found[1:]:
        assert torch.equal(packed_EB, found[0][0])
        assert torch.equal(out, found[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_packed", interpreted=12))
def test_layer_is_that_of_the_quantized_weights(
    case: cases.ExpertMlpCase, weights: str, dtype: torch.dtype, backend: str
) -> None:
    (x, weight, expert, up, down, bias_up, bias_down, *_), options = case.build(dtype)
    layout = {name: options.get(name, False) for name in ("interleaved", "transposed")}
    gated = ACTIVATIONS[case.activation].gated
    packed_EB = gk.quantize_experts(up, down, weights=weights, gated=gated, **layout)
    options.pop("transposed", None)

    def run(backend: str) -> Tensor:
        given = (x, weight, expert, packed_EB, case.F, bias_up, bias_down)
        return gk.expert_mlp_packed(*given, weights=weights, **options, backend=backend)

    exact_up, exact_down = _quantize(up, down, weights, dtype=torch.float64, gated=gated, **layout)
    if layout["interleaved"]:  # they come with gates first
        exact_up = exact_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    exact = double((x, weight, expert, exact_up, exact_down, bias_up, bias_down))
    # Equal parts of a token are rounded alike: their errors add up.
    rounded = backend == "triton"
    assert_chain_close_to_truth(
        run(backend),
        run("torch"),
        oracle(*exact, **options),
        gradient=rounded and case.kind == "one-expert",
        rounded_parts=rounded,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_a_token_keeps_its_bits_whatever_the_batch(weights: str, dtype: torch.dtype) -> None:
    (x, weight, expert, up, down, *_), _ = cases.ExpertMlpCase(
        T=70, K=2, E=3, D=96, F=64, kind="unused"
    ).build(dtype)
    packed_EB = gk.quantize_experts(up, down, weights=weights)

    def run(tokens: slice) -> Tensor:
        given = (x[tokens], weight[tokens], expert[tokens], packed_EB, 64)
        return gk.expert_mlp_packed(*given, weights=weights, backend="cpu")

    whole = run(slice(None))
    for count in (1, 5, 13, 33):
        assert torch.equal(run(slice(7, 7 + count)), whole[7 : 7 + count])
    assert run(slice(0, 0)).shape == (0, 96)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_error_on_gaussian_weights(weights: str) -> None:
    """Of a layer's output, against the weights before."""
    random, E, D, F = torch.Generator().manual_seed(3), 4, 1024, 512
    up = torch.randn(E, 2 * F, D, generator=random) / D**0.5
    down = torch.randn(E, D, F, generator=random) / F**0.5
    x = torch.randn(64, D, generator=random).bfloat16()
    expert = torch.rand(64, E, generator=random).argsort(dim=1)[:, :2].int()
    weight = torch.full((64, 2), 0.5)
    packed_EB = gk.quantize_experts(up, down, weights=weights)
    got = gk.expert_mlp_packed(x, weight, expert, packed_EB, F, weights=weights, backend="cpu")
    truth = gk.expert_mlp(x.float(), weight, expert, up, down)
    error = ((got - truth).norm() / truth.norm()).item()
    assert ERROR_LIMIT[weights] / 2 < error <= ERROR_LIMIT[weights]
    bits = 8 * packed_EB.numel() / (up.numel() + down.numel())
    assert bits <= {"int8": 8, "int4": 4.5}[weights] + 0.05


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_no_weights_and_empty_layers(weights: str) -> None:
    for E, D, F in ((0, 8, 4), (2, 0, 4), (2, 8, 0)):
        up, down = torch.zeros(E, 2 * F, D), torch.zeros(E, D, F)
        packed_EB = gk.quantize_experts(up, down, weights=weights)
        x, slots = torch.ones(3, D), torch.full((3, 2), E)
        slots[0, 0] = max(0, E - 1)
        for backend in ("cpu", "torch"):
            out = gk.expert_mlp_packed(
                *(x, torch.ones(3, 2), slots, packed_EB, F), weights=weights, backend=backend
            )
            assert torch.equal(out, torch.zeros(3, D))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_packed"))
def test_opcheck(backend: str, weights: str) -> None:
    (x, weight, expert, up, down, *_), _ = cases.ExpertMlpCase().build()
    packed_EB = gk.quantize_experts(up, down, weights=weights)
    args = (x, weight, expert, packed_EB, 9)
    options = {"weights": weights, "backend": backend}
    torch.library.opcheck(torch.ops.gose.expert_mlp_packed.default, args, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cpu_weights_that_are_not_finite_are_refused(
    weights: str, bad: float, dtype: torch.dtype
) -> None:
    for name, expert, row, column in (("w_up_EHD", 1, 41, 36), ("w_down_EDF", 0, 36, 20)):
        up, down = torch.ones(2, 42, 37, dtype=dtype), torch.ones(2, 37, 21, dtype=dtype)
        (up if name == "w_up_EHD" else down)[expert, row, column] = bad
        message = f"quantize_experts: {name} must be finite, got nan or inf in expert {expert}"
        with pytest.raises(ValueError, match=message):
            gk.quantize_experts(up, down, weights=weights)


def test_cpu_refusals() -> None:
    (x, weight, expert, up, down, *_), _ = cases.ExpertMlpCase().build()
    unknown = r"weights must be one of int8, int4, got 'int3'"
    with pytest.raises(ValueError, match=f"quantize_experts: {unknown}"):
        gk.quantize_experts(up, down, weights="int3")
    with pytest.raises(ValueError, match=r"w_down_EDF must be torch\.float32"):
        gk.quantize_experts(up, down.half(), weights="int8")
    with pytest.raises(ValueError, match="quantize_experts: w_up_EHD must be float32, bfloat16"):
        gk.quantize_experts(up.double(), down.double(), weights="int8")
    with pytest.raises(ValueError, match="quantize_experts: out must be uint8 of shape"):
        gk.quantize_experts(up, down, weights="int8", out=torch.zeros(5, 64, dtype=torch.uint8))
    packed_EB = gk.quantize_experts(up, down, weights="int8")
    for backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match=f"expert_mlp_packed: {unknown}"):
            gk.expert_mlp_packed(x, weight, expert, packed_EB, 9, weights="int3", backend=backend)
    with pytest.raises(ValueError, match="packed_EB must be uint8 of shape"):
        gk.expert_mlp_packed(x, weight, expert, packed_EB, 9, weights="int4", backend="cpu")
    with pytest.raises(ValueError, match="packed_EB must be uint8 of shape"):
        gk.expert_mlp_packed(x, weight, expert, packed_EB, 9, backend="cpu")
