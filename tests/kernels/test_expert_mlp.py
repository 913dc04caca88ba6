"""expert_mlp against its formula in float64, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import gose_kernels as gk
from gose_kernels.ops.expert_mlp import (
    expert_mlp_reference,
)
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of
from tests.expert_mlp_oracle import (
    DTYPES,
    NAMES,
    REFERENCE_ERROR,
    double,
    gradients_of,
    oracle,
    output_grad,
    true_gradients,
    underflows,
)


@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
def test_reference_is_the_formula(case: cases.ExpertMlpCase) -> None:
    args, options = case.build(torch.float64)
    torch.testing.assert_close(expert_mlp_reference(*args, **options), oracle(*args, **options))
    grad_TD = output_grad(case, torch.float64)
    got = gradients_of(gk.expert_mlp, args, {**options, "backend": "torch"}, grad_TD)
    for one, truth in zip(got, true_gradients(case, args, options, grad_TD), strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp", interpreted=12))
def test_matches_reference(case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str) -> None:
    args, options = case.build(dtype)
    got = gk.expert_mlp(*args, **options, backend=backend)
    truth = oracle(*double(args), **options)
    same = expert_mlp_reference(*args, **options)
    assert_chain_close_to_truth(got, same, truth, rounded_parts=backend == "triton")
    if not underflows(case, dtype):
        assert (same - truth).norm() <= REFERENCE_ERROR[dtype] * truth.norm()


def test_reference_rounds_where_the_contract_says() -> None:
    """Widths of 1 make every sum one product: pre, a, y and out are rounded, nothing else."""
    (x_TD, weight_TK, expert_TK, up_EHD, down_EDF, *_), _ = cases.ExpertMlpCase(
        T=400, K=1, E=3, D=1, F=1
    ).build(torch.bfloat16)
    e_T = expert_TK[:, 0].long()
    pre_TH = (x_TD.double() * up_EHD.double()[e_T, :, 0]).bfloat16().double()
    a_T = (functional.silu(pre_TH[:, 0]) * pre_TH[:, 1]).bfloat16().double()
    y_T = (a_T * down_EDF.double()[e_T, 0, 0]).bfloat16().double()
    want_T = (weight_TK[:, 0].double() * y_T).bfloat16()
    got_TD = expert_mlp_reference(x_TD, weight_TK, expert_TK, up_EHD, down_EDF)
    # Rounding float64 to float32 first can move a tie: a few in ten thousand.
    assert int((got_TD[:, 0] != want_T).sum()) <= 1


@given(st.integers(0, 12), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_permuting_tokens_permutes_outputs_and_gradients(T: int, K: int, seed: int) -> None:
    case = cases.ExpertMlpCase(T=T, K=K, kind="unused", bias=True)
    (x, weight, expert, *weights), _ = case.build(torch.float64)
    grad_TD = output_grad(case, torch.float64)
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    args, moved = (
        (x, weight, expert, *weights),
        (x[order_T], weight[order_T], expert[order_T], *weights),
    )
    torch.testing.assert_close(gk.expert_mlp(*moved), gk.expert_mlp(*args)[order_T])
    want = gradients_of(gk.expert_mlp, args, {}, grad_TD)
    got = gradients_of(gk.expert_mlp, moved, {}, grad_TD[order_T])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b[order_T] if i < 2 else b)


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_every_expert_on_every_token_is_a_dense_sum(backend: str) -> None:
    case = cases.ExpertMlpCase("gelu", T=9, K=5, E=5, bias=True)
    (x, weight, _, up, down, bias_up, bias_down, *_), options = case.build()
    expert_TK = torch.arange(5).expand(9, 5)
    got = gk.expert_mlp(
        x, weight, expert_TK, up, down, bias_up, bias_down, **options, backend=backend
    )
    pre_TEH = torch.einsum("td,ehd->teh", x, up) + bias_up
    y_TED = torch.einsum("tef,edf->ted", functional.gelu(pre_TEH), down) + bias_down
    torch.testing.assert_close(got, torch.einsum("te,ted->td", weight, y_TED))


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_an_unused_expert_changes_no_bit(backend: str) -> None:
    """An expert of NaN without tokens: outputs and gradients equal, its own gradient exactly 0."""
    case = cases.ExpertMlpCase(kind="unused", bias=True)
    args, _ = case.build()
    expert_TK = torch.where(args[2] == case.E, case.E + 1, args[2])
    more = [torch.cat([a, torch.full_like(a[:1], torch.nan)]) for a in args[3:7]]
    grad_TD, options = output_grad(case, torch.float32), {"backend": backend}
    wider = (*args[:2], expert_TK, *more, None, None)
    assert torch.equal(gk.expert_mlp(*wider, **options), gk.expert_mlp(*args, **options))
    want = gradients_of(gk.expert_mlp, args, options, grad_TD)
    got = gradients_of(gk.expert_mlp, wider, options, grad_TD)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a[:-1], b)
        assert torch.equal(a[-1], torch.zeros_like(a[-1]))


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_tokens_without_experts_are_not_read(backend: str) -> None:
    """They hold NaN, so do the weights of unused slots; they give 0 and get gradient 0."""
    args, _ = cases.ExpertMlpCase(kind="unused").build()
    alone_T = (args[2] == 5).all(dim=1)
    assert args[0][alone_T].isnan().all()
    assert alone_T.any()
    grad_TD = torch.ones_like(args[0])
    grad_TD[alone_T] = torch.nan
    out_TD = gk.expert_mlp(*args, backend=backend)
    assert out_TD.isfinite().all()
    assert torch.equal(out_TD[alone_T], torch.zeros_like(out_TD[alone_T]))
    gradients = gradients_of(gk.expert_mlp, args, {"backend": backend}, grad_TD)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][alone_T].any()
    assert not gradients[1][args[2] == 5].any()


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_a_nan_stays_in_its_token(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(K=1).build()
    grad_TD, options = torch.ones_like(args[0]), {"backend": backend}
    sound_T = torch.arange(13) != 4
    ill_TD = torch.where(sound_T[:, None], args[0], torch.nan)
    ill = (ill_TD, *args[1:])
    out_TD, want_TD = (gk.expert_mlp(*a, **options) for a in (ill, args))
    assert torch.equal(out_TD[sound_T], want_TD[sound_T])
    assert out_TD[4].isnan().all()
    got, want = (gradients_of(gk.expert_mlp, a, options, grad_TD) for a in (ill, args))
    assert torch.equal(got[0][sound_T], want[0][sound_T])
    assert got[0][4].isnan().all()
    for e in set(range(5)) - {int(args[2][4, 0])}:
        assert torch.equal(got[2][e], want[2][e])
        assert torch.equal(got[3][e], want[3][e])


def test_layouts_hold_the_same_numbers() -> None:
    (x, weight, expert, up, down, *rest), _ = cases.ExpertMlpCase().build(torch.float64)
    want = gk.expert_mlp(x, weight, expert, up, down, *rest)
    turned = gk.expert_mlp(x, weight, expert, up.mT, down.mT, *rest, transposed=True)
    torch.testing.assert_close(turned, want)
    pairs = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)
    torch.testing.assert_close(
        gk.expert_mlp(x, weight, expert, pairs, down, *rest, interleaved=True), want
    )
    wide = gk.expert_mlp(x, weight, expert.long(), up, down, *rest)
    assert torch.equal(wide, want)


@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_without_gradients_nothing_is_kept(backend: str) -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    args[3].requires_grad_()
    with torch.inference_mode(), gk.profiling.record() as counts:
        out_TD = gk.expert_mlp(*args, backend=backend)
    assert ("expert_mlp", backend) in counts.table
    assert "expert_mlp_train" not in {name for name, _ in counts.table}
    with gk.profiling.record() as counts:
        trained_TD = gk.expert_mlp(*args, backend=backend)
    assert "expert_mlp" not in {name for name, _ in counts.table}
    assert ("expert_mlp_train", backend) in counts.table
    torch.testing.assert_close(out_TD.clone(), trained_TD.detach())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_opcheck(backend: str, grad: bool) -> None:
    args, options = cases.ExpertMlpCase("geglu", bias=True, frozen=True).build()
    for a in args:
        if a.is_floating_point():
            a.requires_grad_(grad)
    options["backend"] = backend
    torch.library.opcheck(torch.ops.gose.expert_mlp.default, args, options)
    if grad:
        torch.library.opcheck(torch.ops.gose.expert_mlp_train.default, args, options)


def test_autocast_casts_tokens_and_weights_but_not_gates() -> None:
    args, _ = cases.ExpertMlpCase(bias=True).build()
    leaves = [a.requires_grad_() for i, a in enumerate(args[:7]) if i != 2]
    with torch.autocast("cpu", torch.bfloat16):
        out_TD = gk.expert_mlp(*args)
    x, weight, expert, *weights = (a if a is None else a.detach() for a in args)
    half = [a if a is None else a.bfloat16() for a in weights]
    assert torch.equal(out_TD, gk.expert_mlp(x.bfloat16(), weight, expert, *half))
    out_TD.float().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in leaves)


def _call(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Valid arguments (T=3, K=2, E=4, D=5, F=6) with some changed."""
    tensors = {
        "x_TD": torch.zeros(3, 5),
        "weight_TK": torch.zeros(3, 2),
        "expert_TK": torch.zeros(3, 2, dtype=torch.int32),
        "w_up_EHD": torch.zeros(4, 12, 5),
        "w_down_EDF": torch.zeros(4, 5, 6),
        "bias_up_EH": torch.zeros(4, 12),
        "bias_down_ED": torch.zeros(4, 5),
        "frozen_E": torch.zeros(4, dtype=torch.bool),
        "frozen_EF": torch.zeros(4, 6, dtype=torch.bool),
    }
    options = {k: v for k, v in changes.items() if k not in tensors}
    return tuple({**tensors, **changes}[k] for k in tensors), options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "activation must be one of swiglu, .*relu2, got 'swish'"),
        (
            {"activation": "gelu", "interleaved": True},
            "interleaved must be unset for gelu, got True",
        ),
        ({"activation": "gelu", "limit": 7.0}, "limit must be unset for gelu, got 7.0"),
        ({"limit": 0.0}, "limit must be above 0, got 0.0"),
        ({"x_TD": torch.zeros(5)}, r"x_TD must be of 2 dimensions, got shape \(5,\)"),
        ({"x_TD": torch.zeros(3, 5).int()}, "x_TD must be floating point, got torch.int32"),
        ({"w_up_EHD": torch.zeros(12, 5)}, "w_up_EHD must be of 3 dimensions, got shape"),
        ({"w_down_EDF": torch.zeros(5, 6)}, "w_down_EDF must be of 3 dimensions, got shape"),
        (
            {"activation": "silu"},
            r"w_up_EHD must be of shape \(4, 6, 5\) with transposed=False, activation='silu', "
            r"to fit w_down_EDF, got \(4, 12, 5\)",
        ),
        (
            {"transposed": True},
            r"w_up_EHD must be of shape \(4, 6, 10\) with transposed=True, activation='swiglu', "
            r"to fit w_down_EDF, got \(4, 12, 5\)",
        ),
        ({"x_TD": torch.zeros(3, 7)}, "x_TD must be of width D = 5 as w_down_EDF .*, got 7"),
        ({"weight_TK": torch.zeros(6)}, r"weight_TK must be of shape \[T=3, K\], got \(6,\)"),
        (
            {"expert_TK": torch.zeros(3, 1).int()},
            r"expert_TK must be of shape \(3, 2\), got \(3, 1\)",
        ),
        ({"bias_up_EH": torch.zeros(4, 6)}, r"bias_up_EH must be of shape \(4, 12\), got \(4, 6\)"),
        ({"bias_down_ED": torch.zeros(5)}, r"bias_down_ED must be of shape \(4, 5\), got \(5,\)"),
        ({"frozen_E": torch.zeros(3).bool()}, r"frozen_E must be of shape \(4,\), got \(3,\)"),
        (
            {"frozen_EF": torch.zeros(4, 12).bool()},
            r"frozen_EF must be of shape \(4, 6\), got \(4, 12\)",
        ),
        (
            {"weight_TK": torch.zeros(3, 2).half()},
            "weight_TK must be torch.float32 for x_TD of torch.float32, got torch.float16",
        ),
        (
            {"w_up_EHD": torch.zeros(4, 12, 5).half()},
            "w_up_EHD must be torch.float32 as x_TD, got torch.float16",
        ),
        (
            {"bias_down_ED": torch.zeros(4, 5).double()},
            "bias_down_ED must be torch.float32 as x_TD, got torch.float64",
        ),
        ({"frozen_E": torch.zeros(4)}, "frozen_E must be bool, got torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", backends_of("expert_mlp"))
