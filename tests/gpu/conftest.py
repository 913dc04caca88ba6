"""Every CUDA source compiled once per session, for the PTX machine and for the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gose_kernels.registry import triton_interprets
from tests.gpu import cuda_host

# Under TRITON_INTERPRET=1 there is nothing compiled to look at.
collect_ignore_glob = ["test_*.py"] if triton_interprets() else []


@pytest.fixture(scope="session")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cuda_host.Compiled]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("ptx")
    return {s.stem: cuda_host.compile_ptx(s, folder) for s in cuda_host.SOURCES}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("emulated")
    return {s.stem: cuda_host.compile_emulated(s, folder) for s in cuda_host.SOURCES}


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels compiled here are those of this tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
