"""moe against route and expert_mlp and against a dense layer, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import gose_kernels as gk
from gose_kernels.ops.moe import moe_reference
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
MLP_OPTIONS = ("activation", "interleaved", "transposed", "limit", "alpha")


def _double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _composed(
    x_TD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    top_k: int,
    router_ED: Tensor | None,
    logits_TE: Tensor | None,
    bias_up_EH: Tensor | None = None,
    bias_down_ED: Tensor | None = None,
    frozen_E: Tensor | None = None,
    frozen_EF: Tensor | None = None,
    *of_route: Tensor | None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The layer written with its two ops."""
    exact = torch.promote_types(x_TD.dtype, torch.float32)
    if logits_TE is not None:
        score_TE = logits_TE.to(exact)
    elif router_ED is not None:
        score_TE = x_TD.to(exact) @ router_ED.to(exact).mT
    else:
        score_TE = torch.zeros(x_TD.shape[0], up_EHD.shape[0], dtype=exact)
    of_mlp = {name: options.pop(name) for name in MLP_OPTIONS if name in options}
    routing = gk.route(score_TE, top_k, *of_route, **options, backend=backend)
    out_TD = gk.expert_mlp(
        *(x_TD, routing[0], routing[1], up_EHD, down_EDF, bias_up_EH, bias_down_ED),
        *(frozen_E, frozen_EF),
        **of_mlp,
        backend=backend,
    )
    return out_TD, *routing


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", cases.moe, ids=str)
def test_reference_is_its_two_ops(case: cases.MoeCase, dtype: torch.dtype) -> None:
    args, options = case.build(dtype)
    got = moe_reference(*args, **options)
    for one, want in zip(got, _composed(*args, **options, backend="torch"), strict=True):
        assert torch.equal(one, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.moe, ids=str)
@pytest.mark.parametrize("backend", backends_of("moe", interpreted=6))
def test_matches_reference(case: cases.MoeCase, dtype: torch.dtype, backend: str) -> None:
    """Routed as the reference is; then each against the float64 layer of its own weights."""
    args, options = case.build(dtype)
    got = gk.moe(*args, **options, backend=backend)
    same = moe_reference(*args, **options)
    assert torch.equal(got[2], same[2])
    assert torch.equal(got[4], same[4])
    mlp = {name: options[name] for name in MLP_OPTIONS if name in options}
    x_TD, up_EHD, down_EDF, bias_up_EH, bias_down_ED = _double((*args[:3], *args[6:8]))
    truth = gk.expert_mlp(
        *(x_TD, got[1].double(), got[2], up_EHD, down_EDF, bias_up_EH, bias_down_ED), **mlp
    )
    alike = gk.expert_mlp(args[0], got[1], got[2], *args[1:3], *args[6:8], **mlp, backend="torch")
    assert_chain_close_to_truth(got[0], alike, truth, rounded_parts=backend == "triton")
    for i in (1, 3, 5, 6):
        torch.testing.assert_close(got[i], same[i])


