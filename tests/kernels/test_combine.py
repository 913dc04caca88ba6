"""combine against its reference in float64, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gose_kernels as gk
from gose_kernels.ops.combine import combine_backward_reference, combine_reference
from tests import cases
from tests.checks import assert_close_to_truth, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", cases.combine, ids=str)
@pytest.mark.parametrize("backend", backends_of("combine"))
def test_combine_matches_reference(
    case: cases.CombineCase, dtype: torch.dtype, backend: str
) -> None:
    y_ND, weight_TK, row_TK = case.build(dtype)
    got = gk.combine(y_ND, weight_TK, row_TK, backend=backend)
    truth = combine_reference(y_ND.double(), weight_TK.double(), row_TK)
    assert_close_to_truth(got, combine_reference(y_ND, weight_TK, row_TK), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", cases.combine, ids=str)
@pytest.mark.parametrize("backend", backends_of("combine_backward"))
def test_combine_backward_matches_reference(
    case: cases.CombineCase, dtype: torch.dtype, backend: str
) -> None:
    y_ND, weight_TK, row_TK = case.build(dtype)
    grad_TD = case.draw(row_TK.shape[0], y_ND.shape[1]).to(dtype)
    got = torch.ops.gose.combine_backward(grad_TD, y_ND, weight_TK, row_TK, backend=backend)
    same = combine_backward_reference(grad_TD, y_ND, weight_TK, row_TK)
    truth = combine_backward_reference(grad_TD.double(), y_ND.double(), weight_TK.double(), row_TK)
    for got_one, same_one, truth_one in zip(got, same, truth, strict=True):
        assert_close_to_truth(got_one, same_one, truth_one)


def test_reference_is_the_formula() -> None:
    """The contract's index loop, element by element."""
    y_ND, weight_TK, row_TK = cases.CombineCase("loop", T=5, K=3, D=7, unused=0.3).build(
        torch.float64
    )
    out_TD = torch.zeros(5, 7, dtype=torch.float64)
    for t in range(5):
        for k in range(3):
            for d in range(7):
                if row_TK[t, k] >= 0:
                    out_TD[t, d] += weight_TK[t, k] * y_ND[row_TK[t, k], d]
    torch.testing.assert_close(combine_reference(y_ND, weight_TK, row_TK), out_TD)


def test_reference_gradient_is_exact() -> None:
    y_ND, weight_TK, row_TK = cases.CombineCase("grad", T=4, K=3, D=5, unused=0.3).build(
        torch.float64
    )
    y_ND.requires_grad_()
    weight_TK.requires_grad_()
    torch.autograd.gradcheck(lambda y, w: gk.combine(y, w, row_TK), (y_ND, weight_TK))


@pytest.mark.parametrize("backend", backends_of("combine"))
def test_opcheck(backend: str) -> None:
    y_ND, weight_TK, row_TK = cases.CombineCase("opcheck", T=4, K=2, D=9, unused=0.2).build(
        torch.float32
    )
    args = (y_ND.requires_grad_(), weight_TK.requires_grad_(), row_TK)
    torch.library.opcheck(torch.ops.gose.combine.default, args, {"backend": backend})


@pytest.mark.parametrize("backend", backends_of("combine"))
def test_unused_slots_hide_nan(backend: str) -> None:
    """A row that no slot uses may hold anything, and so may the weight of an unused slot."""
    y_ND = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    weight_TK = torch.tensor([[2.0, torch.nan]])
    row_TK = torch.tensor([[0, -1]], dtype=torch.int32)
    got = gk.combine(y_ND, weight_TK, row_TK, backend=backend)
    assert torch.equal(got, torch.tensor([[2.0, 4.0]]))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    y_ND, weight_TK, row_TK = cases.CombineCase("threads", T=997, K=3, D=129).build(torch.float32)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grads = torch.ops.gose.combine_backward(
                y_ND[:997], y_ND, weight_TK, row_TK, backend=backend
            )
            outputs.append((gk.combine(y_ND, weight_TK, row_TK, backend=backend), *grads))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("backend", [p for p in backends_of("combine") if p.id == "triton"])
