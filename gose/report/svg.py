"""Figures as SVG text: heat map, lines, points.

Plain strings, so a report needs no plotting package and its bytes depend on its numbers alone.
Colours are CSS variables of the page that shows them (--series-1 .. --series-8, --ink, --muted,
--grid, --surface), so one figure serves light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

Point = tuple[float, float]
Format = Callable[[float], str]

# What the figures need of the page that shows them.
STYLE = """:root { color-scheme: light dark; --surface: #fcfcfb; --ink: #0b0b0b; --muted: #52514e;
  --grid: #e1e0d9; --stripe: #f4f3ee; --good: #006300; --bad: #b3261e;
  --series-1: #2a78d6; --series-2: #eb6834; --series-3: #1baf7a; --series-4: #eda100;
  --series-5: #e87ba4; --series-6: #008300; --series-7: #4a3aa7; --series-8: #e34948; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --ink: #ffffff;
  --muted: #c3c2b7; --grid: #3a3a37; --stripe: #232322; --good: #5fc75f; --bad: #ff8a80;
  --series-1: #3987e5; --series-2: #d95926; --series-3: #199e70; --series-4: #c98500;
  --series-5: #d55181; --series-6: #3fa33f; --series-7: #9085e9; --series-8: #e66767; } }
svg { max-width: 100%; height: auto; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .muted { fill: var(--muted); }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .divider { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 4; }
"""
NUM_COLORS = 8
_CHAR = 7.2  # px per character at 12 px in a wide sans-serif
# Light to dark blue; the text on a cell turns white where the fill is darker than the middle.
_RAMP = ("#cde2fb", "#9ec5f4", "#6da7ec", "#3987e5", "#256abf", "#184f95", "#0d366b")
_WIDTH, _HEIGHT = 640.0, 300.0
_ANY = (-math.inf, math.inf)
_LEFT, _TOP, _BOTTOM = 68.0, 14.0, 44.0


def heat_map(
    values_QQ: Sequence[Sequence[float | None]],
    *,
    title: str,
    low: float,
    high: float,
    row_label: str,
    column_label: str,
    form: Format,
) -> str:
    """One square matrix; cells go from `low` (light) to `high` (dark), their numbers inside.

    Rows and columns are numbered from 1; None leaves a cell empty.
    """
    size, cell_w, cell_h, left, top = len(values_QQ), 56.0, 34.0, 44.0, 46.0
    width, height = left + size * cell_w + 4, top + size * cell_h + 26
    parts = [_text(left, 14, title, weight=600)]
    for i in range(size):
        parts.append(_text(left + (i + 0.5) * cell_w, top - 8, str(i + 1), anchor="middle"))
        parts.append(_text(left - 10, top + (i + 0.5) * cell_h + 4, str(i + 1), anchor="end"))
    for i, row in enumerate(values_QQ):
        for j, value in enumerate(row):
            if value is None:
                continue
            share = 1.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
            x, y = left + j * cell_w, top + i * cell_h
            hint = f"{title}: {row_label} {i + 1}, {column_label} {j + 1}: {form(value)}"
            ink = "#ffffff" if share > 0.5 else "#0b0b0b"
            parts.append(
                f'<g><title>{escape(hint)}</title><rect x="{x + 1:.1f}" y="{y + 1:.1f}" '
                f'width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="3" fill="{_ramp(share)}"/>'
                f'<text x="{x + cell_w / 2:.1f}" y="{y + cell_h / 2 + 4:.1f}" '
                f'text-anchor="middle" style="fill:{ink}">{escape(form(value))}</text></g>'
            )
    parts.append(_text(left, height - 8, f"{column_label} →", muted=True))
    middle = top + size * cell_h / 2
    parts.append(
        f'<text class="muted" transform="translate(12 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">← {escape(row_label)}</text>'
    )
    return _svg(width, height, parts, f"Heat map: {title}")


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    y_form: Format,
    x_ticks: Mapping[float, str],
    y_range: Point | None = None,
    y_limits: Point = _ANY,
    dividers: Sequence[float] = (),
) -> str:
    """One line with dots per series, named at its right end; at most NUM_COLORS series.

    y_range: None shows what the values need, within y_limits.
    x_ticks: position -> text below the axis. dividers: positions of vertical lines.
    """
    names = list(series)
    right = 20 + _CHAR * max((len(name) for name in names), default=0)
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_range = min(xs, default=0.0), max(xs, default=1.0)
    frame = _Frame(x_range, y_range or _padded(ys, y_limits), left=_LEFT, right=right, x_inset=14)
    parts = [frame.horizontal_grid(y_form), frame.labels(x_label, y_label)]
    for divider in dividers:
        x = frame.x(divider)
        parts.append(
            f'<line class="divider" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{frame.y0}"/>'
        )
    for position, text in x_ticks.items():
        parts.append(_text(frame.x(position), frame.y0 + 18, text, anchor="middle", muted=True))
    ends: list[tuple[float, int]] = []
    for index, (name, points) in enumerate(series.items()):
        color = _color(index)
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in points:
            hint = f"{name}: {y_form(y)} at {x_label} {x:g}"
            parts.append(_dot(frame.x(x), frame.y(y), 4, color, hint))
        if points:
            ends.append((frame.y(points[-1][1]), index))
    for y, index in _spread(ends, gap=15, low=_TOP, high=frame.y0):
        x = _WIDTH - right + 10
        parts.append(_dot(x, y, 4, _color(index), names[index]))
        parts.append(_text(x + 9, y + 4, names[index]))
    return _svg(_WIDTH, _HEIGHT, parts, f"Lines: {y_label} over {x_label}")


def points(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    x_form: Format,
    y_form: Format,
    y_limits: Point = _ANY,
) -> str:
    """Per series a large dot with its name at the mean, and small ones for members; x from 0."""
    means = {name: _mean(members) for name, members in series.items() if members}
    xs = [x for members in series.values() for x, _ in members]
    ys = [y for members in series.values() for _, y in members]
    frame = _Frame(
        (0.0, max(xs, default=1.0) or 1.0), _padded(ys, y_limits), left=_LEFT, right=24, x_inset=14
    )
    parts = [frame.horizontal_grid(y_form), frame.labels(x_label, y_label)]
    for tick in _ticks(*frame.x_range):
        parts.append(
            _text(frame.x(tick), frame.y0 + 18, _short(x_form(tick)), anchor="middle", muted=True)
        )
    taken: list[_Box] = []
    centers = {name: (frame.x(x), frame.y(y)) for name, (x, y) in means.items()}
    for index, (name, (x, y)) in enumerate(centers.items()):
        color = _color(index)
        for member in series[name] if len(series[name]) > 1 else ():
            hint = f"{name}, one seed: {x_form(member[0])}, {y_form(member[1])}"
            spot = frame.x(member[0]), frame.y(member[1])
            parts.append(_dot(*spot, 3, color, hint, opacity=0.45))
            taken.append((spot[0] - 3, spot[1] - 3, spot[0] + 3, spot[1] + 3))
        taken.append((x - 7, y - 7, x + 7, y + 7))
    for index, (name, (x, y)) in enumerate(centers.items()):
        mean_x, mean_y = means[name]
        hint = f"{name}, mean: {x_form(mean_x)}, {y_form(mean_y)}"
        parts.append(_dot(x, y, 6, _color(index), hint))
        box = _place(name, x, y, taken, (frame.x0, _TOP, _WIDTH, frame.y0))
        taken.append(box)
        leftwards = box[2] <= x
        anchor = "end" if leftwards else "start"
        parts.append(_text(box[2] if leftwards else box[0], box[3] - 4, name, anchor=anchor))
    return _svg(_WIDTH, _HEIGHT, parts, f"Points: {y_label} against {x_label}")


def strips(rows: Mapping[str, Sequence[float]], *, title: str, form: Format) -> str:
    """A strip of cells per row, light at 0 to dark at the row's largest value, 0 itself crossed
    out; the name at the left, the largest value at the right."""
    left = 12 + _CHAR * max((len(name) for name in rows), default=0)
    longest = max((len(values) for values in rows.values()), default=1)
    cell, high, top = min(28.0, max(4.0, 640.0 / longest)), 20.0, 28.0
    parts = [_text(4, 16, title, weight=600)]
    for index, (name, values) in enumerate(rows.items()):
        y = top + index * (high + 6)
        most = max(values, default=0.0)
        parts.append(_text(4, y + 14, name))
        for column, value in enumerate(values):
            x = left + column * cell
            fill = _ramp(value / most) if most > 0 else _RAMP[0]
            hint = escape(f"{name}, {column}: {form(value)}")
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{high:.0f}" '
                f'fill="{fill}"><title>{hint}</title></rect>'
            )
            if value == 0:
                parts.append(
                    f'<line class="divider" x1="{x:.1f}" y1="{y + high:.1f}" '
                    f'x2="{x + cell - 1:.1f}" y2="{y:.1f}"/>'
                )
        end = left + len(values) * cell + 6
        parts.append(_text(end, y + 14, f"max {form(most)}", muted=True))
    width = left + longest * cell + 90
    return _svg(width, top + len(rows) * (high + 6) + 6, parts, title)


def alone(figure: str) -> str:
    """A figure as a file of its own."""
    tag = '<svg xmlns="http://www.w3.org/2000/svg" '
    head, _, rest = figure.partition(">")
    return f"{head.replace('<svg ', tag, 1)}><style>{escape(STYLE)}</style>{rest}\n"


_Box = tuple[float, float, float, float]  # left, top, right, bottom


class _Frame:
    """The plotting area: from numbers to pixels."""

    def __init__(
        self, x_range: Point, y_range: Point, *, left: float, right: float, x_inset: float
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.x0, self.x1, self.y0 = left, _WIDTH - right, _HEIGHT - _BOTTOM
        self._inset = x_inset  # keeps the outermost dots off the edges

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = 0.5 if high <= low else (value - low) / (high - low)
        return self.x0 + self._inset + share * (self.x1 - self.x0 - 2 * self._inset)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.y0 - (value - low) / (high - low) * (self.y0 - _TOP)

    def horizontal_grid(self, form: Format) -> str:
        parts = []
        for tick in _ticks(*self.y_range):
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{self.x0}" x2="{self.x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(_text(self.x0 - 6, y + 4, _short(form(tick)), anchor="end", muted=True))
        return "".join(parts)

    def labels(self, x_label: str, y_label: str) -> str:
        middle = (self.x0 + self.x1) / 2
        below = _text(middle, _HEIGHT - 6, x_label, anchor="middle", muted=True)
        y = (_TOP + self.y0) / 2
        return (
            f'{below}<text class="muted" transform="translate(12 {y:.1f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )


def _place(name: str, x: float, y: float, taken: Sequence[_Box], area: _Box) -> _Box:
    """The first free place for a label beside the dot at (x, y)."""
    w, h = len(name) * _CHAR, 16.0
    offsets = [(10.0, -h / 2), (-10.0 - w, -h / 2), (-w / 2, -10 - h), (-w / 2, 10.0)]
    offsets += [(dx, dy) for dy in (-26.0, 10.0, -42.0, 26.0, 42.0) for dx in (10.0, -10.0 - w)]
    boxes = [(x + dx, y + dy, x + dx + w, y + dy + h) for dx, dy in offsets]
    inside = [
        b
        for b in boxes
        if b[0] >= area[0] and b[1] >= area[1] and b[2] <= area[2] and b[3] <= area[3]
    ]
    free = [b for b in inside if not any(_overlap(b, other) for other in taken)]
    return (free or inside or boxes)[0]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spread(
    ends: Sequence[tuple[float, int]], *, gap: float, low: float, high: float
) -> list[tuple[float, int]]:
    """The ends with y moved apart to at least `gap`, within [low, high] where they fit."""
    moved: list[tuple[float, int]] = []
    for y, index in sorted(ends):
        moved.append((max(y, moved[-1][0] + gap) if moved else max(y, low), index))
    limit = high
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = (min(moved[i][0], limit), moved[i][1])
        limit = moved[i][0] - gap
    return moved


def _padded(values: Sequence[float], limits: Point) -> Point:
    """A range that shows the values and a twentieth more, rounded to ticks, within the limits."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    step = _step(low - margin, high + margin)
    floor = max(math.floor((low - margin) / step) * step, limits[0])
    ceiling = min(math.ceil((high + margin) / step) * step, limits[1])
    return floor, ceiling


def _step(low: float, high: float) -> float:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-6)
    return [i * step for i in range(first, math.floor(high / step + 1e-6) + 1)]


def _short(text: str) -> str:
    """A round number without its decimals: "5.00 MB" as "5 MB"."""
    return re.sub(r"\.0+(?!\d)", "", text)


def _mean(members: Sequence[Point]) -> Point:
    return sum(x for x, _ in members) / len(members), sum(y for _, y in members) / len(members)


def _color(index: int) -> str:
    return f"var(--series-{index % NUM_COLORS + 1})"


def _ramp(share: float) -> str:
    position = share * (len(_RAMP) - 1)
    at = min(int(position), len(_RAMP) - 2)
    mixed = (
        round(
            int(_RAMP[at][i : i + 2], 16) * (at + 1 - position)
            + int(_RAMP[at + 1][i : i + 2], 16) * (position - at)
        )
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _dot(x: float, y: float, r: float, color: str, hint: str, *, opacity: float = 1.0) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{color}" fill-opacity="{opacity:g}" '
        f'stroke="var(--surface)" stroke-width="1.5"><title>{escape(hint)}</title></circle>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    muted: bool = False,
    weight: int = 400,
) -> str:
    kind = ' class="muted"' if muted else ""
    return (
        f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
