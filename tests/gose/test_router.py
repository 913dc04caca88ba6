from __future__ import annotations

import itertools
import math

import pytest
import torch

from gose import router
from gose.config import RouteConfig
from gose.data import Examples
from gose.graph import ExpertGraph
from gose.models import apply_chain, init_stage

_SIDE, _CLASSES = 8, 4


def _graph(num_experts: int = 3) -> ExpertGraph:
    generator = torch.Generator().manual_seed(0)
    nodes = {
        "stem": init_stage(6, 8, 1, generator=generator, num_inputs=_SIDE**2),
        "body": init_stage(6, 8, 1, generator=generator),
    }
    graph = ExpertGraph(nodes, ("stem", "body"), {})
    for expert in range(num_experts):
        params = init_stage(6, 10, 1, generator=generator, num_classes=_CLASSES)
        params = {
            "pre.weight": torch.randn(6, 6, generator=generator),
            "pre.bias": torch.ones(6),
        } | params
        graph = graph.add(f"e{expert}", params)
    return graph


def _images(num: int, task: int, seed: int = 0) -> torch.Tensor:
    """Images whose bright half tells their task."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    image = (0.2 + 0.1 * task) * torch.rand(num, _SIDE, _SIDE, generator=generator)
    half = [image[:, :4], image[:, 4:], image[:, :, :4]][task]
    half += 0.5
    return image.flatten(1)


def _knowledge(wins: list[list[float]]) -> router.Knowledge:
    knowledge = router.no_knowledge()
    for task in range(len(wins[0])):
        knowledge = router.with_task(knowledge, [router.feature_sums(_images(200, task))])
    return knowledge._replace(wins_EQ=torch.tensor(wins, dtype=torch.float64))


_SPECIALISTS = [[9.0, 0.5, 0.5], [0.5, 9.0, 0.5], [0.5, 0.5, 9.0]]


def _predict(graph, knowledge, x, **options):
    config = RouteConfig(**options)
    return router.predict(graph, knowledge, x, config, generator=torch.Generator().manual_seed(0))


def _expert_probabilities(graph: ExpertGraph, x: torch.Tensor) -> torch.Tensor:
    paths = [apply_chain(graph.path(name), x).softmax(-1) for name in graph.experts]
    return torch.stack(paths, 1)


def test_soft_wins_are_shares_of_images_and_tend_to_counts():
    graph, x = _graph(), _images(40, 0)
    label = torch.arange(40) % _CLASSES
    log_p = _expert_probabilities(graph, x).log()[torch.arange(40), :, label].double()
    for temperature in (0.1, 1.0):
        wins = router.soft_wins(graph, Examples(x, label), temperature)
        truth = torch.zeros(3, dtype=torch.float64)
        for row in log_p:
            power = [math.exp(float(v) / temperature) for v in row]
            truth += torch.tensor([p / sum(power) for p in power], dtype=torch.float64)
        torch.testing.assert_close(wins, truth, rtol=1e-4, atol=1e-4)
    counts = torch.bincount(log_p.argmax(1), minlength=3).double()
    hard = router.soft_wins(graph, Examples(x, label), 1e-6)
    torch.testing.assert_close(hard, counts, rtol=0, atol=0.05)


def test_identical_experts_share_their_wins():
    graph = _graph(1)
    twins = graph.add("twin", graph.nodes["e0"])
    wins = router.soft_wins(twins, Examples(_images(10, 0), torch.zeros(10).long()), 0.1)
    torch.testing.assert_close(wins, torch.tensor([5.0, 5.0], dtype=torch.float64))


def test_wins_of_sites_add_up():
    graph, x, label = _graph(), _images(30, 0), torch.arange(30) % _CLASSES
    whole = router.soft_wins(graph, Examples(x, label), 0.1)
    parts = [router.soft_wins(graph, Examples(x[i::3], label[i::3]), 0.1) for i in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_module_entropy_by_hand():
    wins = torch.tensor([[6.0, 0.0, 3.0], [2.0, 8.0, 3.0]], dtype=torch.float64)
    best = torch.tensor([[0.75, 0.0, 0.5], [0.25, 1.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(router.best_given_task(wins), best)
    p = best + 0.01 / 3
    p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(router.task_given_best(best), p)
    truth = -(p * p.log()).sum(1) / math.log(3)
    torch.testing.assert_close(router.module_entropy(wins).double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_one_task_has_entropy_0_and_static_weights_are_uniform(num_experts):
    wins = [[5.0 + e] for e in range(num_experts)]
    knowledge, graph, x = _knowledge(wins), _graph(num_experts), _images(6, 0)
    assert router.module_entropy(knowledge.wins_EQ).tolist() == [0.0] * num_experts
    answer = _predict(graph, knowledge, x, method="static", top_k=num_experts)
    mean = _expert_probabilities(graph, x).mean(1)
    torch.testing.assert_close(answer.prob_TC, mean, rtol=1e-5, atol=1e-6)


def test_specialists_have_low_entropy_and_generalists_1():
    wins = torch.tensor([[9.0, 0.0, 0.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    scaled = torch.stack([wins[0], torch.tensor([0.0, 9.0, 9.0]).double(), wins[1]])
    entropy = router.module_entropy(scaled)
    assert entropy[0] < 0.1
    assert entropy[0] < entropy[1] < entropy[2]
    even = router.module_entropy(torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(even, torch.ones(2))


def test_static_weights_are_finite_at_entropy_0_and_follow_the_floor():
    graph, x = _graph(), _images(5, 1)
    knowledge = _knowledge([[9.0, 0.0, 0.0], [0.0, 5.0, 5.0], [1.0, 4.0, 4.0]])
    entropy = router.module_entropy(knowledge.wins_EQ)
    answer = _predict(graph, knowledge, x, method="static", top_k=2, entropy_floor=0.1)
    chosen = entropy.argsort()[:2]
    assert (answer.expert_TK == chosen.int()).all(), "the same experts for every input"
    weight = 1 / (entropy[chosen] + 0.1)
    mixed = (_expert_probabilities(graph, x)[:, chosen] * (weight / weight.sum())[:, None]).sum(1)
    torch.testing.assert_close(answer.prob_TC, mixed, rtol=1e-4, atol=1e-6)


def test_posterior_is_the_gaussian_discriminant_of_all_sites_images():
    images = [_images(200, task) for task in range(3)]
    knowledge = router.no_knowledge()
    for x in images:
        parts = [router.feature_sums(x[:50]), router.feature_sums(x[50:])]
        knowledge = router.with_task(knowledge, parts)
    test = torch.cat([_images(20, task, seed=7) for task in range(3)])
    found = router.log_posterior(router.task_head(knowledge), test).double()
    z = router.features(test)
    log_density = []
    for x in images:
        f = router.features(x)
        covariance = torch.cov(f.T, correction=0)
        ridge = 0.02 * covariance.diagonal().mean() + 1e-4
        gaussian = torch.distributions.MultivariateNormal(
            f.mean(0), covariance + ridge * torch.eye(49)
        )
        log_density.append(gaussian.log_prob(z))
    truth = torch.stack(log_density, 1).log_softmax(1)
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-2)
    assert (found.argmax(1) == torch.arange(3).repeat_interleave(20)).all()


def test_posterior_routes_every_input_to_its_specialist_and_runs_no_other():
    graph, knowledge = _graph(), _knowledge(_SPECIALISTS)
    x = torch.cat([_images(4, task, seed=3) for task in (2, 0, 1)])
    answer = _predict(graph, knowledge, x, method="posterior")
    assert answer.expert_TK.flatten().tolist() == [2] * 4 + [0] * 4 + [1] * 4
    own = _expert_probabilities(graph, x)[torch.arange(12), answer.expert_TK[:, 0].long()]
    torch.testing.assert_close(answer.prob_TC, own, rtol=1e-5, atol=1e-6)


def test_posterior_weights_are_the_softmax_of_minus_surprise():
    graph, knowledge = _graph(), _knowledge(_SPECIALISTS)
    x = _images(5, 1, seed=3)
    answer = _predict(graph, knowledge, x, method="posterior", top_k=3, tau=0.5)
    h, _ = router.surprise(knowledge, x)
    mixed = (_expert_probabilities(graph, x) * (-h / 0.5).softmax(1)[..., None]).sum(1)
    torch.testing.assert_close(answer.prob_TC, mixed, rtol=1e-4, atol=1e-5)
    posterior = router.log_posterior(router.task_head(knowledge), x).exp()
    best = posterior @ router.best_given_task(knowledge.wins_EQ).float().T
    torch.testing.assert_close(h, -best.log() / math.log(3), rtol=1e-4, atol=1e-5)


def test_sample_picks_the_expert_that_is_surest_of_its_own_answer():
    graph, knowledge, x = _graph(), _knowledge(_SPECIALISTS), _images(9, 0)
    p = _expert_probabilities(graph, x)
    entropy = -(p * p.log()).sum(-1) / math.log(_CLASSES)
    answer = _predict(graph, knowledge, x, method="sample")
    assert answer.expert_TK[:, 0].tolist() == entropy.argmin(1).tolist()
    picked = p[torch.arange(9), entropy.argmin(1)]
    torch.testing.assert_close(answer.prob_TC, picked, rtol=1e-4, atol=1e-6)


def test_all_is_the_mean_and_uniform_draws_different_experts():
    graph, knowledge, x = _graph(), _knowledge(_SPECIALISTS), _images(200, 0)
    p = _expert_probabilities(graph, x)
    everyone = _predict(graph, knowledge, x, method="all")
    torch.testing.assert_close(everyone.prob_TC, p.mean(1), rtol=1e-4, atol=1e-6)
    drawn = _predict(graph, knowledge, x, method="uniform", top_k=2)
    assert all(len(set(row)) == 2 for row in drawn.expert_TK.tolist())
    assert torch.bincount(drawn.expert_TK.flatten(), minlength=3).min() > 100
    chosen = p.gather(1, drawn.expert_TK.long()[..., None].expand(-1, -1, _CLASSES)).mean(1)
    torch.testing.assert_close(drawn.prob_TC, chosen, rtol=1e-4, atol=1e-6)


def test_flops_are_the_hand_formula():
    graph, knowledge, x = _graph(), _knowledge(_SPECIALISTS), _images(7, 0)
    trunk = 64 * 6 + 2 * 6 * 8 + 2 * 6 * 8
    expert = 6 * 6 + 2 * 6 * 10 + 6 * _CLASSES
    routing = 2 * 3 * (49 * 49 + 3)
    for method, num_run, extra in (
        ("posterior", 2, routing),
        ("static", 2, 0),
        ("uniform", 2, 0),
        ("sample", 3, 0),
        ("all", 3, 0),
    ):
        answer = _predict(graph, knowledge, x, method=method, top_k=2)
        assert answer.flops_per_input == 2 * (trunk + num_run * expert) + extra, method


@pytest.mark.parametrize("method", ["posterior", "static", "sample", "all"])
def test_permuting_inputs_or_experts_permutes_the_answer(method):
    graph, knowledge = _graph(), _knowledge([[9.0, 0.5, 0.5], [0.5, 7.0, 2.5], [0.5, 1.5, 6.0]])
    x = torch.cat([_images(3, task, seed=1) for task in range(3)])
    answer = _predict(graph, knowledge, x, method=method, top_k=2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    shuffled = _predict(graph, knowledge, x[order], method=method, top_k=2)
    torch.testing.assert_close(shuffled.prob_TC, answer.prob_TC[order], rtol=1e-5, atol=1e-6)
    for places in itertools.permutations(range(3)):
        names = [graph.experts[i] for i in places]
        other = ExpertGraph(graph.nodes, graph.trunk, dict.fromkeys(names, 1.0))
        known = knowledge._replace(wins_EQ=knowledge.wins_EQ[list(places)])
        again = _predict(other, known, x, method=method, top_k=2)
        torch.testing.assert_close(again.prob_TC, answer.prob_TC, rtol=1e-4, atol=1e-5)


def test_all_logits_are_each_experts_own():
    graph, x = _graph(), _images(6, 2)
    truth = torch.stack([apply_chain(graph.path(name), x) for name in graph.experts], 1)
    torch.testing.assert_close(router.all_logits(graph, x), truth, rtol=1e-4, atol=1e-5)


def test_experts_of_different_shapes_and_empty_graphs_are_refused():
    graph = _graph()
    other = graph.add(
        "odd", init_stage(6, 11, 1, generator=torch.Generator(), num_classes=_CLASSES)
    )
    with pytest.raises(ValueError, match="expert 'odd' must have the tensors of 'e0'"):
        router.stack_experts(other)
    with pytest.raises(ValueError, match="the graph has no expert"):
        router.stack_experts(ExpertGraph({}, (), {}))
