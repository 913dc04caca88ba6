"""The budget of every kernel: `python -m tests.build.budget` compiles all and writes budget.json.

A kernel may use fewer registers and less shared memory than its budget, never more; it may not lose
an instruction, a wide access or occupancy; nothing spills.
"""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tests.build.reports import Report, of_cuda, of_triton
from tests.gpu import gemm_ops, triton_host
from tests.gpu.ops import OPS

PATH = Path(__file__).parent / "budget.json"
THREADS = 128  # of a block of every CUDA kernel

Table = dict[str, dict[str, Any]]


def cuda(libraries: dict[str, Path]) -> Table:
    table: Table = {}
    for library in libraries.values():
        for arch, kernel, report in of_cuda(library, THREADS):
            table.setdefault(f"cuda {arch}", {})[kernel] = report._asdict()
    return table


def triton(target: str, folder: Path) -> Table:
    """The widest tile of every kernel and dtype."""
    found: dict[str, Any] = {}
    for name, op in OPS.items():
        for dtype in op.dtypes:
            launched: list[triton_host.Launched] = []
            with triton_host.launches_go_to(target, launched.append):
                op.triton(name)(*next(op.tiles(dtype))[1])
            for one in launched:
                kernel = one.compiled.metadata.name.removeprefix("_")
                short = str(dtype).removeprefix("torch.")
                key = f"{kernel} {short}"
                if key in found:  # one kernel of several ops, by constants
                    key = f"{key} {name}"
                found[key] = of_triton(one.compiled, folder)._asdict()
    return {f"triton {target}": found}


def gemms(target: str, folder: Path) -> Table:
    """The widest tile of every kind of expert GEMM in bfloat16 and float32."""
    found: dict[str, Any] = {}
    for name, op in gemm_ops.OPS.items():
        for dtype in (torch.bfloat16, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for kind, (label, args) in enumerate(islice(op.tiles(dtype), op.kinds)):
                launched: list[triton_host.Launched] = []
                with triton_host.launches_go_to(target, launched.append):
                    op.triton(name)(*args)
                for one in launched:
                    if one.compiled.metadata.name in gemm_ops.GEMM_KERNELS:
                        kernel = one.compiled.metadata.name.removeprefix("_")
                        key = f"{name} {kernel} {short}" + (f" {label}" if kind else "")
                        if key not in found:
                            found[key] = of_triton(one.compiled, folder)._asdict()
    return {f"gemm {target}": found}


def worse(now: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """What is worse than the budget, in words."""
    a, b = Report(**now), Report(**budget)
    found = [
        f"{n} {getattr(a, n)} > {getattr(b, n)}"
        for n in ("registers", "shared")
        if getattr(a, n) > getattr(b, n)
    ]
    found += [
        f"{n} {getattr(a, n)} < {getattr(b, n)}"
        for n in ("warps", "load_bits", "store_bits")
        if getattr(a, n) < getattr(b, n)
    ]
    if a.spills:
        found.append(f"{a.spills} bytes of spills")
    if lost := set(b.opcodes) - set(a.opcodes):
        found.append(f"no more {', '.join(sorted(lost))}")
    if new := set(a.opcodes) - set(b.opcodes):
        found.append(f"now {', '.join(sorted(new))}")
    return found


def main() -> None:
    from tests.build.conftest import compile_sources

    with tempfile.TemporaryDirectory() as folder:
        table = cuda({stem: lib for stem, (lib, _) in compile_sources().items()})
        for target in triton_host.TARGETS:
            table.update(triton(target, Path(folder)))
            table.update(gemms(target, Path(folder)))
    text = json.dumps(table, indent=1, sort_keys=True)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
