"""Triton kernels with their launchers, one file per op; importing a file imports triton."""

from __future__ import annotations

import torch

BYTES_PER_LOAD = 16  # the widest load of one thread


def threads_per_warp() -> int:
    """Threads of a warp (CUDA) or a wavefront (ROCm) of the GPUs that this torch is built for."""
    return 64 if torch.version.hip else 32
