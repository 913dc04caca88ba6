"""Every CUDA source compiled once per session, for every architecture, warnings as errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gpu.cuda_host import SOURCES
from tests.gpu.params import ROOT

ARCHITECTURES = ("80", "90a", "100a")


def compile_sources(folder: Path) -> dict[str, tuple[Path, str]]:
    """Source name -> its own library and the assembler's report."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    results = {}
    for source in SOURCES:
        library = folder / f"{source.stem}.so"
        command = [
            *(nvcc, "-std=c++20", "-O3", "-shared", "--cudart", "static", f"-I{ROOT / 'csrc'}"),
            *("-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"),
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
            *("-gencode=arch=compute_90,code=compute_90", "-Xptxas", "-v"),
            *("-o", str(library), str(source)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        results[source.stem] = (library, done.stdout + done.stderr)
    return results


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return compile_sources(tmp_path_factory.mktemp("cuda"))
