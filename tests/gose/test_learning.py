from __future__ import annotations

import pytest
import torch

from gose import learning, router, sites
from gose.compress import Section, Spec
from gose.config import SystemConfig, override
from gose.data import Examples, Task
from gose.distill import scratch_student

_BASE = override(
    SystemConfig(),
    [
        "data.side=8",
        "distill.width=8",
        "distill.hidden=[8, 8, 10]",
        "sites.steps=3",
        "sites.batch_size=8",
        "sites.lr=0.01",
        "sites.rounds=4",
        "preserve.images=20",
        "preserve.fraction=0.4",
    ],
)


def _tensor_bytes(packet: bytes) -> int:
    """Length of a packet without its header."""
    return len(packet) - 8 - int.from_bytes(packet[:8], "little")


def _examples(num: int) -> Examples:
    generator = torch.Generator().manual_seed(num)
    return Examples(torch.rand(num, 64, generator=generator), torch.arange(num) % 10)


def _members(num: int = 3):
    task = Task("t", tuple(range(10)), _examples(240), _examples(60), _examples(10))
    config = _BASE.sites.model_copy(update={"num_sites": num, "dirichlet_alpha": 1.0})
    return sites.divide(task, config, generator=torch.Generator().manual_seed(0))


def _student():
    generator = torch.Generator().manual_seed(1)
    return scratch_student(_BASE.distill, num_inputs=64, num_classes=10, generator=generator)


def _generators(num: int, seed: int = 0):
    return [torch.Generator().manual_seed(seed + site) for site in range(num)]


def _begun(members):
    student = _student()
    group = learning.start_group([site.id for site in members], student)
    return learning.begin_task(group, "e", student[-1], members, round_=9)


def _round(config, members, group, round_=0):
    paths, _ = learning.learn(
        group, "e", members, config, task_round=0, generators=_generators(len(members))
    )
    packets, group = learning.pack_round(
        group, "e", members, paths, config, round_=round_, generators=_generators(len(members), 50)
    )
    merged, work = learning.merge_round(group, "e", members, packets, config, round_=round_)
    return paths, packets, merged, work


def test_begin_adds_the_start_and_the_pooled_statistics():
    members = _members()
    group, work = _begun(members)
    assert torch.equal(group.graph.nodes["e"]["head.weight"], _student()[-1]["head.weight"])
    pooled = router.features(torch.cat([site.train.x_BD for site in members]))
    assert group.knowledge.count_Q.tolist() == [240.0]
    torch.testing.assert_close(group.knowledge.sum_QZ[0], pooled.sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        group.knowledge.outer_QZZ[0], pooled.T @ pooled, rtol=1e-6, atol=1e-5
    )
    sums = [Section(str(i), n, False) for i, n in enumerate((1, 49, 49 * 49))]
    assert work.bytes_sent == 3 * 2 * Spec("none", tuple(sums)).packet_bytes


def test_the_learning_rate_falls_over_the_rounds_of_a_task():
    members = _members()
    group, _ = _begun(members)
    for task_round, share in ((0, 1.0), (2, 0.05 + 0.95 * 0.5), (3, 0.05 + 0.95 * 0.14644661)):
        paths, _ = learning.learn(
            group, "e", members, _BASE, task_round=task_round, generators=_generators(3)
        )
        slower = override(_BASE, [f"sites.lr={0.01 * share}"])
        wanted, _ = learning.learn(
            group, "e", members, slower, task_round=0, generators=_generators(3)
        )
        got = paths[0][2]["head.weight"]
        torch.testing.assert_close(got, wanted[0][2]["head.weight"], rtol=1e-5, atol=1e-6)


