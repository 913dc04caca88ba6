"""The wheel: one for every Python, works outside the checkout, and without its compiled library."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def _python(code: str, cwd: Path, installed: Path, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(installed), **more}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without CUDA: what is tested here is the package, and nvcc takes its time."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", str(ROOT)),
            *("--no-deps", "--no-build-isolation", "-w", str(folder)),
        ],
        env={**os.environ, "GOSE_CUDA": "0", "GOSE_NATIVE": "1"},
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert wheel.name.startswith("gose-")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "gose_kernels/libgose_kernels.so" in names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"gose", "gose_kernels"}


_COMBINE = (
    "import torch, gose_kernels as gk\n"
    "y, w = torch.arange(8.).view(4, 2), torch.ones(2, 2)\n"
    "r = torch.arange(4, dtype=torch.int32).view(2, 2)\n"
    "print(gk.__file__, gk.OPS['combine'].pick(y, w, r).name, gk.combine(y, w, r).tolist())\n"
)


def test_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    file, backend, *values = _python(_COMBINE, tmp_path, installed).split(maxsplit=2)
    assert Path(file).is_relative_to(installed)
    assert backend == "cpu"
    assert values == ["[[2.0, 4.0], [10.0, 12.0]]\n"]
    version = _python("import gose; print(gose.__version__)", tmp_path, installed)
    assert version.strip() == "0.1.0"


def test_works_without_the_compiled_library(installed: Path, tmp_path: Path) -> None:
    library = installed / "gose_kernels" / "libgose_kernels.so"
    aside = library.rename(tmp_path / library.name)
    try:
        _, backend, values = _python(_COMBINE, tmp_path, installed).split(maxsplit=2)
        assert backend == "torch"
        assert values == "[[2.0, 4.0], [10.0, 12.0]]\n"
        why_not = "import gose_kernels as gk; print(gk.native.why_not())"
        reason = _python(why_not, tmp_path, installed)
        assert reason.startswith("no compiled kernels (libgose_kernels.so is missing); install a")
    finally:
        aside.rename(library)


def test_a_missing_compiler_is_fatal_only_when_asked(tmp_path: Path) -> None:
    """setup.py in an environment whose PATH has no compiler."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    fatal = subprocess.run(
        command, cwd=ROOT, env={**environment, "GOSE_NATIVE": "1"}, capture_output=True, text=True
    )
    assert fatal.returncode != 0
    assert "missing: a C++ compiler" in fatal.stderr
    mild = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert mild.returncode == 0, mild.stderr
    assert not list((tmp_path / "build").rglob("*.so"))


def test_a_failing_compiler_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'cannot compile' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=ROOT,
        env={**os.environ, "CXX": str(broken), "GOSE_CUDA": "0", "GOSE_NATIVE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["GOSE_NATIVE", "GOSE_CUDA"])
def test_build_switches_take_0_or_1(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env={**os.environ, name: "yes"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"{name} must be 0 or 1, got 'yes'" in done.stderr