def test_same_bits_for_any_order_of_programs(backend: str) -> None:
    """No program reads or overwrites what another one writes."""
    from tests import triton_interpreter

    y_ND, weight_TK, row_TK = cases.CombineCase("order", T=9, K=3, D=2500, unused=0.2).build(
        torch.float32
    )
    args = (y_ND[:9], y_ND, weight_TK, row_TK)

    def run() -> tuple[torch.Tensor, ...]:
        grads = torch.ops.gose.combine_backward(*args, backend=backend)
        return (gk.combine(*args[1:], backend=backend), *grads)

    forwards = run()
    with triton_interpreter.programs_backwards():
        backwards = run()
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 40), st.randoms())
def test_permuting_tokens_permutes_outputs(T: int, K: int, D: int, draw: object) -> None:
    seed = draw.randrange(2**31)  # type: ignore[attr-defined]
    case = cases.CombineCase("drawn", T=T, K=K, D=D, unused=0.2, seed=seed)
    y_ND, weight_TK, row_TK = case.build(torch.float32)
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    got = gk.combine(y_ND, weight_TK[order_T], row_TK[order_T])
    assert torch.equal(got, gk.combine(y_ND, weight_TK, row_TK)[order_T])


_Y, _W = torch.zeros(6, 4), torch.zeros(3, 2)
_R = torch.arange(6, dtype=torch.int32).view(3, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((_Y[0], _W, _R), r"y_ND must have 2 dimensions, got shape \(4,\)"),
        ((_Y.int(), _W, _R), "y_ND must be float.* got torch.int32"),
        ((_Y, _W[0], _R), r"weight_TK must have 2 dimensions, got shape \(2,\)"),
        ((_Y, _W, _R[:2]), r"row_TK must have the shape of weight_TK \(3, 2\), got \(2, 2\)"),
        ((_Y, _W, _R.long()), "row_TK must be (torch.)?int32, got torch.int64"),
        ((_Y, _W.half(), _R), "weight_TK must be torch.float32 for y_ND of torch.float32, got "),
    ],
)
@pytest.mark.parametrize("backend", backends_of("combine"))
def test_refusals(args: tuple[torch.Tensor, ...], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"combine: {message}"):
        gk.combine(*args, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_refuses_rows_outside(backend: str) -> None:
    for row_TK in (_R + 1, _R - 2):
        with pytest.raises(ValueError, match=r"row_TK must hold rows in \[0, N=6\) or -1"):
            gk.combine(_Y, _W, row_TK, backend=backend)


@pytest.mark.parametrize(
    ("grad_TD", "message"),
    [
        (torch.zeros(3, 5), r"grad_TD must have shape \(3, 4\), got \(3, 5\)"),
        (torch.zeros(3, 4).half(), "grad_TD must be torch.float32, got torch.float16"),
    ],
)
@pytest.mark.parametrize("backend", backends_of("combine_backward"))
def test_backward_refuses_gradients_that_do_not_fit(
    grad_TD: torch.Tensor, message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.gose.combine_backward(grad_TD, _Y, _W, _R, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_backward_refuses_a_row_used_twice(backend: str) -> None:
    with pytest.raises(ValueError, match="row_TK must use every row of y_ND at most once"):
        torch.ops.gose.combine_backward(torch.zeros(3, 4), _Y, _W, _R * 0, backend=backend)


def test_compiles_whole_with_gradients() -> None:
    y_ND, weight_TK, row_TK = cases.CombineCase("compile", T=8, K=2, D=16).build(torch.float32)
    y_ND.requires_grad_()
    eager = gk.combine(y_ND, weight_TK, row_TK).square().sum()
    compiled = torch.compile(
        lambda *args: gk.combine(*args).square().sum(), fullgraph=True, backend="aot_eager"
    )(y_ND, weight_TK, row_TK)
    torch.testing.assert_close(compiled, eager)
    compiled_grad = torch.autograd.grad(compiled, y_ND)[0]
    torch.testing.assert_close(compiled_grad, torch.autograd.grad(eager, y_ND)[0])
