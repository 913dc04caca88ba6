"""Random changes of a running layer against a layer, optimizer and packed weights made anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import gose_kernels as gk
from tests.living.rebuild import (
    CAPACITY,
    OPTIONS,
    Book,
    D,
    new_layer,
    rebuilt,
    record,
    stacked,
    train_step,
)


class _Driver:
    """One random change at a time, made to the layer and written down in the book."""

    def __init__(self, kind: Any, seed: int) -> None:
        self.draw = random.Random(seed)
        self.moe, self.kind = new_layer(4), kind
        self.optimizer = kind(self.moe.parameters(), **OPTIONS[kind])
        self.living = gk.LivingExperts(self.moe, capacity=CAPACITY, optimizer=self.optimizer)
        self.slots: list[str | None] = [*self.living.names, *[None] * (CAPACITY - 4)]
        awake = {"awake": True, "frozen": False, "column_frozen": False}
        self.book: Book = {
            name: record(self.moe, self.optimizer, name, slot, awake)
            for slot, name in enumerate(self.living.names)
        }
        self.made = 0

    def _name(self) -> str:
        self.made += 1
        return f"new{self.made}"

    def _zero_state(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {k: torch.zeros_like(v) for k, v in rows.items()}
            for key, rows in entry["state"].items()
        }

    def change(self) -> str:
        present = list(self.book)
        awake = [n for n in present if self.book[n]["awake"]]
        one = self.draw.choice(present)
        choices = ["freeze", "unfreeze", "replace", "sleep", "wake"]
        choices += ["add"] * 3 if len(present) < CAPACITY else []
        choices += ["split"] if len(present) < CAPACITY else []
        choices += ["remove"] * 2 if len(present) > 1 else []
        choices += ["merge"] if len(present) > 2 else []
        what = self.draw.choice(choices)
        if what in ("remove", "sleep") and awake == [one]:
            what = "freeze"
        getattr(self, f"_{what}")(one)
        return what

    def _add(self, like: str) -> None:
        name, state = self._name(), self.draw.choice(["dropped", "cloned"])
        router = self.draw.choice(["copy", "mean", "zero"])
        slot = self.living.add(name, like=like, router=router, state=state)
        assert slot == self.slots.index(None)
        self.slots[slot] = name
        of = self.book[like]
        live = [e["rows"]["gate.weight"] for e in self._in_slots() if e["awake"]]
        column = {
            "copy": of["rows"]["gate.weight"],
            "mean": torch.stack(live).double().mean(dim=0).float(),
            "zero": torch.zeros(D),
        }[router]
        self.book[name] = {
            "rows": {**of["rows"], "gate.weight": column},
            "state": of["state"] if state == "cloned" else self._zero_state(of),
            "awake": router != "zero",
            "frozen": False,
            "column_frozen": False,
        }

    def _in_slots(self) -> list[dict[str, Any]]:
        return [self.book[n] for n in self.slots if n is not None and n in self.book]

    def _remove(self, name: str) -> None:
        self.living.remove(name)
        self.slots[self.slots.index(name)] = None
        del self.book[name]

    def _replace(self, name: str) -> None:
        like = self.draw.choice(list(self.book))
        state = self.draw.choice(["carried", "dropped", "cloned"])
        self.living.replace(name, like=like, state=state)
        own, of = self.book[name], self.book[like]
        own["rows"] = {**of["rows"], "gate.weight": own["rows"]["gate.weight"]}
        fresh = {"carried": own["state"], "dropped": self._zero_state(own), "cloned": of["state"]}
        own["state"] = {**fresh[state], "gate.weight": own["state"]["gate.weight"]}

    def _sleep(self, name: str) -> None:
        self.living.sleep(name)
        self.book[name]["awake"] = False

    def _wake(self, name: str) -> None:
        self.living.wake(name)
        self.book[name]["awake"] = True

    def _freeze(self, name: str) -> None:
        router = self.draw.random() < 0.5
        self.living.freeze(name, router=router)
        self.book[name] |= {"frozen": True, "column_frozen": router}

    def _unfreeze(self, name: str) -> None:
        self.living.unfreeze(name)
        self.book[name] |= {"frozen": False, "column_frozen": False}

    def _split(self, name: str) -> None:
        into = (self._name(), self._name())
        state = self.draw.choice(["carried", "dropped", "cloned"])
        seed = self.draw.randrange(2**31)
        drawn = torch.Generator().manual_seed(seed)
        self.living.split(name, into, noise=0.1, generator=drawn, state=state)
        of, slot, other = self.book.pop(name), self.slots.index(name), self.slots.index(None)
        self.slots[slot], self.slots[other] = into
        c = of["rows"]["gate.weight"]
        n = (
            0.1
            * c.square().mean().sqrt()
            * torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))
        )
        for child, sign in zip(into, (1, -1), strict=True):
            keeps = state == "cloned" or (state == "carried" and sign == 1)
            self.book[child] = {
                **of,
                "rows": {**of["rows"], "gate.weight": c + sign * n},
                "state": of["state"] if keeps else self._zero_state(of),
            }

    def _merge(self, name: str) -> None:
        other = self.draw.choice([n for n in self.book if n != name])
        into, state = self._name(), self.draw.choice(["dropped", "carried"])
        self.living.merge([name, other], into, shares=[3, 1], state=state)
        a, b = self.book.pop(name), self.book.pop(other)
        self.slots[self.slots.index(name)] = into
        self.slots[self.slots.index(other)] = None
        self.book[into] = {
            "rows": {
                k: (0.75 * a["rows"][k].double() + 0.25 * b["rows"][k].double()).float()
                for k in a["rows"]
            },
            "state": a["state"] if state == "carried" else self._zero_state(a),
            "awake": a["awake"] or b["awake"],
            "frozen": False,
            "column_frozen": False,
        }

    def compare(self) -> None:
        """Every expert's bits, its optimizer state, and which slots are free."""
        assert list(self.living.names) == [n for n in self.slots if n is not None]
        for slot, name in enumerate(self.slots):
            if name is None:
                assert not any(p[slot].any() for p in stacked(self.moe).values())
                assert not self.moe.gate.live_E[slot]
                continue
            wanted = self.book[name]
            got = record(self.moe, self.optimizer, name, slot, wanted)
            for key, row in wanted["rows"].items():
                assert torch.equal(got["rows"][key], row), (name, key)
                for moment, value in wanted["state"][key].items():
                    assert torch.equal(got["state"][key][moment], value), (name, key, moment)

    def train(self, seed: int) -> None:
        """The same step on the running layer and on a rebuilt one, whose outcome is the book's."""
        moe, optimizer = rebuilt(self.book, self.slots, self.kind)
        x = torch.randn(9, D, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():  # packed weights: kept through the changes here, packed anew there
            assert torch.equal(self.moe(x)[0], moe(x)[0])
        for layer, steps in ((self.moe, self.optimizer), (moe, optimizer)):
            train_step(layer, steps, seed)
        for slot, name in enumerate(self.slots):
            if name is not None:
                self.book[name] = record(moe, optimizer, name, slot, self.book[name])


@pytest.mark.parametrize(
    ("kind", "steps"), [(gk.optim.MaskedAdamW, 700), (gk.optim.MaskedSGD, 300)], ids=str
)
def test_thousand_changes_equal_a_rebuilt_layer(kind: Any, steps: int) -> None:
    driver = _Driver(kind, seed=steps)
    seen: set[str] = set()
    for step in range(steps):
        if step % 7 == 0:
            driver.train(step)
        with torch.no_grad():
            driver.moe(torch.zeros(1, D))  # packs, where no copy is kept
        seen.add(driver.change())
        driver.compare()
    driver.train(steps)
    driver.compare()
    wanted = {"add", "remove", "freeze", "unfreeze", "replace", "split", "merge", "sleep", "wake"}
    assert seen == wanted
