"""Times and memory of several ways to do one thing, and what a benchmark of them needs.

Every round runs each way once, so what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record

Way = Callable[[], object]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """glibc hands freed memory out again. Else every large output is new pages, whose faults (the
    same for every way) cost more than the work, and what is measured is the kernel of Linux."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def seconds(ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Way -> median, lowest and highest seconds of a call; the first call is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(t[1:]), "low": min(t[1:]), "high": max(t[1:])}
        for name, t in taken.items()
    }


def bandwidth(rounds: int = 7) -> float:
    """Bytes a second that torch reads or copies, the larger, of 200 MB of float32."""
    x_P = torch.ones(50_000_000)
    y_P = torch.empty_like(x_P)
    times = seconds({"read": x_P.sum, "copy": lambda: y_P.copy_(x_P)}, rounds)
    return max(x_P.nbytes / times["read"]["low"], 2 * x_P.nbytes / times["copy"]["low"])


def peak_bytes(way: Way) -> int:
    """Bytes of memory that a call adds at its peak, its result included (Linux)."""
    way()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and kept would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again
    before = _status("VmRSS")
    kept = way()
    peak = _status("VmHWM") - before
    del kept
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"benchmarks: /proc/self/status has no {field}")


def run(
    name: str, doc: str | None, argv: Sequence[str], measure: Callable[[bool, int], dict[str, Any]]
) -> int:
    """The command line of a benchmark: measure(quick, rounds) to benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is saved")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(argv)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    torch.set_num_threads(options.threads)
    values = measure(options.quick, options.rounds)
    for row in values["rows"]:
        print(_line(row))
    if not options.quick:
        command = " ".join(["python -m benchmarks", name, *argv])
        values["columns"] = list(values["rows"][0])
        print(_record.save(name, command, options.threads, values))
    return 0


def _line(row: Mapping[str, Any]) -> str:
    """What the row is, then its figures."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
