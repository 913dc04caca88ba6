"""Small kernels for tests of the machine: a few instructions, run on NumPy arrays."""

from __future__ import annotations

import numpy as np

from tests.ptx import machine
from tests.ptx.faults import Counts
from tests.ptx.memory import Global
from tests.ptx.parse import kernels

_REGISTERS = (
    ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<60>; .reg .f32 %f<30>; .reg .b64 %d<20>;"
)


def _module(body: str, params: int = 2, shared: str = "") -> str:
    declared = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(params))
    return (
        f".version 8.8\n.target sm_80\n.address_size 64\n.visible .entry kernel({declared})\n"
        f"{{ {_REGISTERS} {shared} {loads} mov.u32 %r0, %tid.x; mul.wide.u32 %d9, %r0, 4;\n"
        f"add.u64 %d10, %d0, %d9; add.u64 %d11, %d1, %d9;\n{body}\nret; }}"
    )


def aligned(size: int, dtype: str) -> np.ndarray:
    """Zeros that begin on a 128-byte boundary."""
    raw = np.zeros(size * np.dtype(dtype).itemsize + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: str = "",
    dynamic: int = 0,
    order: str = "forward",
    lanes: int = 8192,
) -> Counts:
    """Runs a kernel whose %d0, %d1, ... are the arrays, %r0 the thread, %d10 and %d11 the addresses
    of the thread's own words in the first two."""
    text = _module(body, max(2, len(arrays)), shared)
    kernel = kernels(text)["kernel"]
    spans = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arrays)]
    addresses = [(a.ctypes.data, 8) for a in arrays] + [(0, 8)] * (2 - len(arrays))
    launch = machine.Launch(
        (blocks, 1, 1), (threads, 1, 1), machine.pack(kernel, addresses), dynamic
    )
    return machine.run(kernel, launch, Global(spans), order=order, lanes=lanes)
