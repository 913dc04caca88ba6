"""A run killed with SIGKILL at random moments and resumed leaves the rows of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gose import config
from tests.gose.test_system import MINIATURE


def _gose(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gose", *arguments]


def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path, request: pytest.FixtureRequest):
    """Ten kills with --whole, else three; the moments are drawn by a fixed seed."""
    recipe = tmp_path / "miniature.toml"
    recipe.write_text(config.dump(MINIATURE), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_gose("run", str(recipe), "--out", str(whole)), check=True, capture_output=True)
    draw = random.Random(7)
    # From before the first checkpoint to the middle of a run: starting up takes about 2 s.
    for _ in range(10 if request.config.getoption("--whole") else 3):
        created = (killed / "environment.json").exists()
        command = ("run", "--resume", str(killed)) if created else ("run", str(recipe))
        process = subprocess.Popen(
            _gose(*command, *(() if created else ("--out", str(killed)))),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(draw.uniform(1.5, 7.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    command = ("--resume", str(killed)) if killed.exists() else (str(recipe), "--out", str(killed))
    subprocess.run(_gose("run", *command), check=True, capture_output=True)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
