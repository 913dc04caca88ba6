"""The Triton kernels compiled ahead of time, without a GPU, as their launchers launch them: every
tile configuration lowers for every architecture, spills nothing and uses no atomics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.build.reports import of_triton
from tests.gpu import triton_host
from tests.gpu.ops import OPS

TILES = [
    pytest.param(name, dtype, label, id=f"{name}-{str(dtype).removeprefix('torch.')}-{label}")
    for name, op in OPS.items()
    for dtype in op.dtypes
    for label, _ in op.tiles(dtype)
]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_all(name: str, args: tuple[Any, ...], target: str) -> list[triton_host.Launched]:
    """What the op's launcher launches on meta tensors, compiled for a target."""
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to(target, launched.append):
        OPS[name].triton(name)(*args)
    return launched


@pytest.mark.matrix(keep=60)
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
