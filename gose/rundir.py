"""The directory of a run: what was asked, where it ran, what came out, where to go on from.

    config.toml        the config, complete
    environment.json   versions, CPU level, threads, platform; written last when a run is created
    metrics.jsonl      one row per line, deterministic values only
    timings.jsonl      one row per line, wall times
    checkpoints/       see gose.checkpoint; `extra` holds length and sha256 of the two files above
    lock               held with flock while a process works here; its text names that process

Rows written after the last commit are dropped when the run is opened again: the units that gave
them run again. So a killed and resumed run leaves the same metrics.jsonl, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import gose
import gose_kernels as gk
from gose import checkpoint, config
from gose.checkpoint import Checkpoint, CheckpointError, Failpoint, Json, State, json_line

_CONFIG = "config.toml"
_ENVIRONMENT = "environment.json"
_CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
# What may lie in a directory whose creation was cut short.
_UNFINISHED = {"lock", _CONFIG, f".{_CONFIG}.tmp", f".{_ENVIRONMENT}.tmp"}
# Packages whose version may change a number.
_PACKAGES = ("torch", "numpy", "safetensors", "scikit-learn", "mlxtend")
_START = Checkpoint(0, State({}, {}), {})


class Progress(NamedTuple):
    """One finished unit of a run."""

    done: int  # units of the whole run
    total: int
    phase: str  # few distinct values: teacher, distill, learn, merge, evaluate, ...
    label: str  # which unit: "seed 0, main, task 2, round 1, learn"
    amount: float  # work of this unit, counted in `unit`
    unit: str  # "images"
    seconds: float  # wall time of this unit


class RunDir:
    """A run directory that this process holds, as `create` and `resume` give it."""

    def __init__(
        self,
        path: Path,
        run_config: config.SystemConfig,
        environment: Mapping[str, Json],
        start: Checkpoint,
        notes: list[str],
        failpoint: Failpoint,
    ) -> None:
        self.path = path
        self.config = run_config
        self.environment = environment
        self.step = start.step  # units committed
        self.state = start.state  # what they left
        self.notes = notes  # what whoever resumes this run should know
        self._failpoint = failpoint
        self._journals = {name: _Journal(path / name) for name in (METRICS, TIMINGS)}

    @property
    def threads(self) -> int:
        """Threads of torch that the numbers of this run were, and are to be, computed with."""
        return int(str(self.environment["threads"]))

    def record(self, row: Mapping[str, Json]) -> None:
        """Append a row to metrics.jsonl; ValueError for NaN (write None where undefined)."""
        self._journals[METRICS].append(row)

    def record_timing(self, row: Mapping[str, Json]) -> None:
        """Append a row to timings.jsonl."""
        self._journals[TIMINGS].append(row)

    def commit(self, step: int, total: int, state: State) -> None:
        """Make `step` of `total` units durable: all rows recorded so far, then the state."""
        extra: dict[str, Json] = {name: journal.sync() for name, journal in self._journals.items()}
        checkpoint.save(
            self.path / _CHECKPOINTS,
            state,
            step=step,
            extra=extra | {"total": total},
            failpoint=self._failpoint,
        )
        self.step, self.state = step, state

    def close(self) -> None:
        """Close the files; rows that were not committed may or may not be on the disk."""
        for journal in self._journals.values():
            journal.close()


@contextmanager
def create(
    path: Path,
    run_config: config.SystemConfig,
    *,
    failpoint: Failpoint = lambda _moment: None,
) -> Iterator[RunDir]:
    """A new run in `path`, which must not exist or be empty. failpoint: see checkpoint.save."""
    if (path / _ENVIRONMENT).exists():
        raise ValueError(f"{path}: holds a run already; resume it, or name another directory")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is not a directory; name another one")
    if path.is_dir() and (foreign := sorted({p.name for p in path.iterdir()} - _UNFINISHED)):
        raise ValueError(f"{path}: is not empty ({foreign[0]!r}); name a new directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made: {error.strerror}") from None
    with _locked(path):
        text = config.dump(run_config).encode()
        found = environment(run_config) | {"config_sha256": hashlib.sha256(text).hexdigest()}
        checkpoint.write_file(path / _CONFIG, text)
        checkpoint.write_file(path / _ENVIRONMENT, _pretty(found))
        with _opened(RunDir(path, run_config, found, _START, [], failpoint)) as run:
            yield run


@contextmanager
def resume(path: Path, *, failpoint: Failpoint = lambda _moment: None) -> Iterator[RunDir]:
    """The run in `path` as its newest verifying checkpoint left it; at step 0 if there is none.

    Raises ValueError if `path` holds no run, another process works there, or its config changed.
    """
    _refuse_unless_run(path)
    with _locked(path):
        text = (path / _CONFIG).read_bytes()
        recorded = read_environment(path)
        if hashlib.sha256(text).hexdigest() != recorded.get("config_sha256"):
            raise ValueError(
                f"{path / _CONFIG}: changed since the run began; put it back, or start a new run "
                f"with `gose run {path / _CONFIG}`"
            )
        run_config = config.load(path / _CONFIG)
        latest = checkpoint.latest(path / _CHECKPOINTS, accept=lambda c: _fits(path, c))
        start = latest.checkpoint or _START
        notes = [f"checkpoint not used: {reason}" for reason in latest.refused.values()]
        notes += _differences(recorded, environment(run_config))
        for name in (METRICS, TIMINGS):
            _truncate(path / name, _length(start, name))
        with _opened(RunDir(path, run_config, recorded, start, notes, failpoint)) as run:
            yield run


def status(path: Path) -> tuple[int, int]:
    """(units committed, units in all) of the run in `path`; (0, 0) before its first commit."""
    _refuse_unless_run(path)
    found = checkpoint.latest(path / _CHECKPOINTS).checkpoint
    return (0, 0) if found is None else (found.step, int(str(found.extra.get("total", 0))))


def read_rows(path: Path) -> list[dict[str, Json]]:
    """The rows of a .jsonl file; [] if there is none. A last line still being written is left out.

    Raises ValueError naming the line that is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def read_environment(path: Path) -> dict[str, Json]:
    """environment.json of the run in `path`; ValueError if it is missing or damaged."""
    _refuse_unless_run(path)
    try:
        found = json.loads((path / _ENVIRONMENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / _ENVIRONMENT}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path / _ENVIRONMENT}: not a JSON object")
    threads = found.get("threads")
    if type(threads) is not int or threads < 1:
        raise ValueError(f"{path / _ENVIRONMENT}: threads must be a positive number, got {threads}")
    return found