def test_without_a_codec_a_round_is_the_mean_of_what_the_sites_learned():
    config, members = override(_BASE, ["codec=none"]), _members()
    group, _ = _begun(members)
    paths, packets, merged, work = _round(config, members, group)
    share = torch.tensor([float(len(site.train.label_B)) for site in members])
    share /= share.sum()
    for stage, name in enumerate((*group.graph.trunk, "e")):
        for key in group.graph.nodes[name]:
            mean = sum(s * path[stage][key] for s, path in zip(share, paths, strict=True))
            torch.testing.assert_close(merged.graph.nodes[name][key], mean, rtol=1e-5, atol=1e-6)
    numel = sum(t.numel() for p in paths[0] for t in p.values())
    assert {_tensor_bytes(packet) for packet in packets.values()} == {4 * numel}
    assert work.bytes_sent == work.bytes_float32 == 6 * len(packets[0])


def test_the_codec_changes_little_and_saves_bytes_exactly():
    members = _members()
    group, _ = _begun(members)
    paths, packets, merged, work = _round(_BASE, members, group)
    _, _, plain, _ = _round(override(_BASE, ["codec=none"]), members, group)
    matrices = sum(t.numel() for p in paths[0] for t in p.values() if t.dim() == 2)
    biases = sum(t.numel() for p in paths[0] for t in p.values() if t.dim() == 1)
    expected = matrices + 4 * (-(-matrices // 256)) + 4 * biases
    assert {_tensor_bytes(packet) for packet in packets.values()} == {expected}
    assert work.bytes_sent == 6 * len(packets[0])
    sections = (Section("matrices", matrices, True), Section("biases", biases, False))
    assert work.bytes_float32 == 6 * Spec("none", sections).packet_bytes
    moved = merged.graph.nodes["stem"]["embed.weight"] - group.graph.nodes["stem"]["embed.weight"]
    wanted = plain.graph.nodes["stem"]["embed.weight"] - group.graph.nodes["stem"]["embed.weight"]
    error = (moved - wanted).norm() / wanted.norm()
    assert 0 < float(error) < 0.02
    assert torch.equal(
        merged.graph.nodes["stem"]["embed.bias"], plain.graph.nodes["stem"]["embed.bias"]
    ), "biases are not coded"


def test_residuals_are_what_the_packets_lost():
    members = _members(2)
    group, _ = _begun(members)
    _, _, merged, _ = _round(_BASE, members, group)
    lost = torch.zeros(len(merged.residuals[0]["matrices"]))
    weights = torch.tensor([float(len(site.train.label_B)) for site in members])
    for site, share in zip(members, (weights / weights.sum()).tolist(), strict=True):
        lost += share * merged.residuals[site.id]["matrices"]
    _, _, plain, _ = _round(override(_BASE, ["codec=none"]), members, group)
    masks = group.masks("e")
    got = learning.free_vectors(merged.graph.path("e"), masks)["matrices"]
    wanted = learning.free_vectors(plain.graph.path("e"), masks)["matrices"]
    torch.testing.assert_close(got + lost, wanted, rtol=1e-5, atol=1e-6)
    without = override(_BASE, ["codec.error_feedback=false"])
    assert _round(without, members, group)[2].residuals == {0: {}, 1: {}}


def test_a_site_alone_sends_nothing_and_keeps_what_it_learned():
    members = _members(1)
    group, work = _begun(members)
    assert work.bytes_sent == 0
    paths, _ = learning.learn(group, "e", members, _BASE, task_round=0, generators=_generators(1))
    adopted = learning.adopt(group, "e", paths[0])
    for name, stage in zip((*group.graph.trunk, "e"), paths[0], strict=True):
        for key, tensor in stage.items():
            assert torch.equal(adopted.graph.nodes[name][key], tensor)


@pytest.mark.parametrize("method", ["fisher", "random"])
def test_frozen_elements_keep_their_bits_through_a_whole_task(method):
    config, members = override(_BASE, [f"preserve={method}"]), _members()
    group, _ = _begun(members)
    for round_ in range(2):
        _, _, group, _ = _round(config, members, group, round_)
    group, work = learning.freeze(
        group, "e", members, config, round_=5, generator=torch.Generator().manual_seed(3)
    )
    assert (work.bytes_sent > 0) == (method == "fisher")
    for masks in group.frozen.values():
        for mask in masks.values():
            assert int(mask.sum()) == int(0.4 * mask.numel())
    before = {name: dict(group.graph.nodes[name]) for name in group.graph.trunk}
    old_expert = {k: t.numpy().tobytes() for k, t in group.graph.nodes["e"].items()}
    group, _ = learning.begin_task(group, "f", _student()[-1], members, round_=6)
    paths, _ = learning.learn(group, "f", members, config, task_round=0, generators=_generators(3))
    packets, group = learning.pack_round(
        group, "f", members, paths, config, round_=7, generators=_generators(3)
    )
    merged, _ = learning.merge_round(group, "f", members, packets, config, round_=7)
    for name, masks in group.frozen.items():
        for key, mask in masks.items():
            new, old = merged.graph.nodes[name][key], before[name][key]
            assert new[mask].numpy().tobytes() == old[mask].numpy().tobytes()
            assert (new[~mask] != old[~mask]).any()
    now = {k: t.numpy().tobytes() for k, t in merged.graph.nodes["e"].items()}
    assert now == old_expert, "an earlier expert is not touched"
    free = sum(int((~m).sum()) for masks in group.frozen.values() for m in masks.values())
    expert = sum(t.numel() for t in group.graph.nodes["f"].values())
    sections = learning.free_vectors(paths[0], group.masks("f"))
    assert sum(map(len, sections.values())) == free + expert


def test_freezing_follows_the_information_of_all_sites():
    config, members = override(_BASE, ["codec=none", "preserve.images=500"]), _members()
    group, _ = _begun(members)
    frozen, _ = learning.freeze(
        group, "e", members, config, round_=5, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    total = None
    for site in members:
        found = sites.local_fisher(site, group.graph.path("e"), images=500, generator=generator)
        score = len(site.train.label_B) * found[0]["embed.weight"]
        total = score if total is None else total + score
    count = int(0.4 * total.numel())
    threshold = total.flatten().topk(count).values[-1]
    agree = (frozen.frozen["stem"]["embed.weight"] == (total >= threshold)).double().mean()
    assert float(agree) > 0.999


def test_none_freezes_nothing():
    members = _members()
    group, _ = _begun(members)
    same, work = learning.freeze(
        group,
        "e",
        members,
        override(_BASE, ["preserve=none"]),
        round_=5,
        generator=torch.Generator(),
    )
    assert work.bytes_sent == 0
    assert not any(m.any() for masks in same.frozen.values() for m in masks.values())


def test_wins_are_summed_over_sites_and_weigh_the_edges():
    members = _members()
    group, _ = _begun(members)
    group, _ = learning.begin_task(group, "f", _student()[-1], members, round_=10)
    other = {key: t + 0.3 for key, t in group.graph.nodes["f"].items()}
    group = group._replace(graph=group.graph.replace({"f": other}))
    buffers = [[site.validation for site in members], [site.validation for site in members][::-1]]
    counted, work = learning.count_wins(group, members, buffers, _BASE, round_=11)
    for task, buffer in enumerate(buffers):
        whole = Examples(*(torch.cat(parts) for parts in zip(*buffer, strict=True)))
        wins = router.soft_wins(group.graph, whole, _BASE.route.win_temperature)
        torch.testing.assert_close(counted.knowledge.wins_EQ[:, task], wins, rtol=1e-5, atol=1e-5)
    entropy = router.module_entropy(counted.knowledge.wins_EQ)
    weight = 1 / (entropy + 0.05)
    assert list(counted.graph.edges.values()) == pytest.approx((weight / weight.sum()).tolist())
    sections = (Section("0", 2, False), Section("1", 2, False))
    assert work.bytes_sent == 6 * Spec("none", sections).packet_bytes


def test_fisher_merge_sends_twice_the_vectors():
    members = _members()
    group, _ = _begun(members)
    _, plain, _, _ = _round(_BASE, members, group)
    _, packets, merged, _ = _round(override(_BASE, ["merge=fisher"]), members, group)
    assert _tensor_bytes(packets[0]) == 2 * _tensor_bytes(plain[0])
    assert set(merged.residuals[0]) == {"matrices"}
