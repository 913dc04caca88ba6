"""Seconds of every GPU kernel beside its roofline prediction, as JSON.

    python -m benchmarks gpu [--device cuda|cpu] [--quick] [--out FILE]

Needs torch, triton and numpy alone. --device cpu is a dry run: the CPU kernels stand in, and the
file says so. Times are medians; on a GPU each is of 20 calls between two events.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import gpu_model

_CALLS = 20
_OF_EXPERTS = ("dispatch", "route_backward")  # whose integers are experts


def _filled(op: str, shape: gpu_model.Shape, device: str) -> tuple[Any, ...]:
    """Arguments of a shape with values: rows of a permutation, ids below E, normal floats."""
    random = torch.Generator().manual_seed(0)

    def fill(t: Any) -> Any:
        if isinstance(t, list):
            return [fill(own) for own in t]
        if not isinstance(t, Tensor):
            return t
        if t.dtype == torch.bool:
            return torch.zeros(t.shape, dtype=torch.bool, device=device)  # nothing is frozen
        if t.is_floating_point():
            drawn = torch.randn(t.shape, generator=random)
            positive = op.startswith(("dequantize", "masked"))  # scales, second moments
            return (drawn.abs() if positive else drawn).to(device, t.dtype)
        count = t.numel()
        values = None if op in _OF_EXPERTS else torch.randperm(count, generator=random)
        values = torch.randint(0, shape.E, (count,), generator=random) if values is None else values
        return values.view(t.shape).to(device, t.dtype)

    return tuple(fill(t) for t in gpu_model.ARGUMENTS[op](shape))


def _seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            for _ in range(_CALLS):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return float(statistics.median(times))


def measure(device: str, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name in gpu_model.ARGUMENTS:
        for label, shape in gpu_model.SHAPES.items():
            if quick and shape.T > 256:
                continue
            args = _filled(name, shape, device)
            op = gk.OPS[name]
            for backend, reason in op.reasons(*args).items():
                if reason is not None or backend == "torch":
                    continue

                def call(op: Any = op, args: Any = args, backend: str = backend) -> object:
                    return op(*args, backend=backend)

                seconds = _seconds(call, device, 3 if quick else 11)
                work = gpu_model.work(name, "triton" if backend == "triton" else "cuda", *args)
                rows.append(
                    {
                        "op": name,
                        "shape": label,
                        "backend": backend,
                        "microseconds": 1e6 * seconds,
                        "bytes": work.bytes,
                        "gigabytes_per_second": work.bytes / seconds / 1e9,
                        "predicted_microseconds": {
                            d: 1e6 * gpu_model.predicted_seconds(work, gpu_model.DEVICES[d])[0]
                            for d in gpu_model.DEVICES
                        },
                    }
                )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="T <= 256, 3 repeats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks gpu: no GPU is visible to torch; --device cpu is a dry run")
        return 2
    on_gpu = options.device == "cuda"
    rows = measure(options.device, options.quick)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "dry_run": not on_gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.out)
    print(f"{len(rows)} rows in {options.out}")
    return 0
