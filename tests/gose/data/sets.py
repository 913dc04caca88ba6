"""Small stand-ins for sets, pinned like the real ones, and the skip of what a machine may lack."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from gose.data import DataError
from gose.data.sources import SOURCES, File, Source, check


def require_fashion_mnist() -> None:
    try:
        check("fashion-mnist")
    except DataError:
        pytest.skip("fashion-mnist is not installed (apt-get install dataset-fashion-mnist)")


def idx_contents(num_train: int, num_test: int) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """The four files of an IDX set as bytes, and the pixels and labels that they hold."""
    num_images = num_train + num_test
    pixel_BHW = np.random.default_rng(0).integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
    label_B = np.arange(num_images, dtype=np.uint8) % 10
    contents = []
    for part in (slice(0, num_train), slice(num_train, num_images)):
        contents.append(b"\0" * 16 + pixel_BHW[part].tobytes())
        contents.append(b"\0" * 8 + label_B[part].tobytes())
    return contents, pixel_BHW, label_B


def small_fashion_mnist(folder: Path, contents: list[bytes], num_test: int) -> Source:
    """A source like fashion-mnist with `contents` as its files, which are written to `folder`."""
    names = [file.name for file in SOURCES["fashion-mnist"].files]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(gzip.compress(content))
    files = tuple(
        File(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in zip(names, contents, strict=True)
    )
    return SOURCES["fashion-mnist"]._replace(files=files, home=str(folder), num_test=num_test)
