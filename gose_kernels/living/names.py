"""Names of experts by slot: which are there, which are gone and never come back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STATE = {"version", "slots", "removed", "frozen", "frozen_columns"}


class Names:
    """slots[e]: the expert that lives in slot e, None: it is free. removed: in the order in which
    they went. frozen_columns: the experts whose router column is frozen.
    """

    def __init__(self) -> None:
        self.slots: list[str | None] = []
        self.removed: list[str] = []
        self.frozen_columns: set[str] = set()

    @property
    def present(self) -> tuple[str, ...]:
        """In the order of their slots."""
        return tuple(name for name in self.slots if name is not None)

    def fill(self, count: int, names: Sequence[str] | None) -> None:
        """`count` slots with these names; None: expert0, expert1, ..."""
        given = [f"expert{e}" for e in range(count)] if names is None else list(names)
        if len(given) != count:
            raise ValueError(
                f"LivingExperts: names must be {count} names, one per expert, got {given}"
            )
        for name in given:
            self.check_new("LivingExperts", name)
            self.slots.append(name)

    def slot(self, who: str, name: str) -> int:
        """ValueError for a name that is not there."""
        if name in self.slots:
            return self.slots.index(name)
        what = "was removed" if name in self.removed else "does not exist"
        raise ValueError(
            f"LivingExperts.{who}: expert {name!r} {what}; experts: {', '.join(self.present)}"
        )

    def free(self, who: str) -> int:
        """The first free slot; ValueError where there is none."""
        if None not in self.slots:
            raise ValueError(
                f"LivingExperts.{who}: all {len(self.slots)} slots are taken; "
                "reserve(capacity) makes more"
            )
        return self.slots.index(None)

    def check_new(self, where: str, name: str) -> None:
        """ValueError for what is no name, or that of an expert that is or was there."""
        if not _is_name(name):
            raise ValueError(f"{where}: a name is 1 to 128 of A-Z a-z 0-9 . _ -, got {name!r}")
        if name in self.slots or name in self.removed:
            what = "exists" if name in self.slots else "was removed; names are not used again"
            raise ValueError(f"{where}: expert {name!r} {what}")

    def forget(self, slot: int) -> None:
        """The expert of a slot gone; the slot is free."""
        name = self.slots[slot]
        assert name is not None
        self.removed.append(name)
        self.frozen_columns.discard(name)
        self.slots[slot] = None

    def state_dict(self, frozen: Sequence[str]) -> dict[str, Any]:
        """As JSON values."""
        return {
            "version": 1,
            "slots": list(self.slots),
            "removed": list(self.removed),
            "frozen": list(frozen),
            "frozen_columns": sorted(self.frozen_columns),
        }

    @staticmethod
    def of(where: str, state: Mapping[str, Any], awake: list[bool], frozen: list[bool]) -> Names:
        """What `state_dict` said, of a layer whose slots are awake and frozen as given; ValueError
        where the two do not fit."""
        if set(state) != _STATE or state["version"] != 1:
            raise ValueError(f"{where}: state must have version 1 and {sorted(_STATE)}")
        found = Names()
        found.slots, found.removed = list(state["slots"]), list(state["removed"])
        found.frozen_columns = set(state["frozen_columns"])
        if len(found.slots) != len(awake):
            raise ValueError(
                f"{where}: state has {len(found.slots)} slots, the layer {len(awake)}; "
                f"LivingExperts(layer, capacity={len(found.slots)})"
            )
        everyone = [*found.present, *found.removed]
        if len(set(everyone)) != len(everyone) or not all(_is_name(n) for n in everyone):
            raise ValueError(f"{where}: names of slots and removed must be valid and differ")
        for slot, name in enumerate(found.slots):
            if name is None and awake[slot]:
                raise ValueError(f"{where}: slot {slot} has no name, but the layer's is awake")
            if frozen[slot] != (name in state["frozen"]):
                raise ValueError(f"{where}: slot {slot} ({name}) is frozen in one of the two alone")
        unknown = found.frozen_columns - set(state["frozen"])
        if unknown or set(state["frozen"]) - set(found.present):
            raise ValueError(f"{where}: frozen and frozen_columns must name experts of slots")
        return found


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
