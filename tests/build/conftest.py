"""Every CUDA source compiled once, for every architecture, warnings as errors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.gpu.conftest import triton_cache as triton_cache
from tests.gpu.kept import Kept
from tests.gpu.params import ROOT

ARCHITECTURES = ("80", "90a", "100a")


Compiled = tuple[Path, str]  # library, the assembler's report


def compile_source(source: Path, folder: Path) -> Compiled:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
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
    (folder / "report").write_text(done.stdout + done.stderr)
    return compiled_source(source, folder)


def compiled_source(source: Path, folder: Path) -> Compiled:
    """What compile_source has left in a folder."""
    return folder / f"{source.stem}.so", (folder / "report").read_text()


def compile_sources() -> Mapping[str, Compiled]:
    """Source name -> its own library and the assembler's report."""
    return Kept("build", compile_source, compiled_source)


@pytest.fixture(scope="session")
def compiled() -> Mapping[str, Compiled]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return compile_sources()
