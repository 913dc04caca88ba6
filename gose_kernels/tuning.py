"""Warps of the Triton kernels, measured on request and kept in a file.

Without `tune` every launcher takes its closed-form choice: nothing is measured at a first call.
Only kernels whose bits do not depend on the choice are tuned.

file    JSON: {"format": 1, "device": name of the GPU, "triton": version, "warps": {kernels: 2|4|8}}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from gose_kernels.backends import triton_interprets, triton_reason
from gose_kernels.registry import OPS
from gose_kernels.triton import WARPS, choose_warps, warps_of

_FORMAT = 1
_CALLS, _REPEATS = 20, 5
_WORTH = 0.97  # of the closed form's seconds: less is noise


def _combine() -> tuple[Any, ...]:
    T, K, D = 4096, 8, 2048
    y = torch.ones(T * K, D, device="cuda", dtype=torch.bfloat16)
    row = torch.arange(T * K, device="cuda", dtype=torch.int32).view(T, K)
    return y, torch.ones(T, K, device="cuda"), row


def _dispatch() -> tuple[Any, ...]:
    return torch.arange(2**17, device="cuda", dtype=torch.int32).view(-1, 8) % 128, 128


def _quantize() -> tuple[Any, ...]:
    x = torch.linspace(-1, 1, 2**24, device="cuda")
    return x, x


def _masked_update() -> tuple[Any, ...]:
    shape = (4096, 4096)
    param, grad, m, v = (torch.ones(shape, device="cuda") for _ in range(4))
    step, lr = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    return [param], [grad], [m, v], [step], [], [], [], lr


# Kernels that share a choice: the op that stands for them, and its arguments.
_TUNED: Mapping[str, tuple[str, Callable[[], tuple[Any, ...]]]] = MappingProxyType(
    {
        "combine": ("combine", _combine),
        "dispatch": ("dispatch", _dispatch),
        "masked_update": ("masked_adam_", _masked_update),
        "quantize": ("quantize", _quantize),
    }
)


def _device() -> str:
    """Name of the GPU in use; RuntimeError where Triton has none."""
    reason = triton_reason()
    if reason is None and triton_interprets():
        reason = "TRITON_INTERPRET=1 runs on the CPU"
    if reason is not None:
        raise RuntimeError(f"tune: needs a GPU that Triton can use: {reason}")
    return str(torch.cuda.get_device_name())


def _seconds(op: str, args: tuple[Any, ...]) -> float:
    """Median time of a call."""
    OPS[op](*args, backend="triton")
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_CALLS):
            OPS[op](*args, backend="triton")
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return float(statistics.median(times))


def _measure() -> dict[str, int]:
    """The fastest choices; the closed form's where none is clearly faster."""
    found = {}
    for kernels, (op, build) in _TUNED.items():
        args = build()
        before, times = warps_of(kernels), {}
        try:
            for warps in WARPS:
                choose_warps({kernels: warps})
                times[warps] = _seconds(op, args)
        finally:
            choose_warps({kernels: before})
        best = min(times, key=lambda w: times[w])
        found[kernels] = best if times[best] < _WORTH * times[before] else before
    return found


def _load(path: Path, device: str, version: str) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"tune: {path} must be JSON, but {error}") from None
    wanted = {"format": _FORMAT, "device": device, "triton": version}
    if not isinstance(found, dict) or set(found) != {*wanted, "warps"}:
        raise ValueError(f"tune: {path} must hold {', '.join([*wanted, 'warps'])} and nothing else")
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(
                f"tune: {path} is for {key} {found[key]!r}, this is {value!r}; remove it to measure"
            )
    warps = found["warps"]
    if not isinstance(warps, dict) or set(warps) != set(_TUNED):
        raise ValueError(f"tune: {path}: warps must name {', '.join(_TUNED)}, got {warps!r}")
    for kernels, value in warps.items():
        if type(value) is not int or value not in WARPS:
            raise ValueError(
                f"tune: {path}: warps of {kernels} must be one of {WARPS}, got {value!r}"
            )
    return warps


def tune(*, path: str | os.PathLike[str]) -> dict[str, int]:
    """Warps of a program for each of the tuned Triton kernels, in use from now on in this process.

    Read from `path` where it exists, else measured on the current GPU (seconds; the timed calls
    wait for the device) and written there as one atomic replacement. Results keep their bits.

    Raises ValueError for a file that is not what `tune` wrote on this device with this Triton,
    RuntimeError without a GPU.
    """
    file, device = Path(path), _device()
    version = importlib.metadata.version("triton")
    if file.exists():
        warps = _load(file, device, version)
    else:
        warps = _measure()
        content = {"format": _FORMAT, "device": device, "triton": version, "warps": warps}
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    choose_warps(warps)
    return dict(warps)
