"""squared_grad against per-sample gradients, on every backend that runs here."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gose_kernels as gk
from gose_kernels.ops.squared_grad import squared_grad_reference
from tests import cases
from tests.checks import assert_close_within_ulps, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def _oracle(
    x_ND: Tensor, grad_NF: Tensor, sample_N: Tensor | None, offset_E1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whole per-sample gradients, an expert and a sample at a time, in float64."""
    x_ND, grad_NF = x_ND.double(), grad_NF.double()
    rows = x_ND.shape[0]
    sample = torch.arange(rows) if sample_N is None else sample_N
    offset = [0, rows] if offset_E1 is None else offset_E1.tolist()
    squares, biases = [], []
    for start, stop in pairwise(offset):
        square = torch.zeros(grad_NF.shape[1], x_ND.shape[1], dtype=torch.float64)
        bias = torch.zeros(grad_NF.shape[1], dtype=torch.float64)
        for b in sample[start:stop].unique():
            of_sample = [n for n in range(start, stop) if sample[n] == b]
            per_sample = sum(grad_NF[n, :, None] * x_ND[n, None, :] for n in of_sample)
            square += per_sample**2
            bias += sum(grad_NF[n] for n in of_sample) ** 2
        squares.append(square)
        biases.append(bias)
    if offset_E1 is None:
        return squares[0], biases[0]
    return torch.stack(squares), torch.stack(biases)