def test_refusals(changes: dict[str, Any], message: str, backend: str) -> None:
    args, options = _call(**changes)
    with pytest.raises(ValueError, match=f"expert_mlp: {message}"):
        gk.expert_mlp(*args, **options, backend=backend)


@pytest.mark.parametrize("expert", [-1, 5])
@pytest.mark.parametrize("backend", backends_of("expert_mlp", "cpu", "torch"))
def test_refuses_an_expert_that_does_not_exist(expert: int, backend: str) -> None:
    args, _ = _call(expert_TK=torch.full((3, 2), expert, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expert_TK must hold experts in \[0, num_experts=4\]"):
        gk.expert_mlp(*args, backend=backend)


@pytest.mark.parametrize("backend", backends_of("expert_mlp_backward"))
def test_backward_refusals(backend: str) -> None:
    args, _ = _call()
    backward = torch.ops.gose.expert_mlp_backward
    with pytest.raises(ValueError, match=r"pre_NH must be of shape \(6, 12\), got \(6, 6\)"):
        backward(*args, torch.zeros(6, 6), torch.zeros(3, 5), backend=backend)
    with pytest.raises(ValueError, match=r"grad_TD must be of shape \(3, 5\), got \(5,\)"):
        backward(*args, torch.zeros(6, 12), torch.zeros(5), backend=backend)
    with pytest.raises(ValueError, match=r"grad_TD must be torch\.float32 as x_TD, got"):
        backward(*args, torch.zeros(6, 12), torch.zeros(3, 5).half(), backend=backend)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_width_that_packs_to_the_same_size_is_refused(transposed: bool) -> None:
    """30 and 32 columns fill the same panels; the first, right call keeps the packed weights."""
    x_TD, weight_TK = torch.randn(5, 32), torch.rand(5, 2)
    expert_TK = torch.zeros(5, 2, dtype=torch.int32)
    up, down = torch.randn(3, 96, 32), torch.randn(3, 32, 48)
    weights = (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)
    gk.expert_mlp(x_TD, weight_TK, expert_TK, *weights, transposed=transposed)
    with pytest.raises(ValueError, match="x_TD must be of width D = 32"):
        gk.expert_mlp(x_TD[:, :30], weight_TK, expert_TK, *weights, transposed=transposed)
