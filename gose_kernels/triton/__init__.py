"""Triton kernels with their launchers, one file per op; importing a file imports triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

BYTES_PER_LOAD = 16  # the widest load of one thread
WARPS = (2, 4, 8)  # of a program: what a tuned choice may be
_CLOSED_FORM = 4
_chosen: dict[str, int] = {}  # filled by choose_warps() only


def warps_of(kernels: str) -> int:
    """Warps of a program of kernels whose bits do not depend on it."""
    return _chosen.get(kernels, _CLOSED_FORM)


def choose_warps(warps: Mapping[str, int]) -> None:
    """What gk.tune() found, in place of the closed form."""
    _chosen.update(warps)


def threads_per_warp() -> int:
    """Threads of a warp (CUDA) or a wavefront (ROCm) of the GPUs that this torch is built for."""
    return 64 if torch.version.hip else 32


def declares(
    work: Callable[[Mapping[str, Any]], tuple[int, int]], product_of: str | None = None
) -> Callable[..., dict[str, Any]]:
    """The `launch_metadata` of a kernel, which profilers such as Proton ask for: the bytes of a
    launch, every input read and every output written once, and its operations, float32 ones or of
    the width of the argument `product_of`.

    work(arguments by name) -> (bytes, operations)
    """

    def metadata(_grid: object, kernel: Any, args: Mapping[str, Any]) -> dict[str, Any]:
        moved, operations = work(args)
        bits = 32 if product_of is None else 8 * args[product_of].element_size()
        return {"name": kernel.name, "bytes": moved, f"flops{bits}": operations}

    return metadata


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors, of those that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def moves(*names: str, once: str = "", operations: int = 0) -> Callable[..., dict[str, Any]]:
    """`declares` of a kernel that reads or writes the tensors of these arguments once, with so many
    operations for each element of one of them."""

    def work(args: Mapping[str, Any]) -> tuple[int, int]:
        each = args[once].numel() * operations if once else 0
        return size_of(*(args[name] for name in names)), each

    return declares(work)
