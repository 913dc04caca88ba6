"""Probes of the machine: memory bandwidth, and FLOP/s of its units, in registers.

_roofline.cpp is compiled when first asked for, into build/ (which git ignores), with nothing but
a C++ compiler: loaded by ctypes, it needs no headers of Python and serves every interpreter.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".cpp")
_BUILD = _SOURCE.parent.parent / "build"
# More than any last-level cache, which must not serve what is to be read from memory.
_MEMORY_BYTES = 640 << 20
# Units that an instruction-set cap leaves.
_UNITS_OF_CAP = {
    "avx512": ("fma_avx2", "fma_avx512", "dpbf16_avx512"),
    "avx2": ("fma_avx2",),
    "portable": ("fma_avx2",),
}


@cache
def _library() -> ctypes.CDLL:
    text = _SOURCE.read_bytes()
    path = _BUILD / f"roofline-{hashlib.sha256(text).hexdigest()[:12]}.so"
    if not path.exists():
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise RuntimeError("benchmarks: the probes need a C++ compiler; install g++ or set CXX")
        _BUILD.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(part)], check=True)
        part.replace(path)
    library = ctypes.CDLL(str(path))
    library.unit_name.restype = ctypes.c_char_p
    library.flops.restype = library.bandwidth.restype = ctypes.c_double
    library.flops.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    library.bandwidth.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return library


@cache
def _units() -> dict[str, int]:
    """Units that this machine has, by their place in the library."""
    names: dict[str, int] = {}
    index = 0
    while (name := _library().unit_name(index)) is not None:
        if name:
            names[name.decode()] = index
        index += 1
    return names


@cache
def _memory() -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, _MEMORY_BYTES, 4096):
        memory[start] = 1  # pages never written are one page of zeros, read from a cache
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def units(dtype: str, cap: str = "") -> list[str]:
    """Names of the units that can serve a dtype (`float32` or `bfloat16`) under a cap."""
    allowed = _UNITS_OF_CAP.get(cap, tuple(_units()))
    return [u for u in _units() if u in allowed and (dtype == "bfloat16" or u.startswith("fma"))]


def flops(unit: str, threads: int, seconds: float = 0.02) -> float:
    """FLOP/s of a unit on that many threads now, over about that many seconds."""
    return float(_library().flops(_units()[unit], threads, seconds))


def flush(threads: int) -> float:
    """Leaves caches full of other data; bytes/s at which it was read from memory."""
    _, address = _memory()
    return float(_library().bandwidth(address, _MEMORY_BYTES, threads))
