"""The machine: blocks of a grid in lockstep, one NumPy element per thread and register.

Of the threads that can go on, those at the lowest instruction do: threads of a divergent branch
meet again where their paths do. Many blocks run side by side; a kernel must not care, and the
shadows of tests/ptx/memory.py fault where it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import decode
from tests.ptx.faults import Counts, KernelError
from tests.ptx.memory import WARP, Global, Shared
from tests.ptx.parse import Kernel

ORDERS = ("forward", "reverse", "random")
_LANES = 8192  # threads that run side by side: enough to hide Python behind NumPy
_MAX_STEPS = 2_000_000


class Launch(NamedTuple):
    """A grid of blocks, the bytes of the parameters, the size of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    dynamic_shared: int = 0


@lru_cache(maxsize=256)
def _program(kernel: _ByIdentity) -> list[decode.Step]:
    return [decode.step(i, kernel.kernel) for i in kernel.kernel.instructions]


class _ByIdentity:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __hash__(self) -> int:
        return id(self.kernel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.kernel is other.kernel


def run(
    kernel: Kernel,
    launch: Launch,
    memory: Global,
    *,
    order: str = "forward",
    count: bool = True,
    lanes: int = _LANES,
) -> Counts:
    """Executes every block and returns what was counted; raises KernelError.

    order  of blocks, and of atomics of one instruction: "forward", "reverse", "random"
    count  sectors, distinct bytes of requests and bank conflicts too (they take time)
    lanes  threads that run side by side, at least one block
    """
    threads = math.prod(launch.block)
    assert len(launch.params) == kernel.param_bytes, f"{kernel.name}: {kernel.param_bytes} bytes"
    if kernel.max_threads is not None and threads > kernel.max_threads:
        raise KernelError("launch", f"{threads} threads a block, compiled for {kernel.max_threads}")
    blocks = np.arange(math.prod(launch.grid))
    if order == "reverse":
        blocks = blocks[::-1]
    elif order == "random":
        blocks = np.random.default_rng(0).permutation(blocks)
    counts = Counts(launches=1)
    per_chunk = max(1, lanes // (-(-threads // WARP) * WARP))
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), per_chunk):
            chunk = blocks[start : start + per_chunk]
            if order == "reverse":  # its atomics go through the lanes backwards
                chunk = chunk[::-1]
            _Blocks(kernel, launch, memory, counts, chunk, count, order).run()
    memory.finish(counts)
    return counts


