from __future__ import annotations

import re

import pytest
import torch

from gose.compress import Section, Spec, decode, pack, unpack
from gose.merge import MERGES, Update, fisher_merge, mean_merge


def _vectors(num: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(200, generator=generator) for _ in range(num)]


def test_mean_is_the_weighted_mean_of_the_sites():
    base, *deltas = _vectors(4)
    merged = mean_merge(base, [Update(d) for d in deltas], [10.0, 20.0, 70.0])
    truth = 0.1 * (base + deltas[0]) + 0.2 * (base + deltas[1]) + 0.7 * (base + deltas[2])
    torch.testing.assert_close(merged, truth)


def test_equal_information_gives_the_mean():
    base, *deltas = _vectors(4)
    quarter = [torch.round(d * 64) / 64 for d in deltas]  # sums of these are exact in float32
    base = torch.round(base * 64) / 64
    ones = torch.ones(200)
    weights = [1.0, 1.0, 2.0]
    mean = mean_merge(base, [Update(d) for d in quarter], weights)
    merged = fisher_merge(base, [Update(d, ones) for d in quarter], weights)
    torch.testing.assert_close(merged, mean, rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(
        fisher_merge(base, [Update(d, 5 * ones) for d in quarter], weights), mean
    )


@pytest.mark.parametrize("method", MERGES)
def test_one_site_is_itself(method):
    base, delta = _vectors(2)
    root = torch.rand(200) + 0.1
    merged = MERGES[method](base, [Update(delta, root)], [17.0])
    torch.testing.assert_close(merged, base + delta, rtol=1e-6, atol=1e-6)
    assert torch.equal(mean_merge(base, [Update(delta)], [17.0]), base + delta)


def test_a_site_that_alone_is_sure_of_an_element_decides_it():
    base, *deltas = _vectors(3)
    sure = torch.zeros(200)
    sure[:10] = 100.0
    other = torch.zeros(200)
    other[10:] = 100.0
    merged = fisher_merge(base, [Update(deltas[0], sure), Update(deltas[1], other)], [1.0, 1.0])
    torch.testing.assert_close(merged[:10], (base + deltas[0])[:10], rtol=0, atol=1e-2)
    torch.testing.assert_close(merged[10:], (base + deltas[1])[10:], rtol=0, atol=1e-2)


def test_fisher_merge_minimises_the_joint_quadratic_loss():
    base, *deltas = [v.double() for v in _vectors(3)]
    roots = [v.double().abs() + 0.1 for v in _vectors(2, seed=5)]
    weights = [0.3, 0.7]
    updates = [Update(d, r) for d, r in zip(deltas, roots, strict=True)]
    theta = fisher_merge(base, updates, weights)
    slope = torch.zeros(200, dtype=torch.float64)
    for delta, root, share in zip(deltas, roots, weights, strict=True):
        curvature = root.square() / root.square().mean() + 1e-3
        slope += share * curvature * (theta - (base + delta))
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", MERGES)
def test_the_order_of_sites_does_not_matter(method):
    base, *deltas = _vectors(4)
    roots = [v.abs() + 0.1 for v in _vectors(3, seed=2)]
    updates = [Update(d, r) for d, r in zip(deltas, roots, strict=True)]
    there = MERGES[method](base, updates, [1.0, 2.0, 3.0])
    back = MERGES[method](base, updates[::-1], [3.0, 2.0, 1.0])
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", MERGES)
def test_permuting_parameters_permutes_the_result_exactly(method):
    base, *deltas = _vectors(3)
    roots = [v.abs() + 0.1 for v in _vectors(2, seed=2)]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    if method == "fisher":  # the mean of the information is a sum: keep its rounding out
        roots = [torch.round(r * 8) / 8 for r in roots]
    merged = MERGES[method](
        base, [Update(d, r) for d, r in zip(deltas, roots, strict=True)], [1, 1]
    )
    permuted = MERGES[method](
        base[order],
        [Update(d[order], r[order]) for d, r in zip(deltas, roots, strict=True)],
        [1, 1],
    )
    assert torch.equal(permuted, merged[order])


def test_coded_updates_merge_as_their_decoded_vectors():
    base, *deltas = _vectors(3)
    spec = Spec("int8_b256_f32", (Section("matrices", 200, True),))
    coded = [
        unpack(pack(spec, {"matrices": d}, site=0, round_=0).packet, spec, site=0, round_=0)[
            "matrices"
        ]
        for d in deltas
    ]
    merged = mean_merge(base, [Update(c) for c in coded], [1.0, 3.0])
    plain = mean_merge(base, [Update(decode(c)) for c in coded], [1.0, 3.0])
    torch.testing.assert_close(merged, plain)
    torch.testing.assert_close(
        merged, mean_merge(base, [Update(d) for d in deltas], [1.0, 3.0]), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(
    ("updates", "weights"), [([], []), ([1], [0.0]), ([1, 1], [1.0]), ([1, 1], [2.0, -1.0])]
)
def test_bad_weights_are_refused(updates, weights):
    vectors = [Update(torch.ones(3)) for _ in updates]
    with pytest.raises(ValueError, match=re.escape(f"and weights {weights}")):
        mean_merge(torch.zeros(3), vectors, weights)


def test_fisher_merge_needs_information():
    with pytest.raises(ValueError, match="every update must carry root_fisher"):
        fisher_merge(torch.zeros(3), [Update(torch.ones(3))], [1.0])
