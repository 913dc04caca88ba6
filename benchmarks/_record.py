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
from gose import rundir

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with -dirty where files differ from it; "unknown" outside git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def save(name: str, command: str, threads: int, values: Mapping[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json and gives its path."""
    result = {
        "command": command,
        "commit": commit(),
        "machine": {
            "cpu": rundir.cpu_model(),
            "cpu_level": gk.native.cpu_level(),
            "platform": platform.platform(),
            "threads": threads,
            "torch": torch.__version__,
        },
        **values,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path
