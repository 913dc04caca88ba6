"""What compilers made of csrc/cuda, kept in build/ladder under a hash of all that went in: workers
and runs share it."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from tests.gpu import params
from tests.gpu.cuda_host import SOURCES

Made = TypeVar("Made")
FOLDER = params.ROOT / "build" / "ladder"


@cache
def _surroundings() -> bytes:
    """Headers, the commands in tests/, the compilers' versions."""
    csrc, tests = params.ROOT / "csrc", params.ROOT / "tests"
    files = [*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), csrc / "emulate" / "control.cpp"]
    files += [*(tests / "gpu").glob("*.cpp"), tests / "gpu" / "cuda_host.py"]
    files += [tests / "build" / "conftest.py"]
    parts = [f.read_bytes() for f in sorted(files)]
    for compiler in ("nvcc", "g++"):
        if shutil.which(compiler) is not None:
            parts.append(subprocess.run([compiler, "--version"], capture_output=True).stdout)
    return hashlib.sha256(b"\0".join(parts)).digest()


class Kept(Mapping[str, Made], Generic[Made]):
    """Source name -> what `make(source, folder)` returns, made on demand and in one process at a
    time; `found(source, folder)` is the same of a folder where it has been made."""

    def __init__(
        self,
        kind: str,
        make: Callable[[Path, Path], Made],
        found: Callable[[Path, Path], Made],
    ) -> None:
        self._kind, self._make, self._found = kind, make, found
        self._known: dict[str, Made] = {}

    def __getitem__(self, name: str) -> Made:
        if name not in self._known:
            source = next((s for s in SOURCES if s.stem == name), None)
            if source is None:
                raise KeyError(name)
            self._known[name] = self._of(source)
        return self._known[name]

    def _of(self, source: Path) -> Made:
        folder = FOLDER / f"{self._kind}-{source.stem}"
        folder.mkdir(parents=True, exist_ok=True)
        key, stamp = hashlib.sha256(_surroundings() + source.read_bytes()), folder / "key"
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if stamp.exists() and stamp.read_text() == key.hexdigest():
                return self._found(source, folder)
            shutil.rmtree(folder)
            folder.mkdir()
            made = self._make(source, folder)
            stamp.write_text(key.hexdigest())
        return made

    def __iter__(self) -> Iterator[str]:
        return (s.stem for s in SOURCES)

    def __len__(self) -> int:
        return len(SOURCES)
