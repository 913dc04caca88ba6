"""The CUDA launchers of csrc/cuda on CPU tensors: as nvcc compiled them, launches going to the PTX
machine, or as g++ compiled them on csrc/emulate."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tests.gpu import params
from tests.ptx import machine, memory
from tests.ptx.faults import Counts
from tests.ptx.parse import Kernel, kernels

SOURCES = sorted((params.ROOT / "csrc" / "cuda").glob("*.cu"))


class Compiled(NamedTuple):
    library: Path
    ptx: str


def _fake_runtime(folder: Path) -> Path:
    library = folder / "libfake_cudart.so"
    if not library.exists():
        source = Path(__file__).parent / "fake_cudart.cpp"
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=120
        )
    return library


def compile_ptx(source: Path, folder: Path, *, include: Path | None = None) -> Compiled:
    """The source's PTX for sm_80, and its host code linked to the fake runtime."""
    runtime = _fake_runtime(folder)
    keep = folder / source.stem
    keep.mkdir(exist_ok=True)
    library = keep / f"{source.stem}.so"
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    subprocess.run(
        [
            *(nvcc, "-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none"),
            *(f"-I{include or params.ROOT / 'csrc'}", "-gencode=arch=compute_80,code=compute_80"),
            *("-keep", "-keep-dir", keep, "-o", library, source, runtime),
        ],
        check=True,
        timeout=240,
    )
    return compiled_ptx(source, folder)


def compiled_ptx(source: Path, folder: Path) -> Compiled:
    """What compile_ptx has left in a folder."""
    keep = folder / source.stem
    return Compiled(keep / f"{source.stem}.so", (keep / f"{source.stem}.ptx").read_text())


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_FAILED = 719  # cudaErrorLaunchFailure


def symbol(op: str, struct: str) -> str:
    """The mangled name of `cudaError_t gose::cuda::op(const Struct&, cudaStream_t)`."""
    return f"_ZN4gose4cuda{len(op)}{op}ERKNS_{len(struct)}{struct}EP11CUstream_st"


class OnPtx:
    """Launchers whose kernels the PTX machine executes; `counts` adds up what they did."""

    def __init__(self, compiled: Compiled, **options: Any) -> None:
        self._kernels: dict[str, Kernel] = kernels(compiled.ptx)
        self.options, self.counts = options, Counts()
        runtime = ctypes.CDLL(str(compiled.library.parent.parent / "libfake_cudart.so"))
        self._library, self._runtime = ctypes.CDLL(str(compiled.library)), runtime
        self._raised: list[BaseException] = []

    def __call__(self, op: str, struct: str, tensors: Mapping[str, Tensor], **values: Any) -> None:
        """Runs launcher `op`; `tensors` are all that its kernels may touch, those with a bracket or
        a point in their name through pointers in other structs. Raises KernelError."""
        spans = [params.extent(t, name) for name, t in tensors.items()]
        space = memory.Global(spans)

        def launched(name: bytes, sizes: Any, shared: int, args: Any) -> int:
            kernel = self._kernels[name.decode()]
            raw = ctypes.string_at(args[0], kernel.param_bytes)
            launch = machine.Launch(tuple(sizes[0:3]), tuple(sizes[3:6]), raw, shared)
            try:
                self.counts += machine.run(kernel, launch, space, **self.options)
            except BaseException as error:
                self._raised.append(error)
                return _FAILED
            return 0

        callback = _CALLBACK(launched)
        self._runtime.gose_on_launch(callback)
        error = run_launcher(self._library, op, struct, **tensors, **values)
        if self._raised:
            raise self._raised.pop()
        assert error == 0, f"{op}: CUDA error {error}"


def run_launcher(library: ctypes.CDLL, op: str, struct: str, **values: Any) -> int:
    launcher: Callable[..., int] = library[symbol(op, struct)]
    own = {k: v for k, v in values.items() if "[" not in k and "." not in k}
    return launcher(ctypes.byref(params.fill(struct, **own)), None)


# ---- the same sources under g++ --------------------------------------------------------------

ORDERS = {"forward": 0, "reverse": 1, "random": 2, "warps": 3}


def emulated_library(source: Path, folder: Path) -> Path:
    return folder / f"{source.stem}.emulated.so"


def compile_emulated(source: Path, folder: Path, *, flags: Sequence[str] = ()) -> Path:
    """The source as a library whose kernels run on the CPU, warnings as errors."""
    library = emulated_library(source, folder)
    csrc = params.ROOT / "csrc"
    subprocess.run(
        [
            *("g++", "-x", "c++", "-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-DGOSE_EMULATE"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags),
            *(f"-I{csrc / 'emulate'}", f"-I{csrc}", "-o", library),
            *(source, csrc / "emulate" / "control.cpp"),
        ],
        check=True,
        timeout=240,
    )
    return library


class OnEmulator:
    """Launchers whose kernels run as fibers. Raises RuntimeError where threads cannot go on."""

    def __init__(self, library: Path, order: str = "forward") -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.gose_emulate_error.restype = ctypes.c_char_p
        self._order = ORDERS[order]

    def __call__(self, op: str, struct: str, tensors: Mapping[str, Tensor], **values: Any) -> None:
        self._library.gose_emulate_order(self._order)  # the library's: others may have set theirs
        if error := run_launcher(self._library, op, struct, **tensors, **values):
            text = self._library.gose_emulate_error().decode()
            raise RuntimeError(f"{op}: error {error}: {text}")
