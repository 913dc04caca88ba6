"""The Triton kernels compiled ahead of time, without a GPU, as their launchers launch them: every
tile configuration lowers for every architecture, spills nothing and uses no atomics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.build.reports import of_triton
from tests.gpu import gemm_ops, triton_host
from tests.gpu.ops import OPS

TILES = [
    pytest.param(name, dtype, label, id=f"{name}-{str(dtype).removeprefix('torch.')}-{label}")
    for name, op in OPS.items()
    for dtype in op.dtypes
    for label, _ in op.tiles(dtype)
]

GEMM_TILES = [
    pytest.param(name, dtype, label, id=f"{name}-{str(dtype).removeprefix('torch.')}-{label}")
    for name, op in gemm_ops.OPS.items()
    for dtype in op.dtypes
    for label, _ in op.tiles(dtype)
]
# Of a multiprocessor, for one block.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
MATRIX_UNITS = {"HMMA", "HGMMA", "UTCHMMA", "v_mfma"}


def compile_all(name: str, args: tuple[Any, ...], target: str) -> list[triton_host.Launched]:
    """What the op's launcher launches on meta tensors, compiled for a target."""
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to(target, launched.append):
        (OPS.get(name) or gemm_ops.OPS[name]).triton(name)(*args)
    return launched


@pytest.mark.matrix(keep=40)
@pytest.mark.parametrize("target", triton_host.TARGETS)
@pytest.mark.parametrize(("name", "dtype", "label"), TILES)
def test_tile_lowers(
    name: str, dtype: torch.dtype, label: str, target: str, tmp_path: Path
) -> None:
    launched = compile_all(name, dict(OPS[name].tiles(dtype))[label], target)
    assert launched
    for one in launched:
        report = of_triton(one.compiled, tmp_path)
        assert report.spills == 0
        assert not {"ATOMG", "RED", "ATOMS", "global_atomic", "flat_atomic"} & set(report.opcodes)
        assert report.shared <= 64 * 1024  # what every architecture has


@pytest.mark.matrix(keep=6)
@pytest.mark.parametrize("target", triton_host.TARGETS)
@pytest.mark.parametrize(("name", "dtype", "label"), GEMM_TILES)
def test_gemm_tile_lowers(
    name: str, dtype: torch.dtype, label: str, target: str, tmp_path: Path
) -> None:
    """Products on the matrix units, no spills, no atomics, shared memory that a block can have."""
    launched = compile_all(name, dict(gemm_ops.OPS[name].tiles(dtype))[label], target)
    names = {one.compiled.metadata.name for one in launched}
    assert names & gemm_ops.GEMM_KERNELS
    for one in launched:
        report, asm = of_triton(one.compiled, tmp_path), one.compiled.asm
        assert report.spills == 0, one.compiled.metadata.name
        assert report.shared <= SHARED[target] * 1024
        code = asm["amdgcn"] if "amdgcn" in asm else asm["ptx"]
        assert not re.search(r"\b(atom|red|global_atomic|flat_atomic)[._]", code)
        if one.compiled.metadata.name in gemm_ops.GEMM_KERNELS:
            assert MATRIX_UNITS & set(report.opcodes), one.compiled.metadata.name
