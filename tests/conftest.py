"""Skips that are not listed fail the run; long matrices are sampled by a printed seed.

--whole runs every case of tests marked `matrix(keep=N)`; without it N of their parametrisations
run, drawn by a seed taken from the commit, so different commits cover different cases.
"""

from __future__ import annotations

import fnmatch
import random
import subprocess
from pathlib import Path

import hypothesis
import pytest

_ROOT = Path(__file__).parent
_unlisted: list[str] = []


def _commit_seed() -> str:
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no-commit"
    return head.stdout.strip()[:12]


def expected_skips() -> list[tuple[str, str]]:
    """(node pattern, reason pattern) of every line of expected_skips.txt, fnmatch style."""
    pairs = []
    for line in (_ROOT / "expected_skips.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            node, _, reason = line.partition(" | ")
            pairs.append((node.strip(), reason.strip()))
    return pairs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run sampled matrices whole")
    parser.addoption("--matrix-seed", default=_commit_seed(), help="default: from the commit")


def pytest_configure(config: pytest.Config) -> None:
    """No deadlines (machines are shared); the same examples in every run but a whole one."""
    hypothesis.settings.register_profile(
        "repeatable", deadline=None, derandomize=not config.getoption("--whole")
    )
    hypothesis.settings.load_profile("repeatable")


def _sampling(config: pytest.Config) -> str:
    if config.getoption("--whole"):
        return "matrices: whole"
    return f"matrices: sampled, --matrix-seed={config.getoption('--matrix-seed')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--whole"):
        return
    groups: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        # A test has a mark, or a parameter of it, or both: the fewest are kept.
        if kept := [int(mark.kwargs["keep"]) for mark in item.iter_markers("matrix")]:
            groups.setdefault((item.nodeid.split("[")[0], min(kept)), []).append(item)
    dropped: set[str] = set()
    for (name, keep), group in groups.items():
        draw = random.Random(f"{config.getoption('--matrix-seed')} {name}")
        surplus = max(0, len(group) - keep)
        dropped |= {item.nodeid for item in draw.sample(group, surplus)}
    if dropped:
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in dropped])
        items[:] = [i for i in items if i.nodeid not in dropped]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not any(
        fnmatch.fnmatchcase(report.nodeid, node) and fnmatch.fnmatchcase(reason, wanted)
        for node, wanted in expected_skips()
    ):
        _unlisted.append(f"{report.nodeid} | {reason}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    # At the end: -q prints no header.
    terminalreporter.line(_sampling(config))
    if _unlisted:
        terminalreporter.section("skips that tests/expected_skips.txt does not list")
        for line in _unlisted:
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unlisted and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
