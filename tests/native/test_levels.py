"""The CPU kernels in a program without torch: driver.cpp checks every op against loops in float64,
in memory that notices overreads, at every level of this machine, on emulated older CPUs, and on
emulated AMX tiles."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import gose_kernels as gk

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.timeout(900)  # the first test compiles for all
x86_only = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the levels above portable are those of x86-64"
)


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gose_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> str:
    if (compiler := shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("no C++ compiler on this machine")
    return compiler


def _compile(commands: list[list[str]]) -> None:
    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def _build(folder: Path) -> None:
    """Compiles csrc/cpu with the library's own flags, but for -O1: half the time, the same
    instruction sets. Links `driver`, and `tiles` with emulated AMX on the portable level."""
    setup, compiler = _setup(), _compiler()
    counting = setup.INSTRUMENTS["coverage"] if setup.instrument() == "coverage" else []
    include = f"-I{ROOT / 'csrc'}"
    commands = []
    for source, name, flags in setup.cpu_objects():
        command = [compiler, *setup.COMMON_FLAGS, "-O1", *counting, include, *flags]
        command += ["-c", str(source)]
        commands.append([*command, "-o", str(folder / name)])
    own = [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", include]
    amx = ROOT / "csrc" / "cpu" / "microgemm_amx.cpp"
    tiles = ["-DGOSE_EMULATE_TILES", "-include", str(HERE / "tiles.h"), *counting]
    for source, more in [(HERE / "driver.cpp", []), (HERE / "tiles_level.cpp", []), (amx, tiles)]:
        target = folder / f"own_{source.stem}.o"
        commands.append([*own, *more, "-c", str(source), "-o", str(target)])
    _compile(commands)
    kernels = [o for o in folder.glob("*.o") if not o.name.startswith("own_")]
    portable = [o for o in kernels if o.name.endswith(".portable.o")]
    # Static: the emulator needs no libraries of its architecture.
    link = [compiler, "-static", *counting, str(folder / "own_driver.o")]
    emulated = [folder / "own_tiles_level.o", folder / "own_microgemm_amx.o"]
    _compile(
        [
            [*link, *map(str, [*portable, *emulated]), "-o", str(folder / "tiles")],
            [*link, *map(str, kernels), "-o", str(folder / "driver")],
        ]
    )
    (folder / "built").touch()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `_build`, built once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "native"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            _build(folder)
    return folder


@pytest.fixture(scope="module")
def driver(objects: Path) -> Path:
    return objects / "driver"


def _run(*command: str, isa: str | None = None) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GOSE_ISA"}
    environment |= {} if isa is None else {"GOSE_ISA": isa}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.splitlines()


def _emulated(cpu: str, driver: Path, *args: str, isa: str | None = None) -> list[str]:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed (apt-get install qemu-user)")
    return _run("qemu-x86_64", "-cpu", cpu, str(driver), *args, isa=isa)


@pytest.mark.parametrize("level", gk.native.cpu_levels())
def test_every_op_is_its_formula_at_every_level(driver: Path, level: str) -> None:
    lines = _run(str(driver), isa=level)
    assert lines[0] == f"level {level} of {gk.native.cpu_levels()[0]}"
    ops = {line.split()[0] for line in lines[1:]}
    assert {"micro-kernel", "pack", "dispatch", "entropy", "route", "combine"} <= ops
    assert {"grouped_gemm", "expert_mlp", "int8", "int4"} <= ops


# CPUs before AVX, with AVX alone, with AVX2.
@x86_only
@pytest.mark.parametrize(
    ("cpu", "level"),
    [
        ("Nehalem", "portable"),
        ("SandyBridge", "portable"),
        ("Haswell", "avx2"),
    ],
)
def test_an_older_cpu_gets_its_level_and_the_same_bits(driver: Path, cpu: str, level: str) -> None:
    """No illegal instruction is met, and the emulator computes what this CPU does."""
    lines = _emulated(cpu, driver)
    assert lines[0] == f"level {level} of {level}"
    if level in gk.native.cpu_levels():
        assert lines[1:] == _run(str(driver), isa=level)[1:]


@x86_only
def test_no_level_beyond_the_cpu_is_used_whatever_is_asked_for(driver: Path) -> None:
    for isa, level in [("amx", "avx2"), ("avx512", "avx2"), ("portable", "portable")]:
        assert _emulated("Haswell", driver, "level", isa=isa) == [f"level {level} of avx2"]
    assert _emulated("qemu64", driver, "level") == ["level portable of portable"]


@x86_only
def test_amx_tiles(objects: Path) -> None:
    """Tiles on plain arrays that keep AMX's rules (tiles.h), under the whole of every op: products
    of 1 to 48 rows, rows apart, padding, layouts, blocks."""
    lines = _run(str(objects / "tiles"))
    assert lines[0] == "level amx of amx"
    for name in ("amx bf16 tiles", "amx bf16 tiles, int8 widened", "amx bf16 tiles, int4 widened"):
        assert any(line.startswith(f"micro-kernel {name} ") for line in lines)
    assert {line.split()[0] for line in lines[1:]} >= {"pack", "grouped_gemm", "expert_mlp"}


@x86_only
def test_tile_instructions_stand_in_namespace_amx(objects: Path) -> None:
    """Of the real object: the tile instructions that the emulation replaces, and no others."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    code = subprocess.run(
        ["objdump", "-dr", "--no-show-raw-insn", str(objects / "microgemm_amx.o")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols, used = set(), set()
    symbol = ""
    for line in code.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:", line):
            symbol = found[1]
        elif found := re.search(r":\s+((?:ldtile|sttile|tile|tdp)\w+)", line):
            symbols.add(symbol)
            used.add(found[1])
    assert used == {
        *("ldtilecfg", "tilezero", "tileloadd", "tilestored", "tdpbf16ps", "tilerelease"),
    }
    assert all(name.startswith("_ZN4gose3cpu3amx") for name in symbols), symbols
