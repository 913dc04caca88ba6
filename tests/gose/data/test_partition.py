from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gose.data import partition


def labels(num_images: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(num_classes, (num_images,), generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_every_index_once(parts: list[torch.Tensor], num_images: int) -> None:
    assert sorted(index for part in parts for index in part.tolist()) == list(range(num_images))
    assert all(
        part.dtype == torch.int64 and part.tolist() == sorted(part.tolist()) for part in parts
    )


@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=50)
def test_iid_uses_every_index_once_in_equal_parts(num_images, num_classes, seed, data):
    num_sites = data.draw(st.integers(1, num_images))
    parts = partition.iid(labels(num_images, num_classes), num_sites, generator=generator(seed))
    assert_every_index_once(parts, num_images)
    sizes = [len(part) for part in parts]
    assert len(sizes) == num_sites
    assert max(sizes) - min(sizes) <= 1


@given(
    st.integers(20, 200),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 99),
    st.floats(0.05, 50),
)
@settings(deadline=None, max_examples=50)
def test_dirichlet_uses_every_index_once(num_images, num_classes, num_sites, seed, alpha):
    label_B = labels(num_images, num_classes)
    parts = partition.dirichlet(
        label_B, num_sites, alpha=alpha, min_size=0, generator=generator(seed)
    )
    assert len(parts) == num_sites
    assert_every_index_once(parts, num_images)


@given(st.integers(1, 10), st.integers(1, 8), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=50)
def test_pathological_gives_exactly_the_wanted_classes(num_classes, num_sites, seed, data):
    label_B = torch.arange(num_classes).repeat(20)[
        torch.randperm(20 * num_classes, generator=generator(1))
    ]
    least = -(-num_classes // num_sites)
    per_site = data.draw(st.integers(least, num_classes)) if least <= num_classes else num_classes
    parts = partition.pathological(
        label_B, num_sites, classes_per_site=per_site, generator=generator(seed)
    )
    assert_every_index_once(parts, len(label_B))
    held = [set(label_B[part].tolist()) for part in parts]
    assert [len(classes) for classes in held] == [per_site] * num_sites
    holders = [sum(label in classes for classes in held) for label in range(num_classes)]
    assert max(holders) - min(holders) <= 1
    for label, count in enumerate(holders):
        shares = [int((label_B[part] == label).sum()) for part in parts]
        assert max(shares) <= -(-20 // count)


def test_class_ids_need_not_be_contiguous():
    label_B = torch.tensor([3, 9, 3, 9, 40, 40])
    for parts in (
        partition.dirichlet(label_B, 2, alpha=1.0, generator=generator(0)),
        partition.pathological(label_B, 3, classes_per_site=1, generator=generator(0)),
    ):
        assert_every_index_once(parts, 6)


def test_dirichlet_shares_follow_the_law():
    # Share of one site: mean 1/S, variance (1/S)(1 - 1/S)/(S alpha + 1); classes are drawn apart.
    num_sites, alpha, num_classes, per_class = 4, 0.5, 2000, 100
    label_B = torch.arange(num_classes).repeat_interleave(per_class)
    parts = partition.dirichlet(label_B, num_sites, alpha=alpha, min_size=0, generator=generator(0))
    share_SC = (
        torch.stack([label_B[part].bincount(minlength=num_classes) for part in parts]) / per_class
    )
    wanted = (1 / num_sites) * (1 - 1 / num_sites) / (num_sites * alpha + 1)
    # 2000 draws of a value with standard deviation 0.25: 5 standard errors of the mean are 0.028
    assert (share_SC.mean(dim=1) - 1 / num_sites).abs().max() < 0.028
    assert (share_SC.var(dim=1) / wanted - 1).abs().max() < 0.12


def test_dirichlet_skew_grows_as_alpha_falls():
    label_B = torch.arange(10).repeat(500)

    def largest_share(alpha: float) -> float:
        parts = partition.dirichlet(label_B, 3, alpha=alpha, generator=generator(1))
        count_SC = torch.stack([label_B[part].bincount(minlength=10) for part in parts])
        return float((count_SC.amax(dim=0) / 500).mean())

    assert largest_share(0.1) > 0.8 > 0.4 > largest_share(1000.0)


def test_dirichlet_draws_again_until_min_size():
    label_B = labels(600, 3)
    sizes = [
        min(
            len(part)
            for part in partition.dirichlet(
                label_B, 4, alpha=0.3, min_size=60, generator=generator(seed)
            )
        )
        for seed in range(10)
    ]
    assert min(sizes) >= 60
    small = [
        min(
            map(len, partition.dirichlet(label_B, 4, alpha=0.3, min_size=0, generator=generator(s)))
        )
        for s in range(10)
    ]
    assert min(small) < 60  # so the draws above were repeated


def test_alpha_so_small_that_weights_underflow_still_gives_every_index():
    parts = partition.dirichlet(labels(90, 9), 3, alpha=1e-300, min_size=0, generator=generator(0))
    assert_every_index_once(parts, 90)


@pytest.mark.parametrize(
    "divide",
    [
        partition.iid,
        lambda *a, **k: partition.dirichlet(*a, alpha=0.3, **k),
        lambda *a, **k: partition.pathological(*a, classes_per_site=2, **k),
    ],
)
def test_the_generator_alone_decides(divide):
    label_B = labels(100, 5)
    runs = [divide(label_B, 3, generator=generator(seed)) for seed in (7, 7, 8)]
    assert [part.tolist() for part in runs[0]] == [part.tolist() for part in runs[1]]
    assert [part.tolist() for part in runs[0]] != [part.tolist() for part in runs[2]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iid", {"num_sites": 0}, r"iid: num_sites must be in \[1, 10\] .* got 0"),
        ("iid", {"num_sites": 11}, r"num_sites must be in \[1, 10\] .* got 11"),
        (
            "iid",
            {"label_B": torch.zeros(10)},
            r"vector of class ids, got shape \(10,\) torch.float32",
        ),
        ("iid", {"label_B": torch.zeros(5, 2, dtype=torch.int64)}, r"got shape \(5, 2\)"),
        ("dirichlet", {"alpha": 0.0}, "alpha must be positive and finite, got 0"),
        ("dirichlet", {"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ("dirichlet", {"alpha": float("inf")}, "alpha must be positive and finite, got inf"),
        ("dirichlet", {"alpha": 1.0, "min_size": 4}, r"min_size must be in \[0, 3\] .* got 4"),
        ("dirichlet", {"alpha": 1.0, "min_size": -1}, r"min_size must be in \[0, 3\] .* got -1"),
        (
            "dirichlet",
            {"alpha": 1e-9, "min_size": 3},
            r"no draw of 1000 gave every site min_size=3 images; raise alpha \(1e-09\)",
        ),
        ("pathological", {"classes_per_site": 0}, r"classes_per_site must be in \[1, 5\], got 0"),
        ("pathological", {"classes_per_site": 6}, r"classes_per_site must be in \[1, 5\], got 6"),
        (
            "pathological",
            {"classes_per_site": 1},
            "3 sites x classes_per_site=1 cannot hold 5 classes",
        ),
        (
            "pathological",
            {"classes_per_site": 5, "num_sites": 4},
            "class 0 has 2 images for 4 sites; lower classes_per_site or num_sites",
        ),
    ],
)
def test_bad_arguments_are_refused(name, options, message):
    arguments = {"label_B": torch.arange(5).repeat(2), "num_sites": 3, "generator": generator(0)}
    with pytest.raises(ValueError, match=message):
        getattr(partition, name)(**arguments | options)
