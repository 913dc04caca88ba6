"""What the cells of layer.json say: figures per peer, tables, a plot.

A cell holds, besides what names it (see KEY): bandwidth and floor_seconds, one value per accepted
round; quiet_flops and unit, the probe; rejected; commit; and peers, each with its error and seconds
(one per accepted round, in the same order), or with a reason.
kind    steady   one call on packed weights
        unseen   the first call on a number of tokens never seen before; steady_seconds beside it
        pack     packing the weights once
        train    forward and backward with all gradients; backward_seconds beside it, ours also with
                 frozen experts, and peak_bytes, the memory beyond weights and their gradients
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _rounds

KEY = ("kind", "shape", "dtype", "tokens", "allocator", "caches", "cap")
OURS = "gose"
DEFAULT_OF_TRANSFORMERS = "hf_grouped"

Cell = Mapping[str, Any]


class Figures(NamedTuple):
    """One peer in one cell."""

    seconds: float  # median
    spread: float  # half the range between the quartiles / median
    floors: float  # median of seconds / floor of the same round


def key(cell: Cell) -> str:
    """The cell's name in the JSON."""
    return " ".join(str(cell[part]) for part in KEY if cell[part] != "")


def figures(cell: Cell) -> dict[str, Figures]:
    """The peers that were timed, fastest first."""
    rows = {
        name: Figures(
            statistics.median(peer["seconds"]),
            _rounds.spread(peer["seconds"]),
            _rounds.ratio(peer["seconds"], cell["floor_seconds"]),
        )
        for name, peer in cell["peers"].items()
        if peer.get("seconds")
    }
    return dict(sorted(rows.items(), key=lambda row: row[1].seconds))


def best_peer(cell: Cell) -> str | None:
    """The fastest peer that is not ours."""
    return next((name for name in figures(cell) if name != OURS), None)


def speedup(cell: Cell, peer: str | None) -> float | None:
    """Median over rounds of peer / ours; above 1: ours is faster. None where one is missing."""
    theirs, ours = (cell["peers"].get(name, {}).get("seconds") for name in (peer, OURS))
    return _rounds.ratio(theirs, ours) if theirs and ours else None


def first_call(cell: Cell, peer: str) -> float | None:
    """Median over rounds of the first call / the calls after it, of an unseen cell."""
    found = cell["peers"].get(peer, {})
    if not found.get("seconds"):
        return None
    return _rounds.ratio(found["seconds"], found["steady_seconds"])


def _ms(found: Figures | None) -> str:
    return "–" if found is None else f"{found.seconds * 1e3:.3g} ({found.floors:.2f}×)"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(cells: Iterable[Cell]) -> str:
    """Steady cells as Markdown: ms (× floor), and paired ratios to ours."""
    lines = [
        "| layer | T | floor ms | `gose` | best peer | best peer / `gose` "
        "| transformers' default / `gose` |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        found, best = figures(cell), best_peer(cell)
        floor = statistics.median(cell["floor_seconds"] or [0]) * 1e3
        peer = "–" if best is None else f"`{best}` {_ms(found[best])}"
        short = "" if len(cell["floor_seconds"]) >= cell["rounds"] else " (disturbed)"
        lines.append(
            f"| {cell['shape']} {cell['dtype']} | {cell['tokens']}{short} "
            f"| {floor:.3g} {cell['bound']} | {_ms(found.get(OURS))} | {peer} "
            f"| {_times(speedup(cell, best))} "
            f"| {_times(speedup(cell, DEFAULT_OF_TRANSFORMERS))} |"
        )
    return "\n".join(lines)


def train_table(cells: Iterable[Cell]) -> str:
    """Train cells as Markdown."""
    lines = [
        "| layer | T | floor ms | `gose` | grouped_mm / `gose` | eager / `gose` "
        "| extra memory of grouped_mm, `gose` | backward, 75 % of the experts frozen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        peers, found = cell["peers"], figures(cell)
        ours = peers.get(OURS, {})
        memory = ", ".join(
            f"{peers[name]['peak_bytes'] / 1e6:.0f} MB"
            if "peak_bytes" in peers.get(name, {})
            else "–"
            for name in (DEFAULT_OF_TRANSFORMERS, OURS)
        )
        frozen = ours.get("frozen_backward_seconds")
        share = f"{_rounds.ratio(frozen, ours['backward_seconds']):.2f}×" if frozen else "–"
        floor = statistics.median(cell["floor_seconds"] or [0]) * 1e3
        lines.append(
            f"| {cell['shape']} {cell['dtype']} | {cell['tokens']} | {floor:.3g} {cell['bound']} "
            f"| {_ms(found.get(OURS))} | {_times(speedup(cell, DEFAULT_OF_TRANSFORMERS))} "
            f"| {_times(speedup(cell, 'hf_eager'))} | {memory} | {share} |"
        )
    return "\n".join(lines)


def weights_table(cells: Iterable[Cell], kinds: Sequence[str]) -> str:
    """Steady cells as Markdown: ours on its own dtype, and on quantized weights."""
    heads = "".join(f"| {kind} ms | error | bf16 / {kind} " for kind in kinds)
    lines = [f"| layer | T | bf16 ms {heads}|", f"|---|---|---{'|---' * 3 * len(kinds)}|"]
    for cell in cells:
        found = figures(cell)
        line = f"| {cell['shape']} | {cell['tokens']} | "
        line += f"{found[OURS].seconds * 1e3:.3g} |" if OURS in found else "– |"
        for kind in kinds:
            name = f"{OURS}_{kind}"
            factor = speedup(cell, name)
            if name not in found or factor is None:
                line += " – | – | – |"
                continue
            error = cell["peers"][name]["error"]
            line += f" {found[name].seconds * 1e3:.3g} | {error:.2g} | {1 / factor:.2f} |"
        lines.append(line)
    return "\n".join(lines)


def lines(cell: Cell) -> list[str]:
    """A cell in full, for the terminal: every peer, or why it is missing."""
    accepted = len(cell["floor_seconds"])
    text = [
        f"{key(cell)}: {accepted} rounds of {accepted + cell['rejected']}, floor "
        f"{statistics.median(cell['floor_seconds'] or [0]) * 1e3:.3f} ms {cell['bound']}"
    ]
    for name, found in figures(cell).items():
        row = f"  {name:14} {found.seconds * 1e3:9.3f} ms ±{found.spread:4.0%}"
        row += f" {found.floors:6.2f} × floor"
        if name != OURS:
            row += f"  {_times(speedup(cell, name)):>6} × {OURS}"
        if cell["kind"] == "unseen":
            row += f"  first call {_times(first_call(cell, name))} × later ones"
        text.append(row)
    for name, peer in cell["peers"].items():
        if not peer.get("seconds"):
            text.append(f"  {name:14} - {peer.get('reason', 'no round was accepted')}")
    return text


def plot(cells: Iterable[Cell], path: Path) -> None:
    """Time over floor by number of tokens, one panel per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        panels.setdefault(f"{cell['shape']} {cell['dtype']}", []).append(cell)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for axis, (title, members) in zip(axes[0], panels.items(), strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for cell in members:
            for name, found in figures(cell).items():
                curves.setdefault(name, []).append((cell["tokens"], found.floors))
        for name, points in sorted(curves.items()):
            tokens, floors = zip(*sorted(points), strict=True)
            axis.loglog(tokens, floors, label=name, marker=".", lw=3 if name == OURS else 1)
        axis.set(title=title, xlabel="tokens", ylabel="time / floor")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
