from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gose.data import (
    DataError,
    Examples,
    TaskSpec,
    batches,
    class_incremental,
    load,
    split,
    stream,
)
from gose.data.sources import SOURCES
from tests.gose.data.sets import idx_contents, small_fashion_mnist


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(examples: Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.x_BD}


def parts(task) -> tuple[Examples, Examples, Examples]:
    return task.train, task.validation, task.test


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=80),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=50)
def test_split_uses_every_index_once_and_counts_by_class(labels, validation, test, seed):
    label_B = torch.tensor(labels)
    index = split(
        label_B, validation_fraction=validation, test_fraction=test, generator=generator(seed)
    )
    assert sorted(torch.cat(index).tolist()) == list(range(len(labels)))
    for label in set(labels):
        total = labels.count(label)
        num_test = round(total * test)
        num_validation = round((total - num_test) * validation)
        counts = [int((label_B[part] == label).sum()) for part in index]
        assert counts == [total - num_test - num_validation, num_validation, num_test]


def test_tasks_show_every_image_of_the_source_once():
    [task] = stream(["digits"], generator=generator(), side=8)
    assert [len(part.label_B) for part in parts(task)] == [1295, 143, 359]
    whole = sorted(
        zip(map(tuple, load("digits").x_BD.tolist()), load("digits").label_B.tolist(), strict=True)
    )
    shown = [
        pair
        for part in parts(task)
        for pair in zip(map(tuple, part.x_BD.tolist()), part.label_B.tolist(), strict=True)
    ]
    assert sorted(shown) == whole
    assert task.classes == tuple(range(10))


def test_all_tasks_of_a_source_share_its_division():
    turned, other, plain = stream(
        ["mnist-5k.rotate90", "digits", "mnist-5k"], generator=generator(3)
    )
    back = torch.rot90(turned.test.image_B1HW, -1, dims=(2, 3)).flatten(1)
    assert torch.equal(back, plain.test.x_BD)
    assert torch.equal(turned.train.label_B, plain.train.label_B)
    assert not rows(plain.test) & rows(plain.train)
    assert not rows(plain.validation) & (rows(plain.train) | rows(plain.test))
    [alone] = stream(["mnist-5k"], generator=generator(3))
    assert torch.equal(alone.test.x_BD, plain.test.x_BD)
    assert other.test.x_BD.shape[1] == plain.test.x_BD.shape[1] == 784


