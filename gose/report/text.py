"""Numbers as people read them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(value: float) -> str:
    """A share as "93.4 %"."""
    return f"{100 * value:.1f} %"


def quantity(value: float) -> str:
    """A count with three digits and an SI prefix, as "1.23 M"; below 1000 as it is."""
    rounded = float(f"{value:.3g}")
    for factor, prefix in _PREFIXES:
        if abs(rounded) >= factor:
            decimals = 2 - math.floor(math.log10(abs(rounded) / factor) + 1e-9)
            return f"{rounded / factor:.{max(0, decimals)}f} {prefix}"
    return f"{rounded:g}"


def byte_count(value: float) -> str:
    """A number of bytes as "1.23 MB", powers of 1000."""
    text = quantity(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def shown(value: float | None, form: Callable[[float], str]) -> str:
    """The value in a form; "–" where there is none."""
    return "–" if value is None else form(value)


def over_seeds(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Mean, with the sample standard deviation where seeds differ; "–" for no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = form(statistics.fmean(known))
    return mean if len(set(known)) < 2 else f"{mean} ± {form(statistics.stdev(known))}"


def plain(value: object) -> str:
    """A value whose meaning is not known here: four digits, lists with commas, yes and no."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return ", ".join(plain(item) for item in value)
        case dict():
            return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return str(value)
