"""ExpertGraph: modules as nodes, the ways an input may take between them as weighted edges.

The shared modules (`trunk`) form a path from the root; every successor of its end is an expert.
Graphs are values: adding, removing or replacing a node gives a new graph that shares all other
tensors with the old one, so their bits cannot change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gose.checkpoint import Json, State
from gose.models import Params, apply_chain, num_macs


@dataclass(frozen=True)
class ExpertGraph:
    """nodes: name -> tensors. trunk: shared nodes, root first. edges: expert -> routing weight.

    An edge goes from the end of the trunk to its expert; weights are positive and say how much the
    expert counts where nothing is known about the input (the static entropy weights).
    """

    nodes: Mapping[str, Params]
    trunk: tuple[str, ...]
    edges: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.nodes) != {*self.trunk, *self.edges} or set(self.trunk) & set(self.edges):
            raise ValueError(
                f"ExpertGraph: every node must be in the trunk {list(self.trunk)} or be an expert "
                f"{list(self.edges)}, got nodes {list(self.nodes)}"
            )
        bad = {name: weight for name, weight in self.edges.items() if not weight > 0}
        if bad:
            raise ValueError(f"ExpertGraph: edges must have positive weights, got {bad}")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in the order they came; an expert's id is its place here."""
        return tuple(self.edges)

    def path(self, expert: str) -> list[Params]:
        """The modules that an input meets on its way through `expert`."""
        self._expect("path", expert)
        return [self.nodes[name] for name in (*self.trunk, expert)]

    def hidden(self, x_BD: Tensor) -> Tensor:
        """What the trunk makes of the inputs and hands to the experts."""
        return apply_chain([self.nodes[name] for name in self.trunk], x_BD)

    def add(self, name: str, params: Params, *, weight: float = 1.0) -> ExpertGraph:
        """The graph with one more expert."""
        if name in self.nodes:
            raise ValueError(f"graph.add: node {name!r} exists already")
        return ExpertGraph({**self.nodes, name: params}, self.trunk, {**self.edges, name: weight})

    def remove(self, name: str) -> ExpertGraph:
        """The graph without one of its experts."""
        self._expect("remove", name)
        return ExpertGraph(
            {n: params for n, params in self.nodes.items() if n != name},
            self.trunk,
            {n: weight for n, weight in self.edges.items() if n != name},
        )

    def replace(self, changed: Mapping[str, Params]) -> ExpertGraph:
        """The graph with other tensors of the same names and shapes in some nodes."""
        for name, params in changed.items():
            if name not in self.nodes:
                raise ValueError(
                    f"graph.replace: node {name!r} does not exist; nodes: {', '.join(self.nodes)}"
                )
            wanted = {key: tuple(tensor.shape) for key, tensor in self.nodes[name].items()}
            came = {key: tuple(tensor.shape) for key, tensor in params.items()}
            if wanted != came:
                raise ValueError(f"graph.replace: node {name!r} must have {wanted}, got {came}")
        return ExpertGraph({**self.nodes, **changed}, self.trunk, self.edges)

    def reweigh(self, weights: Mapping[str, float]) -> ExpertGraph:
        """The graph with these routing weights on its edges."""
        for name in weights:
            self._expect("reweigh", name)
        return ExpertGraph(self.nodes, self.trunk, {**self.edges, **weights})

    def macs(self) -> tuple[int, int]:
        """Multiply-adds of an input in the trunk, and in one expert (the largest)."""
        trunk = num_macs(*(self.nodes[name] for name in self.trunk))
        return trunk, max((num_macs(self.nodes[name]) for name in self.edges), default=0)

    def to_state(self, prefix: str) -> State:
        """Tensors `prefix/NODE/TENSOR` and the structure under meta[prefix]."""
        tensors = {
            f"{prefix}/{name}/{key}": tensor
            for name, params in self.nodes.items()
            for key, tensor in params.items()
        }
        edges: list[Json] = [[name, weight] for name, weight in self.edges.items()]
        return State(tensors, {prefix: {"trunk": list(self.trunk), "edges": edges}})

    @staticmethod
    def from_state(state: State, prefix: str) -> ExpertGraph:
        """The graph that `to_state` wrote."""
        structure: object = state.meta[prefix]
        assert isinstance(structure, dict)
        trunk = tuple(str(name) for name in structure["trunk"])
        edges = {str(name): float(weight) for name, weight in structure["edges"]}
        nodes = {name: subtree(state.tensors, f"{prefix}/{name}") for name in (*trunk, *edges)}
        return ExpertGraph(nodes, trunk, edges)

    def _expect(self, where: str, name: str) -> None:
        if name not in self.edges:
            raise ValueError(
                f"graph.{where}: expert {name!r} does not exist; experts: {', '.join(self.edges)}"
            )


def subtree(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, under the rest of their names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
