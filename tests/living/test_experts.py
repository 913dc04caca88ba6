"""LivingExperts on gk.MoE: refusals by name, packed copies, compiled graphs, readers, saving."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels import packing
from gose_kernels.living.turns import Turns
from tests.living.rebuild import D, F, K, new_layer, stacked, train_step

ADAMW = gk.optim.MaskedAdamW


def _living(num_experts: int = 4, capacity: int = 6, optimizer: Any = ADAMW) -> Any:
    moe = new_layer(num_experts)
    steps = optimizer(moe.parameters(), lr=1e-2) if optimizer else None
    return moe, gk.LivingExperts(moe, capacity=capacity, optimizer=steps), steps


def _x(seed: int = 5, tokens: int = 33) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def test_slots_of_a_layer_leave_its_numbers_alone() -> None:
    plain, (moe, living, _) = new_layer(4), _living()
    with torch.no_grad():
        wanted, stats = plain(_x())
        got, living_stats = moe(_x())
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.expert_TK, living_stats.expert_TK)
    assert living_stats.load_E[4:].eq(0).all()
    living.settle()
    with torch.no_grad():
        assert torch.equal(moe(_x())[0], wanted)
    assert list(moe.state_dict()) == list(plain.state_dict())


def test_a_removed_expert_is_that_of_a_layer_without_it() -> None:
    moe, living, _ = _living()
    living.remove("expert1")
    living.add("fifth", like="expert2", router="copy")
    assert living.slot("fifth") == 1
    living.remove("fifth")
    small = new_layer(3)
    kept = [0, 2, 3]
    with torch.no_grad():
        for key, p in stacked(small).items():
            p.copy_(stacked(moe)[key][kept])
        torch.testing.assert_close(moe(_x())[0], small(_x())[0], rtol=1e-6, atol=1e-6)


def test_a_sleeping_expert_leaves_the_output_its_bits() -> None:
    moe, living, _ = _living()
    with torch.no_grad():
        before = moe(_x())[0]
        living.add("new", like="expert0", router="zero")
        assert torch.equal(moe(_x())[0], before)
        assert "new" not in living.awake
        living.wake("new", router="copy", like="expert0")
        # Equal columns and weights: expert0's slot wins the tie, or both share what it had.
        _, stats = moe(_x())
        assert stats.load_E[living.slot("new")] > 0
        living.sleep("new")
        assert torch.equal(moe(_x())[0], before)


def test_frozen_experts_keep_their_bits_and_the_others_train() -> None:
    moe, living, steps = _living()
    train_step(moe, steps, 0)
    living.freeze("expert0", router=True)
    living.freeze("expert1")
    before = {name: (living.weights(name), living.column(name)) for name in living.names}
    for seed in range(1, 4):
        train_step(moe, steps, seed)
    for name in living.names:
        weights, column = living.weights(name), living.column(name)
        still = all(torch.equal(weights[k], before[name][0][k]) for k in weights)
        assert still == (name in ("expert0", "expert1"))
        assert torch.equal(column["weight"], before[name][1]["weight"]) == (name == "expert0")
    living.unfreeze("expert0")
    train_step(moe, steps, 9)
    assert not torch.equal(
        living.weights("expert0")["down_proj"], before["expert0"][0]["down_proj"]
    )


def test_state_of_a_torch_optimizer_follows() -> None:
    moe, living, steps = _living(optimizer=torch.optim.AdamW)
    train_step(moe, steps, 0)
    moments = {k: steps.state[p]["exp_avg"].clone() for k, p in stacked(moe).items()}
    living.add("cloned", like="expert1", state="cloned")
    living.add("fresh", like="expert1")
    living.remove("expert0")
    for key, p in stacked(moe).items():
        now = steps.state[p]["exp_avg"]
        assert torch.equal(now[1:4], moments[key][1:4])
        assert torch.equal(now[4], moments[key][1])
        assert not now[5].any() and not now[0].any()
    living.reserve(7)
    train_step(moe, steps, 1)
    assert {len(steps.state[p]["exp_avg"]) for p in stacked(moe).values()} == {7}
    with pytest.raises(ValueError, match=r"LivingExperts\.freeze: optimizer must be one of"):
        living.freeze("expert1")


def _kept_copy(moe: gk.MoE) -> Tensor:
    up = moe.experts.gate_up_proj
    found = [
        c.packed_EB
        for key, c in packing._copies.items()
        if key[1][0] == up.data_ptr()  # type: ignore[index]
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changes_pack_the_rows_of_their_own_experts_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = new_layer(4).to(dtype)
    living = gk.LivingExperts(moe, capacity=6)
    x = _x().to(dtype)
    with torch.no_grad():
        moe(x)
        kept = _kept_copy(moe)
        before, where = kept.clone(), kept.data_ptr()
        rows: list[int] = []
        pack = packing.pack_experts

        def counted(w_up: Tensor, *args: Any, **options: Any) -> Tensor:
            rows.append(len(w_up))
            return pack(w_up, *args, **options)

        monkeypatch.setattr(packing, "pack_experts", counted)
        held = gk.packed_bytes()
        for change, slots in (
            (lambda: living.add("a", like="expert1"), [4]),
            (lambda: living.freeze("expert0"), []),
            (lambda: living.replace("expert2", like="a"), [2]),
            (lambda: living.sleep("expert3"), []),
            (lambda: living.remove("expert1"), [1]),
            (lambda: living.split("expert0", ("b", "c")), [0, 1]),
            (lambda: living.merge(["b", "a"], "d"), [0, 4]),
        ):
            change()
            assert rows == [1] * len(slots)
            out = moe(x)[0]
            assert rows == [1] * len(slots)  # the call packs nothing
            after = _kept_copy(moe)
            assert after.data_ptr() == where and gk.packed_bytes() == held
            others = [e for e in range(6) if e not in slots]
            assert torch.equal(after[others], before[others])
            whole = pack(moe.experts.gate_up_proj, moe.experts.down_proj)
            assert torch.equal(after, whole)
            before = after.clone()
            rows.clear()
        gk.forget_packed()
        assert torch.equal(moe(x)[0], out)


def test_a_compiled_graph_survives() -> None:
    moe, living, _ = _living(optimizer=None)
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(moe, backend=count, fullgraph=True)
    x = _x()
    with torch.no_grad():
        compiled(x)
        for change in (
            lambda: living.add("a", like="expert1", router="copy"),
            lambda: living.remove("expert0"),
            lambda: living.freeze("a"),
            lambda: living.replace("expert2", like="a"),
            lambda: living.split("a", ("b", "c")),
            lambda: living.merge(["b", "expert3"], "d"),
            lambda: living.sleep("c"),
        ):
            change()
            with living.reading():
                got = compiled(x)[0]
            assert torch.equal(got, moe(x)[0])
    assert len(graphs) == 1


def test_readers_never_see_half_a_change() -> None:
    """One writer goes round four versions of two experts; every output is that of one version."""
    width, hidden = 64, 256
    moe = gk.MoE(width, hidden, 2, 2, generator=torch.Generator().manual_seed(0))
    living = gk.LivingExperts(moe, capacity=4)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    first = living.weights("expert0")

    def version(n: int) -> dict[str, Tensor]:
        return {name: w * (n + 1) for name, w in first.items()}

    wanted = []
    with torch.no_grad():
        for n in range(4):
            living.replace("expert0", weights=version(n))
            wanted.append(moe(x)[0])
    assert len({w.sum().item() for w in wanted}) == 4
    versions = [version(n) for n in range(4)]
    stop, bad, calls, seen = threading.Event(), [], [0], set()

    def read() -> None:
        with torch.no_grad():
            while not stop.is_set():
                with living.reading():  # several calls alike
                    one, other = moe(x)[0], moe(x)[0]
                match = [n for n, w in enumerate(wanted) if torch.equal(one, w)]
                if len(match) != 1 or not torch.equal(one, other):
                    bad.append(one)
                seen.update(match)
                calls[0] += 1

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    made = 0
    while made < 40 or (len(seen) < 4 and made < 3000):
        living.replace("expert0", weights=versions[made % 4])
        made += 1
    stop.set()
    for reader in readers:
        reader.join()
    assert not bad and len(seen) == 4


def test_turns_let_readers_in_again_and_writers_not_starve() -> None:
    turns, order = Turns(), []
    inside, go = threading.Event(), threading.Event()

    def reader() -> None:
        with turns.reading():
            inside.set()
            go.wait(20)
            with turns.reading():  # a writer waits already
                order.append("read")

    def writer() -> None:
        with turns.writing("test"):
            order.append("written")

    threads = [threading.Thread(target=reader), threading.Thread(target=writer)]
    threads[0].start()
    inside.wait(20)
    threads[1].start()
    while not turns._writers_waiting:
        pass
    go.set()
    for thread in threads:
        thread.join(20)
    assert order == ["read", "written"]
    inside_reading = pytest.raises(RuntimeError, match="test: this thread is inside reading")
    with turns.reading(), inside_reading, turns.writing("test"):
        pass


def test_a_change_between_forward_and_backward_is_refused() -> None:
    moe, living, _ = _living()
    out, _ = moe(_x().requires_grad_())
    living.replace("expert0", like="expert1")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_not_there_is_refused_by_name() -> None:
    moe, living, steps = _living()
    train_step(moe, steps, 0)
    living.remove("expert1")
    before = {k: p.detach().clone() for k, p in stacked(moe).items()}
    gone = r"expert 'expert1' was removed; experts: expert0, expert2, expert3"
    calls: list[tuple[str, Any]] = [
        (f"slot: {gone}", lambda: living.slot("expert1")),
        (f"remove: {gone}", lambda: living.remove("expert1")),
        (f"freeze: {gone}", lambda: living.freeze("expert1")),
        (f"unfreeze: {gone}", lambda: living.unfreeze("expert1")),
        (f"sleep: {gone}", lambda: living.sleep("expert1")),
        (f"wake: {gone}", lambda: living.wake("expert1")),
        (f"replace: {gone}", lambda: living.replace("expert1", like="expert0")),
        (f"split: {gone}", lambda: living.split("expert1", ("a", "b"))),
        (f"merge: {gone}", lambda: living.merge(["expert0", "expert1"], "a")),
        (f"add: {gone}", lambda: living.add("a", like="expert1")),
        ("slot: expert 'nobody' does not exist", lambda: living.slot("nobody")),
        ("names are not used again", lambda: living.add("expert1", like="expert0")),
        ("'expert0' exists", lambda: living.add("expert0", like="expert2")),
        ("a name is 1 to 128", lambda: living.add("a b", like="expert0")),
        ("like, or weights, must name", lambda: living.add("a")),
        ("like must name an expert", lambda: living.wake("expert0", router="copy")),
        (
            "router must be copy or mean or zero",
            lambda: living.add("a", like="expert0", router="x"),
        ),
        ("state must be dropped or cloned", lambda: living.add("a", like="expert0", state="no")),
        ("weights must be", lambda: living.add("a", weights={"up": torch.zeros(1)})),
        (
            r"weights\['down_proj'\] must have shape",
            lambda: living.replace(
                "expert0", weights={**living.weights("expert0"), "down_proj": torch.zeros(2, 2)}
            ),
        ),
        ("into must be two different", lambda: living.split("expert0", ("a", "a"))),
        ("two or more different", lambda: living.merge(["expert0"], "a")),
        ("shares must be 2 numbers", lambda: living.merge(["expert0", "expert2"], "a", shares=[1])),
        ("at least the 6 slots", lambda: living.reserve(5)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    for key, p in stacked(moe).items():
        assert torch.equal(p, before[key])
    living.add("a", like="expert0")
    living.add("b", like="expert0")
    living.add("c", like="expert0")
    with pytest.raises(ValueError, match="all 6 slots are taken"):
        living.add("d", like="expert0")
    for name in ("a", "b", "c", "expert2", "expert3"):
        living.remove(name)
    for call in (living.remove, living.sleep):
        with pytest.raises(ValueError, match="'expert0' is the last expert awake"):
            call("expert0")
    with pytest.raises(ValueError, match="has a LivingExperts"):
        gk.LivingExperts(moe)
    fresh = new_layer(4)
    for options, message in (
        ({"names": ["a", "b", "b", "c"]}, "expert 'b' exists"),
        ({"names": ["a", "b"]}, "names must be 4 names, one per expert"),
        ({"names": ["a", "b", "c", ""]}, "a name is 1 to 128"),
        ({"capacity": 3}, "at least the 4 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.LivingExperts(fresh, **options)
        assert type(fresh) is gk.MoE and "live_E" not in fresh.gate._buffers
    with pytest.raises(ValueError, match="layer must be a gk"):
        gk.LivingExperts(torch.nn.Linear(2, 2))


def test_names_and_layer_round_trip_and_misfits_are_refused() -> None:
    moe, living, steps = _living()
    train_step(moe, steps, 0)
    living.add("a", like="expert1", router="zero")
    living.remove("expert2")
    living.freeze("expert0", router=True)
    saved, tensors = living.state_dict(), moe.state_dict()
    other, again, other_steps = _living(num_experts=6)
    other.load_state_dict(tensors)
    again.load_state_dict(saved)
    assert (again.names, again.awake, again.frozen, again.removed) == (
        living.names,
        living.awake,
        living.frozen,
        living.removed,
    )
    other_steps.load_state_dict(copy.deepcopy(steps.state_dict()))
    for layer, optimizer in ((moe, steps), (other, other_steps)):
        train_step(layer, optimizer, 1)
    for key, p in stacked(moe).items():
        assert torch.equal(p, stacked(other)[key])
    for broken, message in (
        ({**saved, "version": 2}, "state must have version 1"),
        ({**saved, "slots": saved["slots"][:-1]}, "state has 5 slots, the layer 6"),
        ({**saved, "removed": ["expert0"]}, "must be valid and differ"),
        ({**saved, "slots": [None, *saved["slots"][1:]]}, "slot 0 has no name"),
        ({**saved, "frozen": []}, "slot 0 .* is frozen in one of the two alone"),
        ({**saved, "frozen_columns": ["a"]}, "must name experts of slots"),
    ):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(broken)
    assert again.names == living.names


def test_sizes_of_the_layer_are_those_of_the_tests() -> None:
    moe = new_layer(4)
    assert moe.experts.gate_up_proj.shape == (4, 2 * F, D) and moe.top_k == K
