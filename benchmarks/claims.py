"""What the quickstart promises and what came out, for README.

    python -m benchmarks claims --run DIR

DIR is a finished run (`make run` leaves one in runs/quickstart).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _record
from gose import rundir


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str]) -> int:
    """Writes benchmarks/results/quickstart.json from the rows of a run; 2 if it is not finished."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(argv)
    rows = _rows(options.run / rundir.METRICS)
    claims = [row for row in rows if row["kind"] == "claim"]
    if not claims:
        parser.error(f"--run {options.run} must be a finished run; it holds no claims")
    seconds = sum(row["seconds"] for row in _rows(options.run / rundir.TIMINGS))
    environment = json.loads((options.run / "environment.json").read_text(encoding="utf-8"))
    counters = [row for row in rows if row["kind"] == "counters"]
    path = _record.save(
        "quickstart",
        "make run && python -m benchmarks claims --run runs/quickstart",
        environment["threads"],
        {"claims": claims, "counters": counters, "wall_seconds": seconds},
    )
    for row in claims:
        verdict = "holds" if row["holds"] else "MISSED"
        print(f"{verdict:6} {row['value']:9.4g} {row['wanted']:>8}  {row['name']}")
    print(f"wrote {path}")
    return 0
