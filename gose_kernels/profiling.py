"""Counts of what ran: calls, tokens, bytes, FLOPs and seconds per op and backend."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gose_kernels import registry
from gose_kernels.backends import Backend

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Count:
    """What one op did on one backend; bytes and FLOPs are the op's declared cost.

    Ops that an op calls inside are part of it and not counted apart. wall_seconds is host time: of
    a GPU backend it covers the launches, not the kernels.
    """

    calls: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: int = 0
    wall_seconds: float = 0.0


class Counts:
    """The table filled while `record` is active: (op name, backend name) -> Count."""

    def __init__(self, *, trace: bool, backend: str | None) -> None:
        self._backend = backend
        self.table: dict[tuple[str, str], Count] = {}
        self._inside = False
        self._nvtx: Any = None
        self._trace = trace
        if trace and torch.cuda.is_available() and importlib.util.find_spec("nvtx"):
            self._nvtx = importlib.import_module("nvtx")

    def call(
        self,
        op: registry.Op,
        backend: Backend,
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """Run the call, add it to the table, mark its range for torch's profiler and nvtx."""
        if self._inside:
            return backend.run(*args, **options)
        if self._backend is not None:
            backend = op.pick(*args, backend=self._backend, **options)
        count = self.table.setdefault((op.name, backend.name), Count())
        cost = op.cost(*args, **options) if op.cost is not None else registry.Cost(0, 0, 0)
        self._inside = True
        start = time.perf_counter()
        try:
            result = self._run(f"gose::{op.name}[{backend.name}]", backend, args, options)
        finally:
            self._inside = False
        count.wall_seconds += time.perf_counter() - start
        count.calls += 1
        count.tokens += cost.tokens
        count.bytes += cost.bytes
        count.flops += cost.flops
        return result

    def _run(
        self,
        label: str,
        backend: Backend,
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        if not self._trace:
            return backend.run(*args, **options)
        with torch.profiler.record_function(label):
            if self._nvtx is None:
                return backend.run(*args, **options)
            with self._nvtx.annotate(label, domain="gose"):
                return backend.run(*args, **options)

    @property
    def wall_seconds(self) -> float:
        """Seconds inside gose ops."""
        return sum(c.wall_seconds for c in self.table.values())


def flop_counter() -> FlopCounterMode:
    """torch's FlopCounterMode, which also counts this library's ops, by their declared cost.

    Use it like FlopCounterMode(display=False); a plain FlopCounterMode counts gose ops as 0.
    """
    # This import takes 0.2 s and imports triton where it is installed.
    from torch.utils.flop_counter import FlopCounterMode

    def formula(op: registry.Op) -> Any:
        def flops(*args: Any, out_val: Any = None, **options: Any) -> int:
            return op.cost_of(*args, **options).flops

        flops._get_raw = True  # type: ignore[attr-defined]  # tensors instead of shapes
        return flops

    mapping = {op.overload.overloadpacket: formula(op) for op in registry.OPS.values()}
    return FlopCounterMode(display=False, custom_mapping=mapping)


@contextmanager
def record(*, trace: bool = False, backend: str | None = None) -> Iterator[Counts]:
    """Counts of every op called inside the block, in this process.

    backend: every op runs on this one, or raises the reason why it cannot; for comparisons.

    trace=True also emits record_function ranges (torch.profiler shows them) and, on a GPU with the
    package nvtx, nvtx ranges in the domain "gose". Blocks nest: the innermost one counts.
    """
    counts = Counts(trace=trace, backend=backend)
    registry.observers.append(counts)
    try:
        yield counts
    finally:
        registry.observers.remove(counts)
