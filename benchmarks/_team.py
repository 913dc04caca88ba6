"""The workers of a comparison: one process per peer, all but the one asked stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks._peers import Shape

ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    # No block is mapped and unmapped by the call that uses it, and the heap never shrinks: large
    # temporaries cost no page faults after the first call.
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
}
# What GOSE_ISA asks of us, asked of the libraries that peers are built on.
CAPS: Mapping[str, Mapping[str, str]] = {
    "": {},
    "avx512": {
        "GOSE_ISA": "avx512",  # float32 multiply-adds: no vdpbf16ps
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "KT_KERNEL_CPU_VARIANT": "avx512_vnni",
    },
    "avx2": {
        "GOSE_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "KT_KERNEL_CPU_VARIANT": "avx2",
    },
}
_ROOT = Path(__file__).parent.parent


class WorkerDiedError(RuntimeError):
    """A worker ended instead of answering; the text is its last lines."""


class Process:
    """One worker. It runs only while a request is under way."""

    def __init__(
        self, python: str, peer: str, threads: int, environment: Mapping[str, str]
    ) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks._worker", peer],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                "PYTHONPATH": str(_ROOT),
                "OMP_NUM_THREADS": str(threads),
                "OMP_PROC_BIND": "true",
                "OMP_PLACES": ",".join(f"{{{core}}}" for core in cores),
                **environment,
            },
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Raises WorkerDiedError."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            pipe_in.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            with suppress(subprocess.TimeoutExpired):  # its pipes close before it has ended
                self._process.wait(timeout=10)
            raise WorkerDiedError(self.close())
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> str:
        """Ends the worker; how it ended, and the last line that it wrote."""
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            with suppress(BrokenPipeError):
                file.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:200]}" if lines else how


class Team:
    """Workers that hold one layer, by peer, and their versions; `reasons` says why others do not.

    `folder` holds the weights and the truths.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.workers: dict[str, Process] = {}
        self.versions: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def add(self, peer: str, worker: Process, **layer: Any) -> bool:
        """Whether the worker could build the layer, and so has become one of the team."""
        self.workers[peer] = worker
        answer = self.ask(peer, "build", folder=self.folder, **layer)
        if "reason" not in answer:
            self.versions[peer] = answer["version"]
            self.reasons.pop(peer, None)
            return True
        if peer in self.workers:
            self.drop(peer, answer["reason"])
        return False

    def drop(self, peer: str, reason: str) -> None:
        self.workers.pop(peer).close()
        self.reasons[peer] = reason

    def ask(self, peer: str, do: str, **arguments: Any) -> dict[str, Any]:
        """The peer's answer; a peer that dies of it, or has before, answers with the reason."""
        if peer not in self.workers:
            return {"reason": self.reasons[peer]}
        try:
            return self.workers[peer].ask(do, **arguments)
        except WorkerDiedError as died:
            del self.workers[peer]
            self.reasons[peer] = f"died: {died}"
            return {"reason": self.reasons[peer]}


@contextmanager
def gathered(
    peers: Sequence[str],
    shape: Shape,
    dtype: str,
    truths: Sequence[tuple[int, int]],
    trained: Iterable[int] = (),
    *,
    threads: int,
    pythons: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[Team]:
    """A team on fresh weights, with the truth for these (tokens, routing), and of training steps
    on these numbers of tokens.

    A peer runs in the first of `pythons` that has it.
    """
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    layer = {"shape": shape, "dtype": dtype}
    with tempfile.TemporaryDirectory(prefix="gose-bench-", dir=shared) as folder:
        maker = Process(pythons[0], "", threads, {})
        try:
            maker.ask("make", folder=folder, seed=0, **layer)
            for tokens, routing in truths:
                maker.ask("truth", folder=folder, tokens=tokens, routing=routing, **layer)
            for tokens in trained:
                maker.ask("train_truth", folder=folder, tokens=tokens, **layer)
        finally:
            maker.close()
        team = Team(folder)
        try:
            for peer in peers:
                for python in pythons:
                    if team.add(peer, Process(python, peer, threads, environment), **layer):
                        break
            yield team
        finally:
            for worker in team.workers.values():
                worker.close()
