from __future__ import annotations

import math

import pytest
import torch

import gose_kernels as gk
from gose_kernels import masks
from gose_kernels.ops.masked_square_sum import masked_square_sum_reference
from tests.checks import backends_of

BACKENDS = backends_of("masked_square_sum")
SHAPES = [((70, 129), (70, 1)), ((70, 129), (70, 129)), ((5, 6, 32), (5, 3, 2)), ((9001,), ())]


def lists(dtype: torch.dtype):
    random = torch.Generator().manual_seed(2)
    grad = [torch.randn(s, generator=random).to(dtype) for s, _ in SHAPES]
    frozen = [torch.rand(m, generator=random) < 0.5 for _, m in SHAPES]
    return grad, frozen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "bool", "packed", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_live_elements(dtype, kind, backend):
    grad, frozen = lists(dtype)
    expected = []
    for g, mask in zip(grad, frozen, strict=True):
        live = ~masks.spread(mask, g.shape)
        expected.append(
            math.fsum(x * x for x in g[live if kind != "none" else live | True].tolist())
        )
        if kind != "none":
            g[~live] = math.nan
    given = {
        "none": [],
        "bool": frozen,
        "packed": [masks.pack(masks.spread(m, g.shape)) for m, g in zip(frozen, grad, strict=True)],
        "scores": [m.float() for m in frozen],
    }[kind]
    threshold = [1.0] * len(grad) if kind == "scores" else []
    got = gk.masked_square_sum(grad, given, threshold=threshold, backend=backend)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_values_do_not_overflow_and_live_nan_spreads(backend):
    got = gk.masked_square_sum(
        [torch.full((3,), 1e30), torch.tensor([1.0, math.nan]), torch.ones(0)], [], backend=backend
    )
    torch.testing.assert_close(got[0].item(), 3e60, rtol=1e-6, atol=0)
    assert bool(got[1].isnan()) and float(got[2]) == 0
    assert gk.masked_square_sum([], []).shape == (0,)


def test_bits_are_the_same_for_any_number_of_threads():
    grad, frozen = [torch.randn(300_000), torch.randn(1000, 257)], []
    frozen = [torch.tensor(False), torch.rand(1000, 1) < 0.5]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gk.masked_square_sum(grad, frozen, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], masked_square_sum_reference(grad, frozen))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    grad, frozen = lists(torch.float32)
    torch.library.opcheck(
        torch.ops.gose.masked_square_sum.default, (grad, frozen), {"backend": backend}
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend):
    g, mask = torch.ones(4, 5), torch.zeros(4, 1, dtype=torch.bool)
    for args, options, message in [
        (([g], [mask, mask]), {}, r"frozen must have 1 tensors, got 2"),
        (([g], [mask.float()]), {}, r"threshold must have 1 numbers, got 0"),
        (([g], [mask]), {"threshold": [1.0, 2.0]}, r"threshold must have 0 numbers, got 2"),
        (([g], [mask[:3]]), {}, r"frozen\[0\] must have sizes that divide those of grad\[0\]"),
        (([g, g.bfloat16()], []), {}, r"grad\[1\] must have the dtype of grad\[0\]"),
    ]:
        with pytest.raises(ValueError, match="masked_square_sum: " + message):
            gk.masked_square_sum(*args, **options, backend=backend)
    with pytest.raises(ValueError, match=r"takes float32 . bfloat16, got float64|must be float32"):
        gk.masked_square_sum([g.half() if backend == "torch" else g.double()], [], backend=backend)
