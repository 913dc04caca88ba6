"""Results that a README may quote: JSON with the machine, the commit and the command."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gose_kernels as gk
from gose import checkpoint, rundir

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with -dirty where files other than results and README, which shows
    them, differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    changed = ("status", "--porcelain", "--untracked-files=no", "--", ".")
    try:
        dirty = git(*changed, ":!benchmarks/results", ":!README.md")
        return git("describe", "--always") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(threads: int) -> dict[str, Any]:
    """Where numbers come from."""
    return {
        "cpu": rundir.cpu_model(),
        "cpu_level": gk.native.cpu_level(),
        "platform": platform.platform(),
        "threads": threads,
        "torch": torch.__version__,
    }


def save(
    name: str, command: str, threads: int, values: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Writes benchmarks/results/<name>.json, or that name in `folder`, and gives its path."""
    result = {"command": command, "commit": commit(), "machine": machine(threads), **values}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    checkpoint.write_file(path, text.encode())
    return path
