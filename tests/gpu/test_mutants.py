"""Kernels with one planted mistake each, compiled: some case of the ladder must notice. A mutant
that does not compile proves nothing and fails."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gpu import cuda_host
from tests.gpu.ops import OPS
from tests.gpu.params import ROOT
from tests.ptx.faults import KernelError


class Mutant(NamedTuple):
    """`old` stands in csrc/cuda/<source>.cu `count` times and becomes `new`, all of them."""

    what: str
    ops: tuple[str, ...]
    old: str
    new: str
    rung: str = "ptx"  # or "emulated", which knows orders of warps
    count: int = 1

    def __str__(self) -> str:
        return f"{self.ops[0]}-{self.what}"


_COMBINE, _BACK = ("combine",), ("combine_backward",)
_ENTROPY, _DISPATCH = ("entropy", "entropy_backward"), ("dispatch",)
MUTANTS = [
    Mutant("bound", _COMBINE, "d >= p.D) return", "d > p.D) return"),
    Mutant("stride swapped", _COMBINE, "y + n * p.stride_yn);", "y + n * p.D);"),
    Mutant("mask dropped", _COMBINE, "if (n < 0) continue;", ""),
    Mutant("dtype truncated", _COMBINE, "const int64_t n = row[k];", "const int8_t n = row[k];"),
    Mutant("bound", _BACK, "if (slot >= p.T * p.K) return;", "if (slot > p.T * p.K) return;"),
    Mutant("stride swapped", _BACK, "slot / p.K * p.stride_gt", "slot / p.K * p.K"),
    Mutant("mask dropped", _BACK, "if (n < 0) {", "if (n < -1) {"),
    Mutant("dtype truncated", _BACK, "sum += g * to_float", "sum += int(g) * to_float"),
    Mutant("bound", _ENTROPY, "min(row, p.rows - 1)", "row", count=2),
    Mutant("stride swapped", _ENTROPY, "inside * p.C;", "inside * blockDim.x;", count=2),
    Mutant("mask dropped", _ENTROPY, "if (x == -INFINITY) return;", ""),
    Mutant("dtype truncated", _ENTROPY, "const float z = x - m.top;", "const int z = x - m.top;"),
    Mutant("shuffle short", _ENTROPY, "apart = width / 2", "apart = width / 4"),
    Mutant("bound", _DISPATCH, "const int e = n < N ?", "const int e = n <= N ?", count=2),
    Mutant("rank off by one", _DISPATCH, "(1u << threadIdx.x) - 1", "(2u << threadIdx.x) - 1"),
    Mutant("mask dropped", _DISPATCH, "if (n < N && n >= used)", "if (n < N)"),
    Mutant("dtype truncated", _DISPATCH, "const int32_t used", "const int8_t used"),
    Mutant("barrier removed", _DISPATCH, "__syncthreads();", "", rung="emulated"),
    Mutant(
        "warp barrier removed",
        _DISPATCH,
        "token[n] = -1;\n    __syncwarp();",
        "token[n] = -1;",
        rung="emulated",
    ),
]


_FOUND = 3  # exit code; 1 is a traceback's


def _survives(mutant: Mutant, library: Path | None, compiled: cuda_host.Compiled | None) -> bool:
    """Whether every case comes out right in every order."""
    for name in mutant.ops:
        op = OPS[name]
        runs: list[Any] = [cuda_host.OnPtx(compiled, count=False)] if compiled else []
        runs += [cuda_host.OnEmulator(library, order) for order in cuda_host.ORDERS if library]
        for run, dtype in product(runs, op.dtypes[:2]):
            for _, args in op.cases(dtype):
                try:
                    got = op.cuda(run, *args)
                    op.check(got if len(got) > 1 else got[0], args)
                except (KernelError, AssertionError, RuntimeError):
                    return False
    return True


def _emulate(mutant: Mutant, library: Path) -> None:
    sys.exit(0 if _survives(mutant, library, None) else _FOUND)


def _killed(mutant: Mutant, source: Path, folder: Path) -> bool:
    if mutant.rung == "ptx":
        return not _survives(mutant, None, cuda_host.compile_ptx(source, folder))
    # It may write where nothing is: a process of its own may die of it.
    library = cuda_host.compile_emulated(source, folder)
    child = multiprocessing.get_context("spawn").Process(target=_emulate, args=(mutant, library))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode == _FOUND or child.exitcode < 0


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    name = OPS[mutant.ops[0]].source
    text = (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
    assert text.count(mutant.old) == mutant.count
    source = tmp_path / f"{name}.cu"
    source.write_text(text.replace(mutant.old, mutant.new))
    assert _killed(mutant, source, tmp_path)


def test_every_gpu_source_has_mutants() -> None:
    assert {OPS[op].source for m in MUTANTS for op in m.ops} == {s.stem for s in cuda_host.SOURCES}
