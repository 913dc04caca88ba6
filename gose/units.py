"""Units: the steps a run is made of, each a function from one state to the next.

A unit reads and writes named parts of the state: `student/stem/embed.weight` is the tensor
`embed.weight` of the stage `stem` of the model `student`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose.checkpoint import Json, State
from gose.graph import subtree
from gose.models import Params


class Outcome(NamedTuple):
    """The state after a unit, its rows of metrics.jsonl, and what it cost."""

    state: State
    rows: Sequence[Mapping[str, Json]] = ()
    images: int = 0
    flops: int = 0
    bytes_sent: int = 0


class Unit(NamedTuple):
    """A step of a run. name: unique in the run. phase: teacher, meta, distill, learn, pack, ..."""

    name: str
    phase: str
    run: Callable[[State], Outcome]


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of one unit: they depend on nothing but the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def put(
    state: State, tensors: Mapping[str, Tensor] | None = None, meta: Mapping[str, Any] | None = None
) -> State:
    """The state with these tensors and JSON values added or replaced."""
    return State({**state.tensors, **(tensors or {})}, {**state.meta, **(meta or {})})


def drop(state: State, *prefixes: str) -> State:
    """The state without the tensors and values whose names are, or begin with, `prefix/`."""
    gone = tuple(f"{prefix}/" for prefix in prefixes)
    return State(
        {name: t for name, t in state.tensors.items() if not f"{name}/".startswith(gone)},
        {name: v for name, v in state.meta.items() if not f"{name}/".startswith(gone)},
    )


def model_of(state: State, name: str, stages: Sequence[str]) -> list[dict[str, Tensor]]:
    """The stages of a model in the state."""
    return [subtree(state.tensors, f"{name}/{stage}") for stage in stages]


def model_tensors(name: str, stages: Sequence[str], params: Sequence[Params]) -> dict[str, Tensor]:
    """A model's tensors under the names `model_of` reads."""
    return {
        f"{name}/{stage}/{key}": tensor
        for stage, tensors in zip(stages, params, strict=True)
        for key, tensor in tensors.items()
    }
