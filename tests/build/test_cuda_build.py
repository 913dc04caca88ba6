"""The CUDA kernels without a GPU: they compile clean for every architecture, spill nothing, load
the widest words, refuse what CUDA would truncate, and are registered in a library that needs no
CUDA to load."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import gose_kernels as gk
from tests.build.conftest import ARCHITECTURES
from tests.build.reports import cuobjdump
from tests.gpu.cuda_host import SOURCES, run_launcher

ROOT = Path(gk.__file__).parent.parent
LIBRARY = Path(gk.__file__).parent / "libgose_kernels.so"
OPS = [name for name, op in gk.OPS.items() if "cuda" in {b.name for b in op.backends}]
# What takes the places of live elements instead of their mask has a name of its own.
BY_PLACE = dict.fromkeys(("dequantize", "dequantize_add_"), "dequantize_at")
BY_PLACE["quantize"] = "quantize_at"


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_kernels_spill_nothing(compiled: Mapping[str, tuple[Path, str]], source: Path) -> None:
    """No register spills and no stack; at least half of a multiprocessor's threads stay resident.

    65536 registers for 1024 threads are 64 a thread.
    """
    report = compiled[source.stem][1]
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == set(ARCHITECTURES)
    for name, arch, stack, stores, loads, registers in kernels:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{name} on sm_{arch}"
        assert int(registers) <= 64, f"{name} on sm_{arch}: {registers} registers"


_SUCCESS, _INVALID_VALUE, _INVALID_CONFIGURATION = 0, 1, 9
_FLOAT32, _FLOAT64 = 0, 3


@pytest.mark.parametrize(
    ("sizes", "dtype", "wanted"),
    [
        ({"T": 0, "D": 8, "K": 2}, _FLOAT32, _SUCCESS),
        ({"T": 3, "D": 0, "K": 2}, _FLOAT32, _SUCCESS),
        ({"T": 3, "D": 8, "K": 2}, _FLOAT64, _INVALID_VALUE),
        ({"T": 2**40, "D": 8, "K": 2}, _FLOAT32, _INVALID_CONFIGURATION),
        ({"T": 3, "D": 2**40, "K": 2}, _FLOAT32, _INVALID_CONFIGURATION),
    ],
    ids=str,
)
def test_combine_launches_nothing_wrong(
    compiled: Mapping[str, tuple[Path, str]], sizes: dict[str, int], dtype: int, wanted: int
) -> None:
    """Empty grids, dtypes without a kernel and grids past CUDA's limits end before a launch."""
    library = ctypes.CDLL(str(compiled["combine"][0]))
    assert run_launcher(library, "combine", "CombineParams", dtype=dtype, **sizes) == wanted


@pytest.mark.parametrize(
    ("sizes", "dtype", "wanted"),
    [
        ({"T": 0, "D": 8, "K": 2}, _FLOAT32, _SUCCESS),
        ({"T": 3, "D": 8, "K": 0}, _FLOAT32, _SUCCESS),
        ({"T": 3, "D": 8, "K": 2}, _FLOAT64, _INVALID_VALUE),
        ({"T": 2**40, "D": 8, "K": 2}, _FLOAT32, _INVALID_CONFIGURATION),
    ],
    ids=str,
)
def test_combine_backward_launches_nothing_wrong(
    compiled: Mapping[str, tuple[Path, str]], sizes: dict[str, int], dtype: int, wanted: int
) -> None:
    library = ctypes.CDLL(str(compiled["combine"][0]))
    got = run_launcher(library, "combine_backward", "CombineBackwardParams", dtype=dtype, **sizes)
    assert got == wanted


@pytest.fixture
def cuda_library() -> Path:
    """The installed library, which has CUDA kernels wherever nvcc was there to build them."""
    if (reason := gk.native.why_not_cuda()) is not None:
        assert shutil.which("nvcc") is None or os.environ.get("GOSE_CUDA") == "0", reason
        pytest.skip(reason)
    return LIBRARY


@pytest.mark.parametrize("op", OPS)
def test_dispatch_table_has_cuda(cuda_library: Path, op: str) -> None:
    for key, file, name in (
        ("CPU", "bind.cpp", op),
        ("CUDA", "bind_cuda.cpp", BY_PLACE.get(op, op)),
    ):
        table = torch._C._dispatch_dump(f"gose_native::{name}")
        assert re.search(rf"^{key}: registered at \S*{file}:\d+ ", table, re.MULTILINE), table


def test_library_needs_no_cuda_to_load(cuda_library: Path) -> None:
    """It is loaded in this process; neither driver nor runtime is."""
    assert gk.native.why_not() is None
    if torch.version.cuda is None:
        assert not re.search(r"lib(cuda|cudart)\.so", Path("/proc/self/maps").read_text())


def test_library_has_code_for_every_architecture(cuda_library: Path) -> None:
    wanted = {f"sm_{a}" for a in ARCHITECTURES}
    if entries := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = {f"sm_{e.removesuffix('+PTX').replace('.', '')}" for e in entries.split(";")}
    listed = cuobjdump("--list-elf", "--list-ptx", str(cuda_library))
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == wanted
    if not entries:
        assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_90"}


def test_vector_kernels_move_16_bytes(compiled: Mapping[str, tuple[Path, str]]) -> None:
    """Rows that are aligned are read and written in words of 16 bytes, four rows in flight."""
    assembly = cuobjdump("-sass", str(compiled["combine"][0]))
    kernels = re.split(r"\n\s*Function : ", assembly)[1:]
    seen = 0
    for kernel in kernels:
        name, code = kernel.split("\n", 1)
        wide = re.search(r"(combine_kernel|combine_backward_kernel)I\S+?Li[48]EE", name) is not None
        loads, stores = len(re.findall(r"LDG\.E\.128", code)), len(re.findall(r"STG\.E\.128", code))
        assert (loads >= 4 and stores >= 1) if wide else (loads == stores == 0), name
        seen += wide
    assert seen == 6 * len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CUDA_HOME", "/nowhere", "GOSE_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "must hold versions such as 8.0;9.0a;10.0a[+]PTX, got"),
    ],
)
def test_build_refuses_bad_settings(
    tmp_path: Path, variable: str, value: str, message: str
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"-b{tmp_path}", f"-t{tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "GOSE_CUDA": "1", variable: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
