"""Random calls of expert_mlp, grouped_gemm, moe and route, checked against float64, without end.

    python -m tests.soak --minutes 30                    goes on where the last run stopped
    python -m tests.soak --seed 0 --case 123             one case again
    python -m tests.instrumented sanitizers python -m tests.soak --minutes 30

A case is drawn from the seed and its number alone. The first one that fails ends the run, with the
line that repeats it; so does one that ends the process, as the sanitizers do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gose_kernels as gk
from tests.soak.cases import run_case

_ROOT = Path(__file__).parent.parent.parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--count", type=int, help="cases to run, whatever time they take")
    parser.add_argument("--state", type=Path, help="default: build/soak-SEED.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _read(state: Path) -> dict[str, float]:
    """next: the case to run; seconds: spent so far."""
    if state.exists():
        found: dict[str, float] = json.loads(state.read_text())
        return found
    return {"next": 0, "seconds": 0.0}


def _work(given: argparse.Namespace, state: Path) -> None:
    """Cases in this process; the file names the one that runs."""
    before = _read(state)
    start, case = time.monotonic(), int(before["next"])
    last = case + given.count if given.count is not None else None
    with state.open("w", encoding="ascii") as file:
        while case != last and (last is not None or time.monotonic() - start < 60 * given.minutes):
            now = {"next": case, "seconds": before["seconds"] + time.monotonic() - start}
            file.seek(0)
            file.write(f"{json.dumps(now):80}")
            file.flush()
            run_case(given.seed, case)
            case += 1
        now = {"next": case, "seconds": before["seconds"] + time.monotonic() - start}
        file.seek(0)
        file.write(f"{json.dumps(now):80}")


def main() -> int:
    given = _arguments()
    assert gk.native.why_not() is None, gk.native.why_not()
    if given.case is not None:
        print(run_case(given.seed, given.case))
        return 0
    state = given.state or _ROOT / "build" / f"soak-{given.seed}.json"
    state.parent.mkdir(exist_ok=True)
    if given.worker:
        _work(given, state)
        return 0
    first = int(_read(state)["next"])
    command = [sys.executable, "-m", "tests.soak", *sys.argv[1:], "--worker"]
    # Threads that wait must not spin: there are more of them than processors.
    code = subprocess.run(
        command, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, check=False
    ).returncode
    now = _read(state)
    print(
        f"seed {given.seed}: cases {first} to {int(now['next']) - 1} passed at level "
        f"{gk.native.cpu_level()}; {now['seconds'] / 60:.1f} minutes in all"
    )
    if code:
        print(f"FAILED: python -m tests.soak --seed {given.seed} --case {int(now['next'])}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
