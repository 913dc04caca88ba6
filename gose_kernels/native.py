"""The compiled library: loaded once, or the reason it is not."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

# GOSE_INSTRUMENT names a build with checks or counters, the same kernels (setup.py).
_NAME = "_".join(filter(None, ["libgose_kernels", os.environ.get("GOSE_INSTRUMENT")]))
_LIBRARY_PATH = Path(__file__).parent / f"{_NAME}.so"


@cache
def why_not() -> str | None:
    """Why there are no compiled kernels in this process, or None once they are loaded."""
    if not _LIBRARY_PATH.exists():
        return (
            f"no compiled kernels ({_LIBRARY_PATH.name} is missing); "
            "install a C++ compiler and reinstall, or pass backend='torch'"
        )
    try:
        torch.ops.load_library(str(_LIBRARY_PATH))
    except OSError as error:
        return f"{_LIBRARY_PATH.name} does not load with torch {torch.__version__}: {error}"
    return None


@cache
def why_not_cuda() -> str | None:
    """Why the compiled library has no CUDA kernels, or None; needs why_not() to be None."""
    if why_not() is not None:
        return why_not()
    if not torch.ops.gose_native.built_with_cuda():
        return "the compiled library was built without CUDA; build with nvcc and GOSE_CUDA=1"
    return None


def reraise(error: RuntimeError) -> NoReturn:
    """The library's argument errors as ValueError; torch's stable ABI knows RuntimeError alone."""
    message = str(error).split("\n")[0]
    if message.startswith("ValueError: "):
        raise ValueError(message.removeprefix("ValueError: ")) from None
    raise error


def cpu_levels() -> list[str]:
    """Instruction-set levels this machine and build can run, best first; [] without a library."""
    return [] if why_not() is not None else str(torch.ops.gose_native.cpu_levels()).split()


def cpu_level() -> str | None:
    """The level in use: the best, capped by GOSE_ISA; None without a library.

    Raises ValueError if GOSE_ISA names no level.
    """
    if why_not() is not None:
        return None
    try:
        return str(torch.ops.gose_native.cpu_level())
    except RuntimeError as error:
        reraise(error)
