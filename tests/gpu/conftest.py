"""Every CUDA source compiled once, for the PTX machine and for the emulator."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gose_kernels.backends import triton_interprets
from tests.gpu import cuda_host
from tests.gpu.kept import Kept

# Under TRITON_INTERPRET=1 there is nothing compiled to look at.
collect_ignore_glob = ["test_*.py"] if triton_interprets() else []


@pytest.fixture(scope="session")
def ptx() -> Mapping[str, cuda_host.Compiled]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return Kept("ptx", cuda_host.compile_ptx, cuda_host.compiled_ptx)


@pytest.fixture(scope="session")
def emulated() -> Mapping[str, Path]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    return Kept("emulated", cuda_host.compile_emulated, cuda_host.emulated_library)


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels compiled here are those of this tree; workers share them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