def test_the_generator_alone_decides():
    first, again, different = (
        next(stream(["digits"], generator=generator(seed), side=8)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.train.x_BD, again.train.x_BD)
    assert rows(first.test) != rows(different.test)


@pytest.mark.parametrize(
    ("transform", "pixel"),
    [
        ("none", lambda image, i, j: image[i, j]),
        (
            "rotate90",
            lambda image, i, j: image[j, 7 - i],
        ),  # counter-clockwise: the right edge goes up
        ("rotate180", lambda image, i, j: image[7 - i, 7 - j]),
        ("rotate270", lambda image, i, j: image[7 - j, i]),
        ("invert", lambda image, i, j: 1 - image[i, j]),
    ],
)
def test_transforms_move_the_pixels_they_name(transform, pixel):
    plain, changed = (
        next(stream([TaskSpec("digits", t)], generator=generator(), side=8))
        for t in ("none", transform)
    )
    for before, after in zip(
        plain.test.image_B1HW[:3, 0], changed.test.image_B1HW[:3, 0], strict=True
    ):
        for i, j in itertools.product(range(8), range(8)):
            assert after[i, j] == pixel(before, i, j)


def test_permute_is_one_fixed_permutation_of_pixels_per_seed():
    plain, permuted, other = stream(
        ["digits", "digits.permute1", "digits.permute2"], generator=generator(), side=8
    )
    order_D = torch.randperm(64, generator=generator(1))
    for before, after in zip(parts(plain), parts(permuted), strict=True):
        assert torch.equal(after.x_BD, before.x_BD[:, order_D])
    assert not torch.equal(other.test.x_BD, permuted.test.x_BD)


def test_classes_choose_examples_and_keep_their_ids():
    whole, some = stream(["digits", "digits.classes-3-7"], generator=generator(), side=8)
    assert some.classes == (3, 7)
    for all_of_them, chosen in zip(parts(whole), parts(some), strict=True):
        kept = [
            index for index, label in enumerate(all_of_them.label_B.tolist()) if label in (3, 7)
        ]
        assert torch.equal(chosen.x_BD, all_of_them.x_BD[kept])
        assert torch.equal(chosen.label_B, all_of_them.label_B[kept])


def test_train_per_class_limits_training_images_only():
    full, small = (
        next(stream(["digits"], generator=generator(), side=8, train_per_class=limit))
        for limit in (None, 20)
    )
    assert small.train.label_B.bincount().tolist() == [20] * 10
    assert rows(small.train) < rows(full.train)
    assert torch.equal(small.test.x_BD, full.test.x_BD)
    assert torch.equal(small.validation.x_BD, full.validation.x_BD)


def test_a_published_test_set_is_kept(tmp_path, monkeypatch):
    contents, pixel_BHW, label_B = idx_contents(num_train=40, num_test=20)
    source = small_fashion_mnist(tmp_path, contents, num_test=20)
    monkeypatch.setitem(SOURCES, "fashion-mnist", source)
    [task] = stream(["fashion-mnist"], generator=generator(), validation_fraction=0.25)
    pixel_BD = torch.from_numpy(pixel_BHW).flatten(1).float() / 255
    assert torch.equal(task.test.x_BD, pixel_BD[40:])
    assert task.test.label_B.tolist() == label_B[40:].tolist()
    assert rows(task.train) | rows(task.validation) == {
        row.numpy().tobytes() for row in pixel_BD[:40]
    }
    assert task.validation.label_B.bincount().tolist() == [1] * 10


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec("mnist-5k"),
        TaskSpec("digits", "rotate270"),
        TaskSpec("mnist-5k", "permute12"),
        TaskSpec("digits", classes=(0, 3, 9)),
        TaskSpec("fashion-mnist", "invert", (1,)),
    ],
    ids=lambda spec: spec.name,
)
def test_names_are_read_back(spec):
    assert TaskSpec.parse(spec.name) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnits-5k", "set must be one of .* did you mean 'mnist-5k'"),
        ("digits.rotate9", "transform must be one of .*got 'rotate9'; did you mean rotate90"),
        ("digits.permute", "transform must be one of .*got 'permute'"),
        ("digits.permute1.invert", "wanted SOURCE.*got 'digits.permute1.invert'"),
        ("digits.classes-3-1", r"ascending ids in \[0, 9\], got \(3, 1\)"),
        ("digits.classes-1-1", r"ascending ids in \[0, 9\], got \(1, 1\)"),
        ("digits.classes-9-10", r"ascending ids in \[0, 9\], got \(9, 10\)"),
        ("", "set must be one of .*got ''"),
    ],
)
def test_bad_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks must be one or more and all different, got \[\]"),
        ({"tasks": ["digits", "digits.none"]}, r"all different, got \['digits', 'digits'\]"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"test_fraction": -0.1}, r"test_fraction must be in \[0, 1\), got -0.1"),
        ({"train_per_class": 0}, "train_per_class must be positive or None, got 0"),
        ({"side": 0}, "side must be a positive number of pixels, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**{"tasks": ["digits"], "generator": generator()} | options)


def test_a_missing_set_is_reported_at_the_call(tmp_path, monkeypatch):
    elsewhere = SOURCES["fashion-mnist"]._replace(home=str(tmp_path))
    monkeypatch.setitem(SOURCES, "fashion-mnist", elsewhere)
    with pytest.raises(DataError, match="'fashion-mnist' is missing"):
        stream(["digits", "fashion-mnist"], generator=generator())


@pytest.mark.parametrize("classes_per_task", [1, 2, 5, 10])
def test_class_incremental_shows_every_class_once(classes_per_task):
    specs = class_incremental("digits", classes_per_task, generator=generator())
    assert [len(spec.classes) for spec in specs] == [classes_per_task] * (10 // classes_per_task)
    assert sorted(label for spec in specs for label in spec.classes) == list(range(10))
    tasks = list(stream(specs, generator=generator(), side=8))
    assert sum(len(task.test.label_B) for task in tasks) == 359


@pytest.mark.parametrize("classes_per_task", [0, 3, 11])
def test_class_incremental_refuses_what_does_not_divide(classes_per_task):
    with pytest.raises(
        ValueError, match=f"must divide the 10 classes of digits, got {classes_per_task}"
    ):
        class_incremental("digits", classes_per_task, generator=generator())


@given(st.integers(0, 40), st.integers(1, 50), st.booleans())
@settings(deadline=None, max_examples=50)
def test_batches_show_every_example_once(num_images, batch_size, shuffled):
    label_B = torch.arange(num_images)
    examples = Examples(label_B.float().unsqueeze(1) / 2, label_B)
    order = generator(1) if shuffled else None
    seen = list(batches(examples, batch_size, generator=order))
    assert all(torch.equal(x_BD[:, 0] * 2, label.float()) for x_BD, label in seen)
    labels = [label for _, label_b in seen for label in label_b.tolist()]
    assert sorted(labels) == list(range(num_images))
    sizes = [len(label_b) for _, label_b in seen]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(size > 0 for size in sizes)
    if not shuffled:
        assert labels == sorted(labels)


def test_batches_refuse_size_zero():
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        batches(load("digits"), 0)
