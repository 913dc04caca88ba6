from __future__ import annotations

import re

import pytest
import torch

from gose.graph import ExpertGraph
from gose.models import apply_chain, init_stage


def _graph() -> ExpertGraph:
    generator = torch.Generator().manual_seed(0)
    nodes = {
        "stem": init_stage(4, 6, 1, generator=generator, num_inputs=5),
        "body": init_stage(4, 6, 1, generator=generator),
        "a": init_stage(4, 8, 1, generator=generator, num_classes=3),
        "b": init_stage(4, 8, 1, generator=generator, num_classes=3),
    }
    return ExpertGraph(nodes, ("stem", "body"), {"a": 1.0, "b": 0.5})


def _bits(graph: ExpertGraph, skip: str = "") -> dict[tuple[str, str], bytes]:
    return {
        (name, key): tensor.numpy().tobytes()
        for name, params in graph.nodes.items()
        if name != skip
        for key, tensor in params.items()
    }


def test_add_and_remove_leave_the_bits_of_all_other_nodes():
    graph = _graph()
    before, x = _bits(graph), torch.randn(6, 5)
    answers = {name: apply_chain(graph.path(name), x) for name in graph.experts}
    new = init_stage(4, 8, 1, generator=torch.Generator().manual_seed(9), num_classes=3)
    larger = graph.add("c", new, weight=2.0)
    assert larger.experts == ("a", "b", "c")
    assert _bits(larger, skip="c") == before
    smaller = larger.remove("a")
    assert smaller.experts == ("b", "c")
    kept = {name: bits for name, bits in before.items() if name[0] != "a"}
    assert _bits(smaller, skip="c") == kept
    assert torch.equal(apply_chain(smaller.path("b"), x), answers["b"])
    assert _bits(graph) == before, "a graph is a value"


def test_replace_changes_only_what_it_names():
    graph = _graph()
    doubled = {key: 2 * tensor for key, tensor in graph.nodes["body"].items()}
    changed = graph.replace({"body": doubled})
    assert _bits(changed, skip="body") == _bits(graph, skip="body")
    assert torch.equal(changed.nodes["body"]["0.up.weight"], doubled["0.up.weight"])


def test_macs_are_those_of_the_trunk_and_one_expert():
    assert _graph().macs() == (5 * 4 + 2 * 24 + 2 * 24, 2 * 32 + 12)


def test_state_round_trip_keeps_bits_order_and_weights():
    graph = _graph().reweigh({"b": 0.25})
    again = ExpertGraph.from_state(graph.to_state("arm/g"), "arm/g")
    assert _bits(again) == _bits(graph)
    assert (again.trunk, again.experts) == (graph.trunk, graph.experts)
    assert dict(again.edges) == {"a": 1.0, "b": 0.25}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.remove("x"), "graph.remove: expert 'x' does not exist; experts: a, b"),
        (lambda g: g.remove("stem"), "graph.remove: expert 'stem' does not exist"),
        (lambda g: g.path("x"), "graph.path: expert 'x' does not exist"),
        (lambda g: g.add("a", {}), "graph.add: node 'a' exists already"),
        (lambda g: g.replace({"x": {}}), "graph.replace: node 'x' does not exist; nodes: stem"),
        (lambda g: g.replace({"a": {}}), "graph.replace: node 'a' must have"),
        (lambda g: g.reweigh({"a": 0.0}), "edges must have positive weights, got {'a': 0.0}"),
        (lambda g: ExpertGraph(g.nodes, g.trunk, {}), "every node must be in the trunk"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(_graph())