ROUTINGS = [
    {"softmax_before": False},
    {"renormalize": True, "activation": "swiglu_oai", "interleaved": True},
    {"capacity": 2, "capacity_order": "priority"},
    {"adaptive": "bands", "bands": [0.8, 0.95]},
    {"adaptive": "mass", "mass": 0.5, "renormalize": True},
    {"policy": "sigmoid", "renormalize": True},
    {"policy": "group_limited", "num_groups": 3, "top_groups": 2},
    {"policy": "group_limited", "gate": "sigmoid", "num_groups": 3, "top_groups": 1},
    {"policy": "expert_choice", "capacity": 3},
]
native_only = pytest.mark.parametrize("backend", backends_of("moe", "cpu"))


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("score", ["router", "logits"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("T", [0, 1, 40])
def test_one_call_has_the_bits_of_two(
    T: int, routing: dict[str, Any], score: str, dtype: torch.dtype, backend: str
) -> None:
    """Twice each: the second one repeats what the first has learned."""
    case = cases.MoeCase(score, T=T, E=6, D=40, F=33, bias=True, options=routing)
    args, options = case.build(dtype)
    mlp = {name: options[name] for name in MLP_OPTIONS if name in options}
    for _ in range(2):
        got = gk.moe(*args, **options)
        if score == "logits":
            want = _composed(*args, **options, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        again = gk.expert_mlp(args[0], got[1], got[2], *args[1:3], *args[6:8], **mlp)
        assert torch.equal(got[0], again)
    if T == 40 and ("capacity" in options or "adaptive" in options):
        assert bool((got[2] == 6).any())  # unused slots


@native_only
@pytest.mark.parametrize("noise", [False, True])
def test_one_call_passes_bias_and_noise(noise: bool, backend: str) -> None:
    args, _ = cases.MoeCase("logits", T=9).build()
    random = torch.Generator().manual_seed(5)
    bias_E, noise_TE = (torch.randn(shape, generator=random) for shape in ((5,), (9, 5)))
    given = (*args, None, noise_TE) if noise else (*args, bias_E, None)
    options: dict[str, Any] = {"noise_std": 0.5} if noise else {"policy": "sigmoid"}
    got, want = gk.moe(*given, **options), _composed(*given, **options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(gk.moe(*args, **options)[2], got[2])


@native_only
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("router_dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_scores_are_sums_in_float32(
    dtype: torch.dtype, router_dtype: torch.dtype, strided: bool, backend: str
) -> None:
    """Sigmoid gates tell the scores; rounded to bfloat16 these would be 2^-9 away."""
    T, E, D = 7, 37, 1000
    random = torch.Generator().manual_seed(3)
    x_TD = torch.randn(T, D, generator=random).to(dtype)
    router_ED = (torch.randn(E, D, generator=random) * D**-0.5).to(router_dtype)
    if strided:
        x_TD, router_ED = (t.mT.contiguous().mT for t in (x_TD, router_ED))
    up_EHD, down_EDF = torch.ones(E, 2, D, dtype=dtype), torch.ones(E, D, 1, dtype=dtype)
    out = gk.moe(x_TD, up_EHD, down_EDF, E, router_ED, policy="sigmoid", backend=backend)
    chosen_TK = torch.logit(out[1].double())
    score_TE = torch.empty_like(chosen_TK).scatter_(1, out[2].long(), chosen_TK)
    truth = x_TD.double() @ router_ED.double().mT
    sizes = x_TD.double().abs() @ router_ED.double().abs().mT
    # A gate is rounded to float32 too, which moves its logit by a share of 1 / (p (1 - p)).
    slope = 1 / (truth.sigmoid() * torch.sigmoid(-truth))
    assert ((score_TE - truth).abs() <= 1e-6 * sizes + 3e-7 * slope).all()


@native_only
def test_frozen_weights_are_checked_in_every_call(backend: str) -> None:
    args, _ = cases.MoeCase().build()
    want, frozen_E = gk.moe(*args, backend=backend), torch.ones(5, dtype=torch.bool)
    got = gk.moe(*args[:8], frozen_E)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=r"expert_mlp: frozen_E must be of shape \(5,\)"):
        gk.moe(*args[:8], frozen_E[:4])


@native_only
def test_autocast_has_the_bits_of_two_calls(backend: str) -> None:
    args, _ = cases.MoeCase("logits", T=21, bias=True).build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = gk.moe(*args), _composed(*args, backend=backend)
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", backends_of("moe"))
def test_compiles_whole_without_gradients(backend: str) -> None:
    args, options = cases.MoeCase(bias=True, options={"renormalize": True}).build()

    def layer(*a: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = gk.moe(*a, **options, backend=backend)
        return outputs

    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
        assert all(torch.equal(a, b) for a, b in zip(got, layer(*args), strict=True))


def test_is_a_dense_softmax_mixture_when_every_expert_serves() -> None:
    """k = E: a layer written without any of our ops, and its gradients."""
    case = cases.MoeCase(top_k=5, bias=True)
    args, _ = case.build(torch.float64)
    x, up, down, top_k, router, _, bias_up, bias_down = args[:8]
    inputs = [a.requires_grad_() for a in (x, up, down, router, bias_up, bias_down)]
    gate_TE = torch.softmax(x @ router.mT, dim=1)
    gate, value = (torch.einsum("td,ehd->teh", x, up) + bias_up).chunk(2, dim=2)
    y_TED = torch.einsum("tef,edf->ted", functional.silu(gate) * value, down) + bias_down
    dense = torch.einsum("te,ted->td", gate_TE, y_TED)
    got = gk.moe(x, up, down, top_k, router, None, bias_up, bias_down)[0]
    torch.testing.assert_close(got, dense)
    grad_TD = torch.randn_like(dense)
    want = torch.autograd.grad(dense, inputs, grad_TD)
    for a, b in zip(torch.autograd.grad(got, inputs, grad_TD), want, strict=True):
        torch.testing.assert_close(a, b)


def test_is_a_loop_over_the_best_experts() -> None:
    args, _ = cases.MoeCase(top_k=2, options={"renormalize": True}).build(torch.float64)
    x, up, down, top_k, router = args[:5]
    want = torch.zeros_like(x)
    for t in range(x.shape[0]):
        p_E = torch.softmax(router @ x[t], dim=0)
        best = p_E.argsort(descending=True)[:top_k]
        for e in best:
            gate, value = (up[e] @ x[t]).chunk(2)
            want[t] += p_E[e] / p_E[best].sum() * (down[e] @ (functional.silu(gate) * value))
    got = gk.moe(x, up, down, top_k, router, renormalize=True)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "case",
    [
        cases.MoeCase(T=5, E=4, D=3, F=2, bias=True),
        cases.MoeCase("logits", T=5, E=4, D=3, F=2, options={"policy": "sigmoid"}),
        cases.MoeCase("neither", T=5, E=4, D=3, F=2, entropy="TE", options={"policy": "egs"}),
        cases.MoeCase("neither", T=5, E=4, D=3, F=2, entropy="E", options={"policy": "egs"}),
    ],
    ids=str,
)
def test_gradients_are_exact(case: cases.MoeCase) -> None:
    """Of the output and of every statistic, in x, router or logits or entropies, and weights."""
    args, options = case.build(torch.float64)
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    inputs = [args[i].requires_grad_() for i in leaves]

    def layer(*given: Tensor) -> list[Tensor]:
        changed = {**dict(enumerate(args)), **dict(zip(leaves, given, strict=True))}
        outputs = gk.moe(*changed.values(), **options)
        return [t for t in outputs if t.is_floating_point() and t.requires_grad]

    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("case", cases.moe, ids=str)
def test_training_runs_the_two_ops(case: cases.MoeCase) -> None:
    args, options = case.build()
    inference = gk.moe(*args, **options)
    args[0].requires_grad_()
    with gk.profiling.record() as counts:
        training = gk.moe(*args, **options, backend="torch")
    assert {"route", "expert_mlp_train"} <= {name for name, _ in counts.table}
    assert "moe" not in {name for name, _ in counts.table}
    for a, b in zip(training, inference, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad(), gk.profiling.record() as counts:
        gk.moe(*args, **options)
    assert "moe" in {name for name, _ in counts.table}


def test_frozen_experts_get_no_gradient() -> None:
    args, options = cases.MoeCase(bias=True).build()
    frozen_E = torch.tensor([True, False, True, False, False])
    args = (*args[:8], frozen_E, *args[9:])
    weights = [args[i].requires_grad_() for i in (1, 2, 6, 7)]
    out_TD = gk.moe(*args, **options)[0]
    for grad in torch.autograd.grad(out_TD.square().sum(), weights):
        assert not grad[frozen_E].any()
        assert grad[~frozen_E].any()


@given(st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_permuting_tokens_permutes_outputs(T: int, seed: int) -> None:
    args, _ = cases.MoeCase(T=T).build(torch.float64)
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    got = gk.moe(args[0][order_T], *args[1:])
    want = gk.moe(*args)
    for i in range(4):
        torch.testing.assert_close(got[i], want[i][order_T])
    for i in range(4, 7):
        torch.testing.assert_close(got[i], want[i])


def test_has_the_options_of_its_two_ops() -> None:
    def options(name: str) -> dict[str, Any]:
        arguments = gk.OPS[name].overload._schema.arguments
        return {a.name: (a.type, a.default_value) for a in arguments if a.kwarg_only}

    assert {str(k): str(v) for k, v in options("moe").items()} == {
        str(k): str(v) for k, v in {**options("expert_mlp"), **options("route")}.items()
    }


def test_declared_work_is_the_work() -> None:
    args, _ = cases.MoeCase(T=8, E=4, D=6, F=5, bias=True).build()
    with FlopCounterMode(display=False) as counter:
        moe_reference(*args)
    routing = gk.route.cost_of(torch.zeros(8, 4), 2).flops
    mlp = 2 * 8 * 2 * 6 * (10 + 5)
    assert gk.moe.cost_of(*args).flops == mlp + 2 * 8 * 4 * 6 + routing
    assert counter.get_total_flops() == 2 * 8 * 4 * 6  # the router; torch does not count our ops


# torch's check of fake tensors looks at .grad of tensors inside the layer, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", backends_of("moe"))
def test_opcheck(backend: str, grad: bool) -> None:
    args, options = cases.MoeCase(bias=True, options={"renormalize": True}).build()
    for a in args:
        if isinstance(a, Tensor):
            a.requires_grad_(grad)
    torch.library.opcheck(torch.ops.gose.moe.default, args, {**options, "backend": backend})


def test_autocast_keeps_the_router_exact() -> None:
    args, _ = cases.MoeCase(bias=True).build()
    leaves = [a.requires_grad_() for a in args if isinstance(a, Tensor)]
    with torch.autocast("cpu", torch.bfloat16):
        got = gk.moe(*args, backend="torch")
    half = [a.detach().bfloat16() if isinstance(a, Tensor) else a for a in args]
    router_ED = args[4].detach()
    for a, b in zip(got, gk.moe(*half[:4], router_ED, *half[5:], backend="torch"), strict=True):
        assert torch.equal(a, b)
    got[0].float().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in leaves)


def test_compiles_whole_with_gradients() -> None:
    args, options = cases.MoeCase(bias=True, options={"renormalize": True}).build()
    inputs = [a.requires_grad_() for a in args if isinstance(a, Tensor)]

    def loss(*a: Any) -> Tensor:
        outputs = gk.moe(*a, **options)
        total: Tensor = outputs[0].square().sum() + outputs[6].sum()
        return total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args)
    eager = loss(*args)
    torch.testing.assert_close(compiled, eager)
    for got, want in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


_X, _UP, _DOWN, _ROUTER = (
    torch.zeros(3, 5),
    torch.zeros(4, 12, 5),
    torch.zeros(4, 5, 6),
    torch.zeros(4, 5),
)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((_X[0], _UP, _DOWN, 2, _ROUTER), {}, "moe: x_TD must have 2 dimensions and w_up_EHD 3"),
        (
            (_X, _UP, _DOWN, 2),
            {},
            r"moe: exactly one of w_router_ED and logits_TE must be given \(policy egs may have "
            r"neither\), got 0 with policy softmax",
        ),
        (
            (_X, _UP, _DOWN, 2, _ROUTER, torch.zeros(3, 4)),
            {"policy": "egs"},
            "moe: exactly one of .* got 2 with policy egs",
        ),
        (
            (_X, _UP, _DOWN, 2, _ROUTER[:3]),
            {},
            r"moe: w_router_ED must be floating point of shape \(4, 5\), got torch.float32 of "
            r"shape \(3, 5\)",
        ),
        (
            (_X, _UP, _DOWN, 2, None, torch.zeros(3, 4).int()),
            {},
            r"moe: logits_TE must be floating point of shape \(3, 4\), got torch.int32",
        ),
        ((_X, _UP, _DOWN, 5, _ROUTER), {}, r"route: top_k must be in \[1, E=4\], got 5"),
        ((_X, _UP, _DOWN, 2), {"policy": "egs"}, "route: exactly one of entropy_TE and entropy_E"),
        (
            (_X, _UP, _DOWN[:, :, :5], 2, _ROUTER),
            {},
            r"expert_mlp: w_up_EHD must be of shape \(4, 10, 5\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", backends_of("moe"))
def test_refusals(
    args: tuple[Any, ...], options: dict[str, Any], message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gk.moe(*args, **options, backend=backend)
