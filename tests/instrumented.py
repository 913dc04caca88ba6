"""Runs a command on an instrumented build of the CPU kernels; says which of their lines ran.

    python -m tests.instrumented sanitizers COMMAND ...   AddressSanitizer and UBSan stop at the
                                                          first fault
    python -m tests.instrumented coverage COMMAND ...     adds to the counts in build/coverage
    python -m tests.instrumented report [--branches] [FILE ...]   lines (branches) that ran, of
                                                          csrc/cpu or of the named files of csrc

Builds gose_kernels/libgose_kernels_NAME.so first (setup.py, GOSE_INSTRUMENT); the library of
everyday use and its build folder stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "build" / "coverage"
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
KINDS = ("sanitizers", "coverage")


def _preloaded() -> str:
    """The sanitizer's runtime must come first in a process that is not built with it."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout
        for n in names
    ]
    return " ".join(path.strip() for path in found)


def environment(kind: str) -> dict[str, str]:
    """The variables under which a process runs the instrumented kernels."""
    added = {"GOSE_INSTRUMENT": kind}
    if kind == "sanitizers":
        added |= {
            "LD_PRELOAD": _preloaded(),
            # Python leaks by design; a refusal must come before an allocation of any size.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # small objects get their own guarded memory
        }
    return {**os.environ, **added}


def build(kind: str) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    needed = {"GOSE_INSTRUMENT": kind, "GOSE_NATIVE": "1", "GOSE_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **needed}, check=True)


def _gcov() -> Iterator[tuple[str, dict[str, Any]]]:
    """(level, gcov's record of one source file) of every object that ran."""
    for counts in sorted(COUNTS.rglob("*.gcda")):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", "--branch-probabilities", str(counts)],
            capture_output=True,
            text=True,
            check=True,
        )
        level = next((n for n in reversed(LEVELS) if n in counts.name.split(".")), "")
        level = level or next((n for n in reversed(LEVELS) if n in counts.name), "once")
        for line in done.stdout.splitlines():
            for file in json.loads(line)["files"]:
                yield level, file


class Counts:
    """Of one source file at one level: how often each line ran, each branch was taken."""

    def __init__(self) -> None:
        self.lines: dict[int, int] = defaultdict(int)
        self.branches: dict[tuple[int, int], int] = defaultdict(int)

    def add(self, record: dict[str, Any]) -> None:
        for line in record["lines"]:
            number = line["line_number"]
            self.lines[number] += line["count"]
            taken = [b["count"] for b in line["branches"] if not b["throw"]]
            for index, count in enumerate(taken):
                self.branches[number, index] += count


def _share(counts: list[int]) -> str:
    return f"{100 * sum(c > 0 for c in counts) / max(1, len(counts)):6.1f}"


def report(names: list[str], branches: bool) -> int:
    """Prints a table; 1 if less than 95 % of what was asked for ran at any level."""
    table: dict[str, dict[str, Counts]] = defaultdict(lambda: defaultdict(Counts))
    for level, record in _gcov():
        path = Path(record["file"])
        if not path.is_relative_to(ROOT / "csrc"):
            continue
        name = str(path.relative_to(ROOT / "csrc"))
        if name in names or (not names and name.startswith("cpu/")):
            table[name][level].add(record)
            table[name]["any"].add(record)
    if not table:
        print(f"nothing was counted in {COUNTS}; run something under `coverage` first")
        return 1
    levels = [n for n in ("any", *LEVELS, "once") if any(n in of for of in table.values())]
    every: dict[str, list[int]] = defaultdict(list)
    print(f"{'file':34}" + "".join(f"{level:>13}" for level in levels) + "  lines that never ran")
    for name, of in sorted(table.items()):
        row = f"{name:34}"
        for level in levels:
            counts = of[level].branches if branches else of[level].lines
            every[level] += counts.values()
            row += f"{_share(list(counts.values())):>13}" if level in of else f"{'':13}"
        whole = of["any"]
        missed = {n for n, _ in (b for b, c in whole.branches.items() if c == 0)}
        missed = missed if branches else {n for n, c in whole.lines.items() if c == 0}
        print(row + "  " + " ".join(map(str, sorted(missed))))
    print(f"{'all':34}" + "".join(f"{_share(every[level]):>13}" for level in levels))
    return int(sum(c > 0 for c in every["any"]) < 0.95 * len(every["any"]))


def main(arguments: list[str]) -> int:
    kind, *command = arguments or ["", ""]
    if kind == "report":
        return report([c for c in command if c != "--branches"], "--branches" in command)
    if kind not in KINDS or not command:
        print(__doc__, file=sys.stderr)
        return 2
    build(kind)
    return subprocess.run(command, env=environment(kind), check=False).returncode


if __name__ == "__main__":
    assert shutil.which("g++") or "CXX" in os.environ, "a C++ compiler is needed"
    sys.exit(main(sys.argv[1:]))
