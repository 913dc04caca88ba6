"""What will run on this machine, what will not, and what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import gose
import gose_kernels as gk
from gose import rundir
from gose.data.sources import SOURCES, DataError, locate
from gose.recipes import quickstart


class Check(NamedTuple):
    """One line: ok; absent (everything else works without it); or broken, which fails the check."""

    name: str
    state: Literal["ok", "absent", "broken"]
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which to read and mend them."""
    return [
        _python(),
        _gose(),
        _torch(),
        _cpu(),
        _kernels(),
        _compiler(),
        _cuda_device(),
        _cuda_kernels(),
        _triton(),
        _threads(),
        *_data_sets(),
        *_extras(),
    ]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _gose() -> Check:
    return Check("gose", "ok", f"{gose.__version__} at {Path(gose.__file__).parent}")


def _torch() -> Check:
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    else:
        build = "CPU"
    found = f"{torch.__version__}, {build} build"
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers and (int(numbers[1]), int(numbers[2])) >= (2, 11):
        return Check("torch", "ok", found)
    return Check("torch", "broken", found, "gose needs torch 2.11 or newer: pip install -U torch")


def _cpu() -> Check:
    cap = os.environ.get("GOSE_ISA")
    capped = "" if cap is None else f"; GOSE_ISA={cap} caps it"
    try:
        level, levels = gk.native.cpu_level(), gk.native.cpu_levels()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return Check("cpu", "broken", f"{rundir.cpu_model()}: {reason}", "unset GOSE_ISA")
    if level is None:
        return Check(
            "cpu", "ok", f"{rundir.cpu_model()}; no compiled kernels to choose a level for"
        )
    found = f"{rundir.cpu_model()}; level {level} of {', '.join(levels)}{capped}"
    return Check("cpu", "ok", found)


def _kernels() -> Check:
    if (reason := gk.native.why_not()) is None:
        return Check("compiled kernels", "ok", "loaded")
    if _library_exists():
        return Check("compiled kernels", "broken", reason, "reinstall gose with this torch")
    advice = "install g++ and reinstall gose; until then every op runs on its slower torch backend"
    return Check("compiled kernels", "absent", reason, advice)


def _library_exists() -> bool:
    return (Path(gk.__file__).parent / "libgose_kernels.so").exists()


def _compiler() -> Check:
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is not None:
        return Check("C++ compiler", "ok", f"{path}: {_first_line([path, '--version'])}")
    advice = "only needed to build the compiled kernels: apt-get install g++, or set CXX"
    return Check("C++ compiler", "absent", f"no {compiler} on the PATH", advice)


def _cuda_device() -> Check:
    if torch.cuda.is_available():
        return Check("CUDA device", "ok", torch.cuda.get_device_name(0))
    driver = Path("/proc/driver/nvidia/version")
    if not driver.exists():
        return Check("CUDA device", "absent", "no NVIDIA driver on this machine")
    found = _line_of(driver)
    if torch.version.cuda is None:
        advice = "the driver is here, but torch is a CPU build: install a CUDA build of torch"
        return Check("CUDA device", "absent", found, advice)
    advice = "torch sees no device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return Check("CUDA device", "absent", found, advice)


def _cuda_kernels() -> Check:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    toolkit = "no nvcc" if nvcc is None else f"nvcc at {nvcc}: {_nvcc_release(nvcc)}"
    if (reason := gk.native.why_not_cuda()) is None:
        return Check("CUDA kernels", "ok", f"in the compiled library; {toolkit}")
    advice = "install the CUDA toolkit (nvcc) and reinstall gose with GOSE_CUDA=1"
    return Check("CUDA kernels", "absent", f"{reason}; {toolkit}", advice)


def _triton() -> Check:
    found = _version("triton")
    if found is None:
        return Check("triton", "absent", "not installed", "pip install 'gose[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Check("triton", "ok", f"{found}, interpreting on the CPU (TRITON_INTERPRET=1)")
    if torch.cuda.is_available():
        return Check("triton", "ok", found)
    advice = "needs a GPU; TRITON_INTERPRET=1 runs its kernels slowly on the CPU"
    return Check("triton", "absent", f"{found}, but no GPU is visible", advice)


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0))
    cap = os.environ.get("OMP_NUM_THREADS")
    capped = "" if cap is None else f"; OMP_NUM_THREADS={cap}"
    found = f"{torch.get_num_threads()} of torch, {cores} cores for this process{capped}"
    return Check("threads", "ok", found)


def _data_sets() -> list[Check]:
    needed = {task.split(".")[0] for task in quickstart().data.tasks}
    checks = []
    for name, source in SOURCES.items():
        label = f"data {name}"
        try:
            folder = locate(name)[0][0].parent
        except DataError:
            state: Literal["absent", "broken"] = "broken" if name in needed else "absent"
            use = "the recipe quickstart needs it; " if name in needed else ""
            checks.append(Check(label, state, "missing", f"{use}run: {source.command}"))
        else:
            checks.append(Check(label, "ok", f"{source.num_images} images in {folder}"))
    return checks


def _extras() -> list[Check]:
    try:
        lines = requires("gose") or []
    except PackageNotFoundError:
        return [Check("extras", "absent", "gose is not installed", "pip install -e .")]
    packages: dict[str, list[str]] = {}
    for line in lines:
        if (match := re.match(r"([\w.-]+)[^;]*; *extra == ['\"](\w+)['\"]", line)) is not None:
            packages.setdefault(match[2], []).append(match[1])
    checks = []
    for extra, names in packages.items():
        missing = [name for name in names if name != "gose" and _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names if _version(name))
        if missing:
            advice = f"pip install 'gose[{extra}]'"
            checks.append(
                Check(f"extra {extra}", "absent", f"missing: {', '.join(missing)}", advice)
            )
        else:
            checks.append(Check(f"extra {extra}", "ok", found))
    return checks


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc_release(nvcc: str) -> str:
    match = re.search(r"release [\d.]+", _output([nvcc, "--version"]))
    return match[0] if match else "does not answer"


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or ["does not answer"])[0]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _line_of(path: Path) -> str:
    return (path.read_text(encoding="utf-8").splitlines() or [""])[0]
