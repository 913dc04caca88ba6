"""Task streams: real images, changed and divided into the tasks that come one after another.

B images, C classes, D = side * side pixels, H = W = side.

A task is named by one text, the same in files, on the command line and in reports:
`SOURCE[.TRANSFORM][.classes-A-B-...]`, as in "mnist-5k.rotate90", "digits.permute7.classes-0-1".
Class ids are those of the source and never renumbered, so one head serves a whole stream.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gose.data.sources import SOURCES, Examples, load, locate, source_of

TRANSFORMS = ("none", "rotate90", "rotate180", "rotate270", "invert", "permute<seed>")


@dataclass(frozen=True)
class TaskSpec:
    """Which images a task shows: a source, a change of its pixels, and the classes that occur."""

    source: str
    transform: str = "none"  # one of TRANSFORMS; rotations are counter-clockwise
    classes: tuple[int, ...] = ()  # ascending; (): all

    def __post_init__(self) -> None:
        num_classes = source_of(self.source).num_classes
        if not re.fullmatch(r"none|rotate(90|180|270)|invert|permute\d{1,9}", self.transform):
            near = difflib.get_close_matches(self.transform, TRANSFORMS, n=1)
            raise ValueError(
                f"TaskSpec: transform must be one of {', '.join(TRANSFORMS)}, "
                f"got {self.transform!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
        ascending = list(self.classes) == sorted(set(self.classes))
        if not ascending or not set(self.classes) <= set(range(num_classes)):
            raise ValueError(
                f"TaskSpec: classes of {self.source} must be ascending ids "
                f"in [0, {num_classes - 1}], got {self.classes}"
            )

    @classmethod
    def parse(cls, text: str) -> TaskSpec:
        """The spec whose name is `text`; ValueError says which part is wrong."""
        source, *parts = text.split(".")
        classes: tuple[int, ...] = ()
        if parts and (match := re.fullmatch(r"classes((?:-\d{1,9})+)", parts[-1])):
            classes = tuple(int(label) for label in match[1].split("-")[1:])
            parts.pop()
        if len(parts) > 1:
            raise ValueError(
                f"TaskSpec.parse: wanted SOURCE[.TRANSFORM][.classes-A-B-...], got {text!r}"
            )
        return cls(source, parts[0] if parts else "none", classes)

    @property
    def name(self) -> str:
        """The text that `parse` reads; made of [A-Za-z0-9.-] only."""
        transform = [] if self.transform == "none" else [self.transform]
        classes = ["-".join(["classes", *map(str, self.classes)])] if self.classes else []
        return ".".join([self.source, *transform, *classes])


class Task(NamedTuple):
    """One task of a stream: its name, the classes that occur, three disjoint sets of examples."""

    name: str
    classes: tuple[int, ...]
    train: Examples
    validation: Examples
    test: Examples


def stream(
    tasks: Sequence[str | TaskSpec],
    *,
    generator: torch.Generator,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    train_per_class: int | None = None,
    side: int = 28,
    root: str | Path | None = None,
) -> Iterator[Task]:
    """The tasks in order, each with its train, validation and test examples.

    A source is divided once (see split) and all its tasks share the division: no test image of one
    task is a training image of another, however it is turned. A source with a publisher's test set
    keeps that and ignores test_fraction. The division of a source depends on the generator and the
    source's name, not on the other tasks.
    train_per_class: at most that many training images of each class. side: the images are resized
    to side x side. root: see load.
    At the call, not at the first task: bad arguments raise ValueError, missing sets DataError.
    """
    specs = [TaskSpec.parse(task) if isinstance(task, str) else task for task in tasks]
    names = [spec.name for spec in specs]
    if not specs or len(set(names)) != len(names):
        raise ValueError(f"stream: tasks must be one or more and all different, got {names}")
    _check_fractions("stream", validation_fraction, test_fraction)
    if train_per_class is not None and train_per_class < 1:
        raise ValueError(f"stream: train_per_class must be positive or None, got {train_per_class}")
    if side < 1:
        raise ValueError(f"stream: side must be a positive number of pixels, got {side}")
    for source in {spec.source for spec in specs}:
        locate(source, root=root)
    seed = int(torch.randint(2**62, (), generator=generator))

    def divide(name: str) -> list[Examples]:
        whole = load(name, side=side, root=root)
        num_test = SOURCES[name].num_test
        pool_B = whole.label_B[: len(whole.label_B) - num_test]
        train, validation, test = split(
            pool_B,
            validation_fraction=validation_fraction,
            test_fraction=0 if num_test else test_fraction,
            generator=_generator_of(seed, name),
        )
        if num_test:
            test = torch.arange(len(pool_B), len(whole.label_B))
        if train_per_class is not None:
            train = _first_per_class(pool_B, train, train_per_class)
        return [
            Examples(whole.x_BD[index], whole.label_B[index]) for index in (train, validation, test)
        ]

    def generate() -> Iterator[Task]:
        divided: dict[str, list[Examples]] = {}
        for spec in specs:
            if spec.source not in divided:
                divided[spec.source] = divide(spec.source)
            classes = spec.classes or tuple(range(SOURCES[spec.source].num_classes))
            yield Task(spec.name, classes, *(_shown(part, spec) for part in divided[spec.source]))

    return generate()


def class_incremental(
    source: str, classes_per_task: int, *, generator: torch.Generator
) -> list[TaskSpec]:
    """Tasks that divide the classes of a source in random order, each class in exactly one."""
    num_classes = source_of(source).num_classes
    if not 1 <= classes_per_task <= num_classes or num_classes % classes_per_task:
        raise ValueError(
            f"class_incremental: classes_per_task must divide the {num_classes} classes of "
            f"{source}, got {classes_per_task}"
        )
    order_C = torch.randperm(num_classes, generator=generator)
    return [
        TaskSpec(source, classes=tuple(sorted(order_C[start : start + classes_per_task].tolist())))
        for start in range(0, num_classes, classes_per_task)
    ]


def split(
    label_B: Tensor,
    *,
    validation_fraction: float,
    test_fraction: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index tensors (train, validation, test), int64, drawn class by class; each index in one.

    Of the n images of a class round(n * test_fraction) are for test, and of the m that remain
    round(m * validation_fraction) for validation. Within a part the order is random.
    """
    _check_fractions("split", validation_fraction, test_fraction)
    order_B = torch.randperm(len(label_B), generator=generator)
    part_B = torch.zeros(len(label_B), dtype=torch.int64)
    for label in sorted(set(label_B.tolist())):
        members = order_B[label_B[order_B] == label]
        num_test = round(len(members) * test_fraction)
        num_validation = round((len(members) - num_test) * validation_fraction)
        part_B[members[:num_test]] = 2
        part_B[members[num_test : num_test + num_validation]] = 1
    train, validation, test = (order_B[part_B[order_B] == part] for part in range(3))
    return train, validation, test


