"""The wheel: one for every Python, works outside the checkout, and without its compiled library."""

from __future__ import annotations

import ast
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
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
    """Built without CUDA: what is tested here is the package, and nvcc takes its time. By one
    worker at a time: objects that stand in the checkout's build folder are not compiled again."""
    folder = tmp_path_factory.mktemp("wheel")
    with (ROOT / "build" / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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


def test_a_chosen_compiler_that_is_not_there_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--name"],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-c++ -O1", "GOSE_NATIVE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "CXX must name a C++ compiler on the PATH, got 'no-such-c++ -O1'" in done.stderr


def _checkout(parent: Path, *folders: str) -> Path:
    """A copy of what a build needs, in a folder with a name that shells and ninja take apart."""
    checkout = parent / "a $check out"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in folders:
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    return checkout


def test_folders_may_hold_blanks_and_cxx_a_launcher(tmp_path: Path) -> None:
    """A compiler that notes its arguments builds a copy in such a folder."""
    checkout = _checkout(tmp_path, "csrc", "gose_kernels")
    log = tmp_path / "log"
    compiler = tmp_path / "noting-c++"
    compiler.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"with open({str(log)!r}, 'a') as log: log.write(repr(sys.argv[1:]) + chr(10))\n"
        "for flag, name in zip(sys.argv, sys.argv[1:]):\n"
        "    if flag in ('-o', '-MF'): pathlib.Path(name).touch()\n"
    )
    compiler.chmod(0o755)
    build = tmp_path / "build here"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(build)],
        cwd=checkout,
        env={**os.environ, "CXX": f"{compiler} --launched", "GOSE_CUDA": "0", "GOSE_NATIVE": "1"},
        check=True,
    )
    calls = [ast.literal_eval(line) for line in log.read_text().splitlines()]
    assert all(call[0] == "--launched" for call in calls)
    compiled = [call for call in calls if "-c" in call]
    assert all(f"-I{checkout / 'csrc'}" in call for call in compiled)
    sources = {Path(call[call.index("-c") + 1]) for call in compiled}
    bound = {checkout / "csrc" / name for name in ("bind.cpp", "bind_experts.cpp")}
    assert sources == bound | set((checkout / "csrc/cpu").glob("*.cpp"))
    assert list(build.rglob("libgose_kernels.so"))


def test_the_source_distribution_carries_csrc_always(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path, "csrc", "gose", "gose_kernels", "tests")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=checkout,
        env={**os.environ, "GOSE_NATIVE": "0"},
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        inside = {m.name.partition("/")[2] for m in members if m.isfile()}
    files = {str(p.relative_to(checkout)) for p in checkout.rglob("*") if p.is_file()}
    wanted = {n for n in files if n.startswith(("csrc/", "gose/", "gose_kernels/"))}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= inside
    assert not [n for n in inside if n.startswith("tests/")]


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
