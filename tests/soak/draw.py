"""What a case is made of, drawn from the seed of a run and the number of the case."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the edges of vectors, panels, steps and blocks.
_EDGES = (
    1,
    2,
    3,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    160,
    252,
    256,
)


class Draw:
    def __init__(self, seed: int, case: int) -> None:
        self.random = random.Random(f"{seed} {case}")
        self.numbers = torch.Generator().manual_seed(self.random.getrandbits(62))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int) -> int:
        """In [1, most]: mostly small or at an edge."""
        if self.chance(0.4):
            return self.random.choice([edge for edge in _EDGES if edge <= most])
        return min(most, 1 + int(most * self.random.random() ** 3))

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.numbers) * scale).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.numbers)

    def bools(self, *shape: int, share: float) -> Tensor:
        return self.uniform(*shape) < share

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Some number of threads; one for what surrounds it, which would only wait for them."""
        torch.set_num_threads(self.random.choice((1, 1, 2, 3, 5)))
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same numbers in some memory layout; what lies between them is not to be read."""
        kind = self.random.choice(("contiguous", "contiguous", "gaps", "turned", "columns", "odd"))
        if t.dim() == 0 or kind == "contiguous":
            return t
        if kind == "turned":
            return t if t.dim() < 2 else t.mT.contiguous().mT
        if kind == "odd":  # aligned to one element only
            offset = self.random.randint(1, 3)
            flat = torch.full((t.numel() + offset,), _poison(t.dtype), dtype=t.dtype)
            return flat[offset:].view(t.shape).copy_(t)
        apart = [2 if kind == "columns" and d == t.dim() - 1 else 1 for d in range(t.dim())]
        if kind == "gaps":
            apart[self.random.randrange(max(1, t.dim() - 1))] = self.random.randint(1, 3)
        before = [self.random.randint(0, 3) for _ in apart]
        wide = [n * a + b + 1 for n, a, b in zip(t.shape, apart, before, strict=True)]
        memory = torch.full(wide, _poison(t.dtype), dtype=t.dtype)
        cut = [slice(b, b + n * a, a) for n, a, b in zip(t.shape, apart, before, strict=True)]
        return memory[tuple(cut)].copy_(t)


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else 2**30
