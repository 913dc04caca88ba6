from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from tests import cases
from tests.checks import backends_of

BACKENDS = backends_of("low_rank")
_DTYPES = [
    pytest.param(dtype, *backend.values, marks=backend.marks, id=f"{dtype}-{backend.id}")
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if dtype != torch.float64 or backend.id == "torch"
]


def gram_schmidt_oracle(x: Tensor, q: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(matrix of the receiver, residual) in float64, where x @ q has full rank."""
    y = x.double() if residual is None else x.double() + residual.double()
    columns: list[Tensor] = []
    for column in (y @ q.double()).T:
        for _ in range(2):
            for done in columns:
                column = column - (column @ done) * done
        columns.append(column / column.norm())
    basis = torch.stack(columns, dim=1)
    received = basis @ (basis.T @ y)
    return received, y - received


@pytest.mark.parametrize(("dtype", "backend"), _DTYPES)
@pytest.mark.parametrize("case", cases.low_rank, ids=str)
def test_factors_satisfy_their_equations(case, dtype, backend):
    x, q, residual = case.build(dtype)
    p, q_new, left = gk.low_rank(x, q, residual, backend=backend)
    y = x.to(q.dtype) if residual is None else x.to(q.dtype) + residual
    eps = 1e-5 if q.dtype == torch.float32 else 1e-13
    size = float(y.abs().max()) + 1e-300
    identity = torch.eye(case.R, dtype=torch.float64)
    torch.testing.assert_close(p.double().T @ p.double(), identity, atol=eps, rtol=0)
    # p spans y @ q, and q' and the residual are what the formulas give for this p
    image = y.double() @ q.double()
    outside = image - p.double() @ (p.double().T @ image)
    assert float(outside.abs().max()) <= 10 * eps * (float(image.abs().max()) + 1e-300)
    torch.testing.assert_close(
        q_new.double(), y.double().T @ p.double(), atol=20 * eps * size, rtol=0
    )
    if residual is None:
        assert left.shape == (0, 0)
    else:
        truth = y.double() - p.double() @ q_new.double().T
        torch.testing.assert_close(left.double(), truth, atol=20 * eps * size, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in cases.low_rank if c.kind == "normal"], ids=str)
def test_the_received_matrix_is_that_of_gram_schmidt(case, backend):
    x, q, residual = case.build()
    p, q_new, left = gk.low_rank(x, q, residual, backend=backend)
    received, truth_left = gram_schmidt_oracle(x, q, residual)
    p32, q32, left32 = gk.low_rank(x, q, residual, backend="torch")
    # An error of the basis reaches every element: what the reference has at worst, each may have.
    pairs = [(p @ q_new.T, p32 @ q32.T, received)]
    pairs += [] if residual is None else [(left, left32, truth_left)]
    for got, own, truth in pairs:
        rms = float(truth.square().mean().sqrt())
        allowed = max(1e-6 * rms, 2 * float((own - truth).abs().max()))
        assert float((got - truth).abs().max()) <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_of_rank_r_is_sent_exactly(backend):
    random = torch.Generator().manual_seed(1)
    left, right = torch.randn(50, 3, generator=random), torch.randn(40, 3, generator=random)
    x, q = left @ right.T, torch.randn(40, 3, generator=random)
    p, q_new, _ = gk.low_rank(x, q, backend=backend)
    torch.testing.assert_close(p @ q_new.T, x, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start_converges_to_the_best_approximation(backend):
    random = torch.Generator().manual_seed(2)
    u, _, v = torch.linalg.svd(torch.randn(40, 40, generator=random))
    values = 0.7 ** torch.arange(40)
    x, q = (u * values) @ v, torch.randn(40, 4, generator=random)
    errors = []
    for _ in range(25):
        p, q, _ = gk.low_rank(x, q, backend=backend)
        errors.append(float((x - p @ q.T).norm()))
    best = float(values[4:].norm())  # Eckart and Young 1936
    assert errors[0] > 1.01 * best
    assert errors[-1] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_feedback_telescopes_and_delivers_what_the_rank_left_out(backend):
    random = torch.Generator().manual_seed(3)
    x, q = torch.randn(30, 20, generator=random), torch.randn(20, 2, generator=random)
    residual, sent = torch.zeros(30, 20), torch.zeros(30, 20)
    for rounds in range(1, 61):
        p, q, residual = gk.low_rank(x, q, residual, backend=backend)
        sent += p @ q.T
        torch.testing.assert_close(sent + residual, rounds * x, atol=2e-3, rtol=0)
    # without feedback the mean of what was sent would stay at rank 2
    assert float((sent / 60 - x).norm() / x.norm()) < 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_zeros_can_start_again(backend):
    x, zeros = torch.randn(30, 20, generator=torch.Generator().manual_seed(4)), torch.zeros(20, 2)
    _, q, _ = gk.low_rank(torch.zeros(30, 20), zeros, backend=backend)
    assert not q.any()
    p, q, _ = gk.low_rank(x, q, backend=backend)
    assert float((x - p @ q.T).norm()) < float(x.norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_cross_every_block_edge(backend):
    """More rows, columns and ranks than the kernel stages at a time, none a multiple of anything;
    any number of threads gives the same bits."""
    random = torch.Generator().manual_seed(6)
    x, q = torch.randn(203, 1061, generator=random), torch.randn(1061, 21, generator=random)
    residual, before = torch.randn(203, 1061, generator=random), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(gk.low_rank(x, q, residual, backend=backend))
    finally:
        torch.set_num_threads(before)
    received, left = gram_schmidt_oracle(x, q, residual)
    p, q_new, got_left = runs[0]
    torch.testing.assert_close((p @ q_new.T).double(), received, atol=2e-5, rtol=0)
    torch.testing.assert_close(got_left.double(), left, atol=2e-5, rtol=0)
    if backend == "cpu":
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_factors_can_be_quantized():
    """R = 4 factors in int8 of a 1000 x 1000 matrix: 8250 bytes, and the pair's error feedback."""
    random = torch.Generator().manual_seed(5)
    x, q = torch.randn(1000, 1000, generator=random), torch.randn(1000, 4, generator=random)
    factors = gk.low_rank(x, q)[:2]
    decoded, wire_bytes = [], 0
    for factor in factors:
        code, scale, _ = gk.quantize(factor, format="int8_b64_f16")
        wire_bytes += code.numel() + 2 * scale.numel()
        decoded.append(gk.dequantize(code, scale, 4000, format="int8_b64_f16").view(1000, 4))
    assert wire_bytes == 8252
    exact, coded = factors[0] @ factors[1].T, decoded[0] @ decoded[1].T
    assert float((coded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.low_rank[::4], ids=str)
def test_opcheck(case, backend):
    torch.library.opcheck(torch.ops.gose.low_rank.default, case.build(), {"backend": backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend):
    x, q, left = torch.zeros(10, 8), torch.zeros(8, 2), torch.zeros(10, 8)
    for args, message in [
        (
            (x[0], q),
            r"x_MN must be floating point with 2 dimensions, got torch.float32 of .*\(8,\)",
        ),
        ((x.int(), q), r"x_MN must be floating point with 2 dimensions, got torch.int32"),
        ((x, q.T), r"q_NR must be torch.float32 of shape \(8, R\), got torch.float32 .*\(2, 8\)"),
        ((x, q.double()), r"q_NR must be torch.float32 .* got torch.float64"),
        ((x.bfloat16(), q.bfloat16()), r"q_NR must be torch.float32 .* got torch.bfloat16"),
        ((x, torch.zeros(8, 0)), r"rank R=0 must be at least 1"),
        ((x, torch.zeros(8, 5)), r"rank R=5 .* R \* \(M \+ N\) < M \* N, got 90 and 80"),
        ((torch.zeros(4, 4), torch.zeros(4, 2)), r"rank R=2 .* got 16 and 16"),
        ((torch.zeros(0, 8), q), r"rank R=2 .* got 16 and 0"),
        ((x, q, left.T), r"residual_MN must be torch.float32 of shape \(10, 8\)"),
        ((x, q, left.double()), r"residual_MN must be torch.float32 .* got torch.float64"),
    ]:
        with pytest.raises(ValueError, match="low_rank: " + message):
            gk.low_rank(*args, backend=backend)
    for bad in (math.nan, math.inf):
        x[3, 5] = bad
        with pytest.raises(ValueError, match=rf"must be finite, element \(3, 5\) is {bad}"):
            gk.low_rank(x, q, backend=backend)
