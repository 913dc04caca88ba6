"""The Triton launchers of gose_kernels.triton on CPU or meta tensors: what they launch is compiled
ahead of time, as on a GPU, and executed by the PTX machine or only collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.gpu import params
from tests.ptx import machine, memory
from tests.ptx.faults import Counts
from tests.ptx.parse import kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4}
_SIZES |= {"fp32": 4, "i64": 8, "u64": 8, "fp64": 8}


class Launched(NamedTuple):
    """A compiled kernel with the grid and the arguments (type, value) of its launch."""

    compiled: Any
    grid: tuple[int, int, int]
    args: list[tuple[str, Any]]
    declared: dict[str, Any]  # what the kernel tells profilers of this launch


class _Driver:
    """As much of a driver as compiling needs. Triton caches kernels by device: one per target."""

    def __init__(self, name: str) -> None:
        self._target, self._device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


def _until_ptx(*stages: Any) -> tuple[str, str] | None:
    """Triton's hook of compilation: the key of what it changes, or the stages to change."""
    if stages:
        stages[1]["cubin"] = lambda ptx, metadata: b""
    return ("until ptx",) * 2


@contextmanager
def launches_go_to(
    target: str, execute: Callable[[Launched], None], *, assembled: bool = True
) -> Iterator[None]:
    """Every Triton launch inside is compiled for the target and handed over. The PTX machine does
    without the assembler."""
    run, hip, before = JITFunction.run, torch.version.hip, driver._active

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        given = {k: v for k, v in options.items() if k in self.signature.parameters}
        bound = self.signature.bind(*args, **given).arguments
        types = kernel.src.signature
        sizes = (*grid, 1, 1)[:3]
        declared = self.launch_metadata(sizes, kernel.metadata, bound)
        values = [(types[n], bound[n]) for n in self.signature.parameters]
        execute(Launched(kernel, sizes, values, declared))
        return kernel

    driver.set_active(_Driver(target))
    JITFunction.run = compiled
    knobs.runtime.add_stages_inspection_hook = None if assembled else _until_ptx
    torch.version.hip = "6.0" if target.startswith("gfx") else None
    try:
        yield
    finally:
        JITFunction.run, torch.version.hip, driver._active = run, hip, before
        knobs.runtime.add_stages_inspection_hook = None


class OnPtx:
    """Executes launches on the PTX machine; `counts` adds up what they did."""

    def __init__(self, **options: Any) -> None:
        self.options, self.counts = options, Counts()
        self.declared: list[dict[str, Any]] = []

    def __call__(self, launched: Launched) -> None:
        self.declared.append(launched.declared)
        ((_, kernel),) = kernels(launched.compiled.asm["ptx"]).items()
        values: list[tuple[Any, int]] = []
        spans = {}
        for kind, value in launched.args:
            if isinstance(value, Tensor):
                spans[value.data_ptr()] = params.extent(value, f"tensor {len(spans)}")
            if kind != "constexpr":
                pointer = kind.startswith("*")
                size = 8 if pointer else _SIZES[kind]
                values.append((value.data_ptr() if isinstance(value, Tensor) else value, size))
        values += [(0, 8)] * (len(kernel.params) - len(values))  # scratch that no kernel asks for
        meta = launched.compiled.metadata
        assert meta.global_scratch_size == 0
        launch = machine.Launch(
            launched.grid, (32 * meta.num_warps, 1, 1), machine.pack(kernel, values), meta.shared
        )
        self.counts += machine.run(kernel, launch, memory.Global(spans.values()), **self.options)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN or the highest number: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_on_ptx(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Counts]:
    """(outputs, counts) of a launcher called on CPU tensors."""
    machine_ = OnPtx(**options)
    with launches_go_to("sm_80", machine_, assembled=False), _poisoned_memory():
        return function(*args), machine_.counts
