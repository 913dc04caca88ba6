"""entropy: against sums over Python floats, its gradient, and the traps of -p log p."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.entropy import entropy_backward_reference, entropy_reference
from tests import cases
from tests.checks import assert_close_to_truth, assert_close_within_ulps, backends_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(row: list[float]) -> float:
    """-sum p log p / log n of one row, term by term."""
    offered = [x for x in row if x != -math.inf]
    if len(offered) < 2:
        return 0.0
    power = [math.exp(x - max(offered)) for x in offered]
    p = [w / math.fsum(power) for w in power]
    return -math.fsum(q * math.log(q) for q in p if q > 0) / math.log(len(offered))


def with_grad(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("case", cases.entropy, ids=str)
def test_reference_matches_term_by_term_sums(case):
    x = case.build(torch.float64)
    wanted = [oracle(row) for row in x.reshape(-1, x.shape[-1]).tolist()]
    got = entropy_reference(x)
    assert got.shape == x.shape[:-1]
    torch.testing.assert_close(
        got.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.entropy, ids=str)
@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_entropy_matches_truth(backend, case, dtype):
    x = case.build(dtype)
    got = gk.entropy(x, backend=backend)
    assert_close_to_truth(got, entropy_reference(x), entropy_reference(x.double()))
    assert bool(((got >= 0) & (got <= 1)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.entropy, ids=str)
@pytest.mark.parametrize("backend", backends_of("entropy_backward"))
def test_gradient_matches_truth(backend, case, dtype):
    x = case.build(dtype)
    grad = torch.linspace(-1, 2, x.shape[:-1].numel()).view(x.shape[:-1])
    got = torch.ops.gose.entropy_backward(grad, x, backend=backend)
    truth = entropy_backward_reference(grad.double(), x.double())
    assert_close_within_ulps(got, entropy_backward_reference(grad, x), truth)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("case", cases.entropy, ids=str)
def test_gradient_of_the_reference_is_the_derivative(case):
    x = case.build(torch.float64)
    finite = x.masked_fill(x == -torch.inf, 0).requires_grad_()
    gone = x == -torch.inf
    assert torch.autograd.gradcheck(
        lambda z: gk.entropy(z.masked_fill(gone, -torch.inf), backend="torch"), (finite,)
    )


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_autograd_uses_entropy_backward(backend):
    x = with_grad(torch.tensor([[0.0, 1.0, -2.0], [3.0, 3.0, -torch.inf]]))
    gk.entropy(x, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, entropy_backward_reference(torch.ones(2), x.detach()))


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_one_hot_rows_are_exactly_zero_with_finite_gradient(backend):
    # -(p * log p) is NaN here, torch.special.entr has an infinite gradient.
    x = with_grad(torch.tensor([[1e4, 0.0, -1e4], [0.0, -torch.inf, -torch.inf], [-torch.inf] * 3]))
    out = gk.entropy(x, backend=backend)
    assert out.tolist() == [0.0, 0.0, 0.0]
    out.sum().backward()
    assert x.grad.tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_precision_holds_next_to_a_one_hot_row(backend):
    # At a gap of 30 the entropy is 3e-12; 1 - p rounds to 0 in float32 and -p log p gives 0.
    x = torch.tensor([[30.0, 0.0, 0.0], [18.0, 0.0, -1.0]])
    truth = entropy_reference(x.double())
    error = (gk.entropy(x, backend=backend).double() - truth).abs() / truth
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_label_spaces_of_any_size_are_comparable(backend):
    for classes in (2, 3, 10, 1000):
        x = torch.full((1, 1024), -torch.inf)
        x[:, 5 : 5 + classes] = 3.25
        assert gk.entropy(x, backend=backend).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_nan_and_infinity_stay_visible_in_their_row(backend):
    x = torch.zeros(4, 20)
    x[1, 17] = torch.nan
    x[2, 3] = torch.inf
    assert gk.entropy(x, backend=backend).isnan().tolist() == [False, True, True, False]
    grad = torch.ops.gose.entropy_backward(torch.ones(4), x, backend=backend)
    assert grad.isnan().any(dim=1).tolist() == [False, True, True, False]


def test_autocast_does_not_lower_the_precision():
    x = cases.entropy[0].build()
    with torch.autocast("cpu", torch.bfloat16):
        got = gk.entropy(x)
    assert_close_to_truth(got, entropy_reference(x), entropy_reference(x.double()))


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(-1e3, 1e3), st.randoms())
def test_shifting_and_permuting_classes_changes_nothing(row, shift, random):
    x = torch.tensor(row, dtype=torch.float64)
    permuted = list(row)
    random.shuffle(permuted)
    wanted = entropy_reference(x)
    torch.testing.assert_close(entropy_reference(x + shift), wanted, rtol=1e-9, atol=1e-9)
    moved = entropy_reference(torch.tensor(permuted, dtype=torch.float64))
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backends_of("entropy", "cpu", "torch"))
def test_the_same_bits_for_any_number_of_threads(backend):
    x = torch.randn(3000, 100, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grad = torch.ops.gose.entropy_backward(torch.ones(3000), x, backend=backend)
            results.append((gk.entropy(x, backend=backend), grad))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", backends_of("entropy"))
@pytest.mark.parametrize("case", cases.entropy[::4], ids=str)
def test_opcheck(case, backend):
    x, options = case.build(), {"backend": backend}
    args = (torch.ones(x.shape[:-1]), x)
    torch.library.opcheck(torch.ops.gose.entropy_backward.default, args, options)
    torch.library.opcheck(torch.ops.gose.entropy.default, (x,), options)
    torch.library.opcheck(torch.ops.gose.entropy.default, (with_grad(x),), options)


@pytest.mark.parametrize("backend", backends_of("entropy"))
def test_refusals(backend):
    with pytest.raises(ValueError, match=r"logits_BMC must have a last dimension of at least one"):
        gk.entropy(torch.zeros(3, 0), backend=backend)
    with pytest.raises(ValueError, match=r"logits_BMC must have a last dimension of at least one"):
        gk.entropy(torch.tensor(1.0), backend=backend)
    with pytest.raises(ValueError, match=r"grad_BM must have shape \(2,\), got \(3,\)"):
        torch.ops.gose.entropy_backward(torch.ones(3), torch.ones(2, 4), backend=backend)
    with pytest.raises(ValueError, match=r"grad_BM must be torch.float32 .* got torch.bfloat16"):
        torch.ops.gose.entropy_backward(torch.ones(2).bfloat16(), torch.ones(2, 4), backend=backend)


def test_integer_logits_are_refused():
    with pytest.raises(ValueError, match=r"logits_BMC must be floating point, got torch.int64"):
        gk.entropy(torch.zeros(3, 2, dtype=torch.int64), backend="torch")