def environment(run_config: config.SystemConfig) -> dict[str, Json]:
    """Facts of this process and machine that may change a number, and when they were taken."""
    return {
        "gose": gose.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_level": gk.native.cpu_level() or f"none: {gk.native.why_not()}",
        "threads": run_config.threads or len(os.sched_getaffinity(0)),
        "seeds": list(run_config.seeds),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_model() -> str:
    """Name of the processor as the kernel tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class _Journal:
    """A file of JSON lines that knows its length and digest."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._digest = hashlib.sha256(path.read_bytes() if path.exists() else b"")
        self._file = path.open("ab")

    def append(self, row: Mapping[str, Json]) -> None:
        line = json_line(dict(row), f"{self._name}: row {row.get('kind', '')}".rstrip()) + "\n"
        self._file.write(line.encode())
        self._digest.update(line.encode())

    def sync(self) -> dict[str, Json]:
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


@contextmanager
def _opened(run: RunDir) -> Iterator[RunDir]:
    try:
        yield run
    finally:
        run.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock of a run directory. The kernel drops it with its process, so none can be stale."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ValueError(f"{path}: in use by {holder}; wait for it or stop it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _refuse_unless_run(path: Path) -> None:
    if not (path / _ENVIRONMENT).is_file() or not (path / _CONFIG).is_file():
        raise ValueError(f"{path}: holds no run; start one with `gose run quickstart --out {path}`")


def _length(found: Checkpoint, name: str) -> int:
    recorded = found.extra.get(name, {"bytes": 0})
    assert isinstance(recorded, dict)
    return int(str(recorded["bytes"]))


def _fits(path: Path, found: Checkpoint) -> None:
    """Raise CheckpointError unless the journals begin with what they held at this checkpoint."""
    for name in (METRICS, TIMINGS):
        recorded = found.extra.get(name)
        length = recorded.get("bytes") if isinstance(recorded, dict) else None
        if not isinstance(recorded, dict) or not isinstance(length, int):
            raise CheckpointError(f"step {found.step}: does not record the length of {name}")
        content = (path / name).read_bytes() if (path / name).exists() else b""
        if hashlib.sha256(content[:length]).hexdigest() != recorded.get("sha256"):
            raise CheckpointError(f"step {found.step}: {name} is shorter or was altered since")


def _truncate(path: Path, length: int) -> None:
    with path.open("ab") as file:
        file.truncate(length)
        os.fsync(file.fileno())


def _differences(recorded: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    same = {"started", "threads", "config_sha256"}  # new, forced, checked
    return [
        f"{key} was {recorded[key]}, is {now.get(key)}: numbers may differ in the last digits"
        for key in recorded
        if key not in same and recorded[key] != now.get(key)
    ]


def _pretty(value: Mapping[str, Json]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
