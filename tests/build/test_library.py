"""The compiled library: what it needs from outside, which instructions stand in which symbol."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import gose_kernels as gk

LIBRARY = Path(gk.native.__file__).parent / "libgose_kernels.so"


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_library_is_loaded() -> None:
    assert gk.native.why_not() is None
    levels = gk.native.cpu_levels()
    assert levels[-1] == "portable"
    assert gk.native.cpu_level() in levels


def test_undefined_symbols_stay_in_the_stable_shim_and_the_runtime() -> None:
    """Whatever is not versioned by the C or C++ runtime is torch's C shim: no ATen, c10, Python."""
    strangers = []
    for line in _run("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines():
        kind, symbol = line.split()[-2:]
        runtime = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol) is not None
        shim = re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", symbol) is not None
        # Weak symbols of the C start files: used where the host defines them.
        optional = kind in "wv" and re.fullmatch(r"(__gmon_start__|_ITM_\w+|__cxa_\w+)", symbol)
        if not (runtime or shim or optional):
            strangers.append(symbol)
    assert not strangers


def test_needed_libraries() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", _run("readelf", "-d", str(LIBRARY)))
    allowed = r"lib(torch_cpu|c10|stdc\+\+|m|gcc_s|c|rt|dl|pthread)\.so(\.\d+)?|ld-linux-.*"
    assert all(re.fullmatch(allowed, name) for name in needed), needed


# The newest symbols that a policy allows, and the libraries that it expects on every machine.
# https://github.com/pypa/auditwheel/blob/main/src/auditwheel/policy/manylinux-policy.json
_MANYLINUX_2_34 = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7,)}
_ON_EVERY_MACHINE = {"libgcc_s", "libstdc++", "libm", "libdl", "librt", "libc", "libpthread"}


def _newest(text: str) -> dict[str, tuple[int, ...]]:
    """The highest version of every kind in what readelf says of the versions that are needed."""
    needs = text.partition(".gnu.version_r")[2]
    newest: dict[str, tuple[int, ...]] = {}
    for kind, version in re.findall(r"Name: ([A-Z]+)_([\d.]+)", needs):
        found = tuple(int(part) for part in version.split("."))
        newest[kind] = max(newest.get(kind, ()), found)
    return newest


def test_library_needs_no_newer_linux_than_manylinux_2_34() -> None:
    """What binds the library to machines like the one that built it; torch comes with itself."""
    newest = _newest(_run("readelf", "-W", "-V", str(LIBRARY)))
    assert newest["GLIBC"] >= (2, 2)
    assert newest.keys() <= _MANYLINUX_2_34.keys()
    assert all(version <= _MANYLINUX_2_34[kind] for kind, version in newest.items()), newest
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\.so", _run("readelf", "-d", str(LIBRARY)))
    own = {name for name in needed if not name.startswith(("libtorch", "libc10", "ld-linux"))}
    assert own <= _ON_EVERY_MACHINE


def test_the_newest_symbol_is_found() -> None:
    text = "Version symbols .gnu.version\n 000: Name: GLIBC_9.9\n.gnu.version_r\n"
    text += "0x1: Name: GLIBC_2.4  Flags\n0x2: Name: GLIBC_2.35\n0x3: Name: GLIBCXX_3.4.9\n"
    assert _newest(text) == {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 9)}


def _instructions() -> Iterator[tuple[str, str, str]]:
    """(symbol, mnemonic, operands) of every instruction in .text."""
    symbol = ""
    for line in _run("objdump", "-d", "--no-show-raw-insn", str(LIBRARY)).splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:", line):
            symbol = found[1]
        elif found := re.match(r"\s+[0-9a-f]+:\s+(?:\{\w+\} )?(\S+)\s*(.*)", line):
            yield symbol, found[1], found[2]


_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def level_of(symbol: str) -> str:
    """The level a mangled name belongs to: gose::cpu::<level>::..., else the baseline."""
    found = re.search(r"4gose3cpu\d+(portable|avx2|avx512_bf16|avx512|amx)", symbol)
    return found[1] if found else "portable"


def outside(level: str, mnemonic: str, operands: str) -> bool:
    """Whether an instruction needs more than its level: AVX-512 state, VEX coding, AMX tiles."""
    tiles = "%tmm" in operands or mnemonic in ("ldtilecfg", "tilerelease")
    dot = mnemonic == "vdpbf16ps"
    wide = "%zmm" in operands or re.search(r"%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", operands)
    vex = "%ymm" in operands or (mnemonic.startswith("v") and mnemonic not in ("verr", "verw"))
    bmi = mnemonic in ("shlx", "shrx", "sarx", "rorx", "mulx", "pdep", "pext", "andn", "bzhi")
    return {
        "portable": bool(tiles or wide or vex or bmi),
        "avx2": bool(tiles or wide),
        "avx512": tiles or dot,
        "avx512_bf16": tiles,
        "amx": bool(wide),
    }[level]


def test_instructions_stay_in_their_level() -> None:
    """An AVX-512 instruction in an AVX2 or shared symbol is a crash on somebody's CPU."""
    count = dict.fromkeys(_LEVELS, 0)
    wrong = []
    for symbol, mnemonic, operands in _instructions():
        level = level_of(symbol)
        count[level] = count.get(level, 0) + 1
        if outside(level, mnemonic, operands):
            wrong.append(f"{symbol}: {mnemonic} {operands}")
    assert not wrong, "\n".join(wrong[:10])
    assert all(count.values()), f"a level has no code: {count}"


def test_the_disassembly_test_sees_what_it_should() -> None:
    assert outside("portable", "vaddps", "%ymm0,%ymm1,%ymm2")
    assert outside("portable", "shlx", "%eax,%ebx,%ecx")
    assert outside("avx2", "vaddps", "%zmm0,%zmm1,%zmm2")
    assert outside("avx2", "vaddps", "%ymm17,%ymm1,%ymm2")
    assert outside("avx512", "tdpbf16ps", "%tmm0,%tmm1,%tmm2")
    assert outside("avx512", "vdpbf16ps", "%zmm0,%zmm1,%zmm2")
    assert not outside("avx512_bf16", "vdpbf16ps", "%zmm0,%zmm1,%zmm2")
    assert outside("portable", "ldtilecfg", "(%rdi)")
    assert not outside("avx512", "vaddps", "%zmm0,%zmm1,%zmm2")
    assert not outside("portable", "addps", "%xmm0,%xmm1")
    assert level_of("_ZN4gose3cpu4avx27combineERKNS_13CombineParamsE") == "avx2"
    assert level_of("_ZN4gose3cpu11avx512_bf1612_GLOBAL__N_13runE") == "avx512_bf16"
    assert level_of("_ZN4gose3cpu8kernelsEv") == "portable"