class _Group:
    """Threads that go together."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.whole = self.count == len(mask)

    @cached_property
    def lanes(self) -> np.ndarray:
        return np.flatnonzero(self.mask)

    @cached_property
    def warps(self) -> int:
        if self.whole:
            return len(self.mask) // WARP
        return int(np.count_nonzero(self.mask.reshape(-1, WARP).any(axis=1)))

    def where(self, flag: np.ndarray) -> _Group:
        part = _Group(self.mask & flag)
        return self if part.count == self.count else part


class _Blocks:
    """Some blocks side by side: registers, masks, shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        memory: Global,
        counts: Counts,
        blocks: np.ndarray,
        count: bool,
        order: str,
    ) -> None:
        self.kernel, self.memory, self.counts, self.counting = kernel, memory, counts, count
        self.backwards = order == "reverse"
        self.threads = math.prod(launch.block)
        self.padded = -(-self.threads // WARP) * WARP  # lanes of a block: whole warps
        self.size = len(blocks) * self.padded
        self.params = np.frombuffer(launch.params, np.uint8)
        self.slot = np.repeat(np.arange(len(blocks)), self.padded)
        self.thread = np.tile(np.arange(self.padded), len(blocks))
        self.block = (np.repeat(blocks, self.padded) + 1).astype(np.int32)
        self.lane = self.thread % WARP
        self.alive = self.thread < self.threads
        self.parked = np.zeros(self.size, bool)
        self.parked_at = np.zeros(self.size, np.int64)
        size = kernel.shared_bytes + launch.dynamic_shared
        self.shared = Shared(len(blocks), size, self.threads)
        self.local = np.full((self.size, max(8, kernel.local_bytes)), 0xFF, np.uint8)
        self.committed = np.zeros(self.size, np.int64)
        self.copies: list[decode.Copy] = []
        self.registers: dict[str, np.ndarray] = {}
        self.special = self._special(launch, blocks)
        self.pc = 0
        self._set(_Group(self.alive.copy()))

    def _special(self, launch: Launch, blocks: np.ndarray) -> dict[str, np.ndarray]:
        values: dict[str, Any] = {"%laneid": self.lane, "%warpid": self.thread // WARP}
        for prefix, size, linear in (
            ("tid", launch.block, self.thread),
            ("ctaid", launch.grid, np.repeat(blocks, self.padded)),
        ):
            x, y, _ = size
            parts = (linear % x, linear // x % y, linear // (x * y))
            for axis, part in zip("xyz", parts, strict=True):
                values[f"%{prefix}.{axis}"] = part
            for axis, extent in zip("xyz", size, strict=True):
                values[f"%n{prefix}.{axis}"] = np.full(self.size, extent)
        values["%nwarpid"] = np.full(self.size, self.padded // WARP)
        return {name: np.asarray(v).astype(np.uint32) for name, v in values.items()}

    # ---- what instructions see ---------------------------------------------------------------

    def _set(self, group: _Group) -> None:
        self.group, self.mask, self.whole = group, group.mask, group.whole

    @property
    def lanes(self) -> np.ndarray:
        return self.group.lanes

    @property
    def whole_warps(self) -> bool:
        """No warp is here with some of its threads alone."""
        return self.group.count == WARP * self.group.warps

    def pick(self, values: np.ndarray) -> np.ndarray:
        """The elements of the active lanes, to be read only."""
        return values if self.whole else values[self.group.lanes]

    def fault(self, kind: str, message: str) -> KernelError:
        return KernelError(kind, f"{message} [{self.kernel.instructions[self.pc].text}]")

    def get(self, name: str, dtype: np.dtype) -> np.ndarray:
        register = self.registers.get(name)
        if register is None:
            raise self.fault("unwritten register", f"{name} was never written")
        if register.dtype is dtype:
            return register
        if register.dtype.itemsize == dtype.itemsize:
            return register.view(dtype)
        if register.dtype.itemsize < dtype.itemsize:
            raise self.fault("unsupported", f"{name} is narrower than {dtype}")
        return register.astype(f"u{dtype.itemsize}").view(dtype)

    def _register(self, name: str) -> np.ndarray:
        register = self.registers.get(name)
        if register is None:
            dtype = self.kernel.registers[name]
            register = np.zeros(self.size, dtype)
            register.view(np.uint8)[:] = 0 if dtype.kind == "b" else 0xFF
            self.registers[name] = register
        return register

    def put(self, name: str, values: Any) -> None:
        register = self.registers.get(name)
        if register is None:
            register = self._register(name)
        if values.dtype is not register.dtype:
            values = decode.fit(values, register.dtype)
        if self.whole:
            register[...] = values
        else:
            np.copyto(register, values, where=self.mask)

    def put_lanes(self, name: str, values: np.ndarray) -> None:
        """`values` has one element per active lane."""
        if self.whole:
            self.put(name, values)
        else:
            register = self._register(name)
            register[self.group.lanes] = decode.fit(values, register.dtype)

    # ---- control -----------------------------------------------------------------------------

    def run(self) -> None:
        program = _program(_ByIdentity(self.kernel))
        waiting: dict[int, np.ndarray] = {0: self.alive.copy()}
        flag_type = np.dtype(bool)
        issued, lanes = [0] * len(program), [0] * len(program)
        steps = 0

        def later(pc: int, mask: np.ndarray) -> None:
            waiting[pc] = waiting[pc] | mask if pc in waiting else mask

        while waiting:
            pc = min(waiting)
            group = _Group(waiting.pop(pc))
            limit = min(waiting, default=len(program))
            self._set(group)
            while pc < limit:
                steps += 1
                if steps > _MAX_STEPS:
                    raise self.fault("endless", f"{_MAX_STEPS} steps")
                self.pc, step = pc, program[pc]
                active = group
                if step.guard is not None:
                    flag = self.get(step.guard, flag_type)
                    active = group.where(~flag if step.guard_negated else flag)
                if step.control == "":
                    if active is group:
                        step.run(self)
                    elif active.count:
                        self._set(active)
                        step.run(self)
                        self._set(group)
                    issued[pc] += active.warps
                    lanes[pc] += active.count
                    pc += 1
                    continue
                issued[pc] += group.warps
                if active.count and step.control == "branch":
                    later(step.target, active.mask)
                elif active.count and step.control == "exit":
                    self.alive &= ~active.mask
                    self._release(later)
                elif active.count:
                    self.parked |= active.mask
                    self.parked_at[active.mask] = pc
                    self._release(later)
                if active.count < group.count:
                    later(pc + 1, group.mask & ~active.mask)
                break
            else:
                if pc >= len(program):
                    self.alive &= ~group.mask
                    self._release(later)
                else:
                    later(pc, group.mask)
        assert not self.alive.any()
        self._count(program, issued, lanes)

    def _count(self, program: list[decode.Step], issued: list[int], lanes: list[int]) -> None:
        self.counts.instructions += sum(issued)
        for step, warps, threads in zip(program, issued, lanes, strict=True):
            self.counts.opcodes[step.opcode] += warps
            self.counts.flops += step.flops * threads

    def _release(self, later: Callable[[int, np.ndarray], None]) -> None:
        """Blocks whose living threads all wait go on; all their threads must wait, at one place."""
        if not self.parked.any():
            return
        parked = self.parked.reshape(-1, self.padded)
        alive = self.alive.reshape(-1, self.padded)
        ready = (parked == alive).all(axis=1) & parked.any(axis=1)
        if not ready.any():
            return
        for slot in np.flatnonzero(ready):
            places = np.unique(self.parked_at.reshape(-1, self.padded)[slot][parked[slot]])
            if len(places) > 1 or int(parked[slot].sum()) != self.threads:
                text = " and ".join(self.kernel.instructions[p].text for p in places)
                raise KernelError(
                    "divergent barrier",
                    f"{int(parked[slot].sum())} of {self.threads} threads of a block wait at {text}"
                    f" (instructions {', '.join(map(str, places))})",
                )
        self.shared.barrier(np.flatnonzero(ready))
        self.counts.barriers += int(ready.sum())
        freed = self.parked & np.repeat(ready, self.padded)
        for pc in np.unique(self.parked_at[freed]):
            later(int(pc) + 1, freed & (self.parked_at == pc))
        self.parked &= ~freed


def run_text(text: str, name: str, launch: Launch, memory: Global, **options: Any) -> Counts:
    """`run` on the kernel `name` of a PTX module."""
    from tests.ptx.parse import kernels

    return run(kernels(text)[name], launch, memory, **options)


def pack(kernel: Kernel, values: Sequence[tuple[Any, int]]) -> bytes:
    """Parameter bytes of (value, size) pairs in order; floats by their bits."""
    out = bytearray(kernel.param_bytes)
    for (value, size), offset in zip(values, kernel.params.values(), strict=True):
        if isinstance(value, float):
            raw = np.array(value, {2: "f2", 4: "f4", 8: "f8"}[size]).tobytes()
        else:
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        out[offset : offset + size] = raw
    return bytes(out)