@pytest.mark.parametrize("case", cases.squared_grad, ids=str)
def test_reference_is_the_formula(case: cases.SquaredGradCase) -> None:
    args = case.build(torch.float64)
    for got, want in zip(squared_grad_reference(*args), _oracle(*args), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", cases.squared_grad, ids=str)
@pytest.mark.parametrize("backend", backends_of("squared_grad", interpreted=12))
def test_matches_per_sample_gradients(
    case: cases.SquaredGradCase, dtype: torch.dtype, backend: str
) -> None:
    args = case.build(dtype)
    got = gk.squared_grad(*args, backend=backend)
    same = squared_grad_reference(*args)
    for one, own, truth in zip(got, same, _oracle(*args), strict=True):
        assert one.dtype == torch.float32
        assert_close_within_ulps(one, own, truth)
        norm = truth.norm()
        assert (own - truth).norm() <= 1e-6 * norm


def test_is_the_diagonal_of_the_fisher_of_a_network() -> None:
    """Squared per-sample gradients of torch.func on a network with several tokens per sample."""
    random = torch.Generator().manual_seed(2)
    B, T, D, F, C = 6, 4, 5, 7, 3
    x_BTD = torch.randn(B, T, D, generator=random, dtype=torch.float64)
    label_B = torch.randint(0, C, (B,), generator=random)
    parameters = {
        "w_FD": torch.randn(F, D, generator=random, dtype=torch.float64),
        "bias_F": torch.randn(F, generator=random, dtype=torch.float64),
        "head_CF": torch.randn(C, F, generator=random, dtype=torch.float64),
    }

    def tail(hidden_BTF: Tensor, head_CF: Tensor) -> Tensor:
        return torch.tanh(hidden_BTF).mean(dim=-2) @ head_CF.mT

    def loss_of_one(p: dict[str, Tensor], x_TD: Tensor, label: Tensor) -> Tensor:
        logits_C = tail(x_TD @ p["w_FD"].mT + p["bias_F"], p["head_CF"])
        return torch.nn.functional.cross_entropy(logits_C, label)

    per_sample = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(
        parameters, x_BTD, label_B
    )
    hidden_BTF = (x_BTD @ parameters["w_FD"].mT + parameters["bias_F"]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(tail(hidden_BTF, parameters["head_CF"]), label_B)
    (grad_BTF,) = torch.autograd.grad(loss, hidden_BTF)
    sample_N = torch.arange(B).repeat_interleave(T).int()
    got = gk.squared_grad(x_BTD.flatten(0, 1), B * grad_BTF.flatten(0, 1), sample_N)
    torch.testing.assert_close(got[0], per_sample["w_FD"].square().sum(dim=0))
    torch.testing.assert_close(got[1], per_sample["bias_F"].square().sum(dim=0))


def test_is_the_fisher_of_experts_in_dispatch_order() -> None:
    """Every expert weight's per-sample gradient of grouped_gemm, a sample at a time."""
    random = torch.Generator().manual_seed(3)
    B, T, K, E, D, F = 5, 3, 2, 4, 6, 5
    N = B * T
    x_ND = torch.randn(N, D, generator=random, dtype=torch.float64)
    w_EFD = torch.randn(E, F, D, generator=random, dtype=torch.float64, requires_grad=True)
    expert_TK = torch.rand(N, E, generator=random).argsort(dim=1)[:, :K].int()
    expert_TK[::5, 1] = E
    _, token_N, offset_E1 = gk.dispatch(expert_TK, E)
    sample_T = torch.arange(B).repeat_interleave(T).int()
    used_N = token_N >= 0
    x_sorted_ND = torch.where(used_N[:, None], x_ND[token_N], torch.nan)
    sample_N = torch.where(used_N, sample_T[token_N], -9)
    y_NF = gk.grouped_gemm(x_sorted_ND, w_EFD, offset_E1)
    loss_N = torch.tanh(y_NF).sum(dim=1)
    expected_EFD = torch.zeros_like(w_EFD)
    for b in range(B):
        loss = loss_N[(sample_N == b) & used_N].sum()
        (grad_EFD,) = torch.autograd.grad(loss, w_EFD, retain_graph=True)
        expected_EFD += grad_EFD**2
    (grad_NF,) = torch.autograd.grad(loss_N[used_N].sum(), y_NF)
    got = gk.squared_grad(x_sorted_ND, grad_NF, sample_N, offset_E1)[0]
    torch.testing.assert_close(got, expected_EFD.detach())


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_of_any_size_give_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = cases.SquaredGradCase(40, 11, 7, "shuffled", E=3).build(torch.float64)
    whole = squared_grad_reference(*args)
    module = importlib.import_module("gose_kernels.ops.squared_grad")
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    for got, want in zip(squared_grad_reference(*args), whole, strict=True):
        torch.testing.assert_close(got, want)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("samples", ["rows", "one", "runs"])
def test_per_sample_gradients_never_exist_at_once(
    samples: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, D, F = 200, 64, 48
    module = importlib.import_module("gose_kernels.ops.squared_grad")
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1000)
    args = cases.SquaredGradCase(N, D, F, samples).build()
    with _Largest() as largest:
        squared_grad_reference(*args)
    assert largest.elements <= N * max(D, F)  # a copy of the inputs; a sample alone has D * F
    assert 40 * largest.elements < N * D * F


@given(st.integers(0, 24), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_order_of_rows_and_names_of_samples_do_not_matter(N: int, B: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, 4, generator=random, dtype=torch.float64)
    grad_NF = torch.randn(N, 3, generator=random, dtype=torch.float64)
    sample_N = torch.randint(0, B, (N,), generator=random).int()
    order_N = torch.randperm(N, generator=random)
    name_B = torch.randint(-(2**31), 2**31, (1,), generator=random) + torch.arange(B) - B
    renamed_N = name_B.clamp(-(2**31), 2**31 - 1).int()[sample_N.long()]
    if renamed_N.unique().numel() != sample_N.unique().numel():
        return
    want = gk.squared_grad(x_ND, grad_NF, sample_N)
    got = gk.squared_grad(x_ND[order_N], grad_NF[order_N], renamed_N[order_N])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", backends_of("squared_grad"))
@pytest.mark.parametrize("samples", ["rows", "runs", "shuffled", "one"])
def test_sizes_that_cross_every_block_edge(samples: str, backend: str) -> None:
    """More rows than a panel is read in at a time, and many tiles; any number of threads gives the
    same bits."""
    rows, counts = (101, (1,)) if backend == "triton" else (701, (1, 2, 3))
    case = cases.SquaredGradCase(rows, 101, 67, samples, E=3)
    args, before, runs = case.build(), torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            runs.append(gk.squared_grad(*args, backend=backend))
    finally:
        torch.set_num_threads(before)
    doubled = [a.double() if a is not None and a.is_floating_point() else a for a in args]
    exact = squared_grad_reference(*doubled)
    for one, true in zip(runs[0], exact, strict=True):
        assert float((one - true).norm()) <= 1e-6 * float(true.norm())
    if backend == "cpu":
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", backends_of("squared_grad"))
def test_outputs_take_no_gradient(backend: str) -> None:
    x_ND, grad_NF, sample_N, offset_E1 = cases.SquaredGradCase(20, 4, 3, "runs", E=2).build()
    got = gk.squared_grad(
        x_ND.requires_grad_(), grad_NF.requires_grad_(), sample_N, offset_E1, backend=backend
    )
    assert [t.requires_grad for t in got] == [False, False]
    with torch.no_grad():
        plain = gk.squared_grad(x_ND, grad_NF, sample_N, offset_E1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_declared_work_is_the_work() -> None:
    cost = gk.squared_grad.cost_of(*cases.SquaredGradCase(40, 11, 7, "runs", E=4).build())
    assert cost.flops == 2 * 40 * 11 * 7
    assert cost.bytes == 4 * (40 * (11 + 7) + 4 * 7 * (11 + 1) + 40 + 5)


@pytest.mark.parametrize(
    "case", [cases.SquaredGradCase(9, 4, 3, s, E=E) for s in ("rows", "runs") for E in (None, 2)]
)
@pytest.mark.parametrize("backend", backends_of("squared_grad"))
def test_opcheck(case: cases.SquaredGradCase, backend: str) -> None:
    torch.library.opcheck(torch.ops.gose.squared_grad.default, case.build(), {"backend": backend})


_X, _GRAD = torch.zeros(6, 4), torch.zeros(6, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (_X, _GRAD[:5]),
            r"x_ND and grad_NF must be matrices with as many rows, "
            r"got shapes \(6, 4\) and \(5, 3\)",
        ),
        ((_X[None], _GRAD[None]), "x_ND and grad_NF must be matrices with as many rows"),
        ((_X, _GRAD.half()), "grad_NF must be torch.float32 as x_ND, got torch.float16"),
        (
            (_X, _GRAD, torch.zeros(6)),
            r"sample_N must be int32 of shape \[N=6\], got torch.float32 of shape \(6,\)",
        ),
        ((_X, _GRAD, torch.zeros(5).int()), r"sample_N must be int32 of shape \[N=6\]"),
        (
            (_X, _GRAD, None, torch.tensor([0, 6])),
            r"offset_E1 must be int32 of shape \[E \+ 1\], got torch.int64 of shape \(2,\)",
        ),
        (
            (_X, _GRAD, None, torch.tensor([0, 7]).int()),
            r"offset_E1 must ascend from 0 to at most N=6, got \[0, 7\]",
        ),
        (
            (_X, _GRAD, None, torch.tensor([1, 6]).int()),
            r"offset_E1 must ascend from 0 to at most N=6, got \[1, 6\]",
        ),
    ],
)
@pytest.mark.parametrize("backend", backends_of("squared_grad"))
def test_refusals(args: tuple[Tensor, ...], message: str, backend: str) -> None:
    if backend == "triton" and "must ascend" in message:
        return  # values are trusted on a GPU: to look at them would wait for it
    with pytest.raises(ValueError, match=f"squared_grad: {message}"):
        gk.squared_grad(*args, backend=backend)


def test_compiles_whole() -> None:
    args = cases.SquaredGradCase(20, 4, 3, "runs", E=2).build()
    compiled = torch.compile(lambda *a: gk.squared_grad(*a), fullgraph=True, backend="aot_eager")(
        *args
    )
    for got, want in zip(compiled, gk.squared_grad(*args), strict=True):
        assert torch.equal(got, want)


def test_autocast_leaves_precision_alone() -> None:
    args = cases.SquaredGradCase(20, 4, 3, "runs").build()
    with torch.autocast("cpu", torch.bfloat16):
        got = gk.squared_grad(*args)
    for one, want in zip(got, gk.squared_grad(*args), strict=True):
        assert torch.equal(one, want)