def batches(
    examples: Examples, batch_size: int, *, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the examples as pairs (x_BD, label_B); the last batch may be smaller.

    generator: a random order; None: the order of the examples.
    """
    if batch_size < 1:
        raise ValueError(f"batches: batch_size must be positive, got {batch_size}")
    num_images = len(examples.label_B)
    order_B = (
        torch.arange(num_images)
        if generator is None
        else torch.randperm(num_images, generator=generator)
    )
    indices = (order_B[start : start + batch_size] for start in range(0, num_images, batch_size))
    return ((examples.x_BD[index], examples.label_B[index]) for index in indices)


def _check_fractions(name: str, validation_fraction: float, test_fraction: float) -> None:
    for argument, value in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
    ):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {argument} must be in [0, 1), got {value}")


def _generator_of(seed: int, source: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {source}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _first_per_class(label_B: Tensor, index: Tensor, count: int) -> Tensor:
    rank = torch.empty_like(index)  # how many images of the same class stand before, in index
    for label in sorted(set(label_B.tolist())):
        same = label_B[index] == label
        rank[same] = torch.arange(int(same.sum()))
    return index[rank < count]


def _shown(examples: Examples, spec: TaskSpec) -> Examples:
    """The examples of the spec's classes with its transform applied."""
    x_BD, label_B = examples
    if spec.classes:
        kept_B = torch.isin(label_B, torch.tensor(spec.classes))
        x_BD, label_B = x_BD[kept_B], label_B[kept_B]
    if spec.transform.startswith("rotate"):
        turns = int(spec.transform.removeprefix("rotate")) // 90
        image_B1HW = Examples(x_BD, label_B).image_B1HW
        x_BD = torch.rot90(image_B1HW, turns, dims=(2, 3)).flatten(1)
    elif spec.transform.startswith("permute"):
        seed = int(spec.transform.removeprefix("permute"))
        order_D = torch.randperm(x_BD.shape[1], generator=torch.Generator().manual_seed(seed))
        x_BD = x_BD[:, order_D]
    elif spec.transform == "invert":
        x_BD = 1 - x_BD
    return Examples(x_BD, label_B)
