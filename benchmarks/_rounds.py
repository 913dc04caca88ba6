"""Rounds: every contestant once, one after the other, between two probes of the machine.

A neighbour on a shared machine may halve what the cores do for seconds or minutes. So a round
counts only if the probes before and after it both reach QUIET of a quiet machine's, and figures of
one round are compared with each other alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

QUIET = 0.9  # share of the quiet machine's probe that both probes of a round must reach


class Gate:
    """Says by a probe (FLOP/s now) whether the machine is quiet.

    Quiet is the upper quartile of all that was read: a best value may be a boost that no long run
    keeps. `known` is a quiet value from before; the higher one holds.
    """

    def __init__(self, probe: Callable[[], float], known: float = 0.0, settle: int = 25) -> None:
        self._probe = probe
        self._known = known
        self._readings = [probe() for _ in range(settle)]

    @property
    def quiet(self) -> float:
        if len(self._readings) < 2:
            return max([self._known, *self._readings])
        quartile = statistics.quantiles(self._readings, n=4, method="inclusive")[2]
        return max(self._known, quartile)

    def read(self) -> float:
        value = self._probe()
        self._readings.append(value)
        return value

    def accepts(self, *values: float) -> bool:
        return all(value >= QUIET * self.quiet for value in values)


class Rounds(NamedTuple):
    """What the accepted rounds gave: seconds[name][i] belongs to round numbers[i]."""

    seconds: dict[str, list[float]]
    numbers: list[int]
    rejected: int


def run(
    contestants: Mapping[str, Callable[[int], float]],
    rounds: int,
    gate: Gate,
    *,
    patience: int = 3,
    pause_seconds: float = 1.0,
) -> Rounds:
    """Up to `rounds` accepted rounds out of at most `patience * rounds`.

    A contestant takes the number of the round and gives seconds; who starts changes by the round.
    A round that would begin on a disturbed machine is given up, after a pause.
    """
    taken: dict[int, tuple[dict[str, float], float, float]] = {}
    accepted: list[int] = []
    names = list(contestants)
    number = -1
    while len(accepted) < rounds and (number := number + 1) < patience * rounds:
        before = gate.read()
        if not gate.accepts(before):
            time.sleep(pause_seconds)
            continue
        first = number % len(names)
        order = names[first:] + names[:first]
        seconds = {name: contestants[name](number) for name in order}
        taken[number] = (seconds, before, gate.read())
        # Judged anew each time: what is quiet becomes clearer with every reading.
        accepted = [i for i, (_, *probes) in taken.items() if gate.accepts(*probes)]
    columns = {name: [taken[i][0][name] for i in accepted] for name in names}
    tried = min(number + 1, patience * rounds)
    return Rounds(columns, accepted, tried - len(accepted))


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of other / ours; above 1: we are faster."""
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def spread(seconds: Sequence[float]) -> float:
    """Half the range between the quartiles, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle
