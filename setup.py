"""Builds csrc/ into gose_kernels/libgose_kernels.so: one library without Python symbols, on torch's
stable ABI. All else about the package stands in pyproject.toml.

GOSE_NATIVE=1  a missing compiler or missing torch headers is an error (default: the package
               installs without compiled kernels and `gose doctor` says so); 0 does not compile
GOSE_CUDA=0|1  without, with CUDA kernels (default: with them when nvcc is found)
CXX            the C++ compiler, with a launcher and flags if need be (default: c++, g++, clang++)
CUDA_HOME      the CUDA toolkit (default: that of the nvcc on the PATH, or /usr/local/cuda)
MAX_JOBS       compilers at a time (default: ninja's)
GOSE_INSTRUMENT=sanitizers|coverage  builds libgose_kernels_NAME.so, in folders of its own, with
               AddressSanitizer and UBSan or with gcov's counters. With the same value set,
               gose_kernels loads it (`python -m tests.instrumented`)
TORCH_CUDA_ARCH_LIST  CUDA architectures, default "8.0;9.0a;10.0a" and PTX of 9.0
A compiler that fails is an error in every case.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest that the library loads in

# Flags of the instruction-set levels. FP contraction is GCC's default, fused where the level can,
# but for NOT_FUSED.
LEVELS: dict[str, list[str]] = {"portable": []}
if sysconfig.get_platform().endswith("x86_64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
# Compiled once, each with its own flags; the micro-kernels are empty where LEVELS has no avx512.
COMPILED_ONCE: dict[str, list[str]] = {
    "isa.cpp": [],
    "microgemm_avx512_bf16.cpp": [*LEVELS["avx512"], "-mavx512bf16"] if "avx512" in LEVELS else [],
    "microgemm_amx.cpp": ["-mamx-tile", "-mamx-bf16"] if "avx512" in LEVELS else [],
}
COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # psabi: vectors never cross a call, all is inlined. uninitialized: GCC 12 warns of its own
    # _mm512_undefined (GCC bug 105593).
    *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    *("-ffunction-sections", "-DNDEBUG"),
]
# What GOSE_INSTRUMENT adds. -O1: lines keep their counts, and sanitized code compiles in minutes.
INSTRUMENTS = {
    "sanitizers": [
        *("-O1", "-g1", "-fno-omit-frame-pointer"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    ],
    "coverage": ["-O1", "--coverage", "-fprofile-update=atomic"],
}
# Every operation rounds: the codecs' bytes are the same on every backend, the optimizers' on every
# level. Both wait for memory, so a fused multiply-add would win nothing.
NOT_FUSED = {"masked_update.cpp", "quantize.cpp", "quantize_weights.cpp"}


def cpu_objects() -> Iterator[tuple[Path, str, list[str]]]:
    """(source, object's name, flags) of every compilation of csrc/cpu."""
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in COMPILED_ONCE:
            yield source, f"{source.stem}.o", COMPILED_ONCE[source.name]
            continue
        exact = ["-ffp-contract=off"] if source.name in NOT_FUSED else []
        for level, flags in LEVELS.items():
            yield source, f"{source.stem}.{level}.o", [f"-DGOSE_LEVEL={level}", *flags, *exact]


def find_torch() -> Path | None:
    """torch's folder, without importing it; also that of the environment around an isolated build:
    any torch that is new enough serves, so nothing needs to be downloaded to compile."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for name in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(name)) / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    return None


def find_compiler() -> str | None:
    """CXX as it stands, which may hold a launcher and flags; else the compiler on the PATH."""
    if chosen := os.environ.get("CXX"):
        if shutil.which(shlex.split(chosen)[0]) is None:
            sys.exit(f"setup.py: CXX must name a C++ compiler on the PATH, got {chosen!r}")
        return chosen
    return next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_flag(flag: str) -> str:
    return shlex.quote(flag).replace("$", "$$")


def find_cuda_home() -> Path | None:
    """The toolkit's folder; nvcc on the PATH may be a wrapper script, so ask it where it lives."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) if Path(home, "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return None
    report = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    for line in report.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parent.parent


def cuda_architectures() -> list[str]:
    """-gencode flags of TORCH_CUDA_ARCH_LIST; an entry ending in +PTX adds PTX of that entry."""
    # PTX of an "a" entry runs on no other GPU: the default's PTX, for GPUs to come, is plain 9.0.
    entries = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = [] if entries else ["-gencode=arch=compute_90,code=compute_90"]
    for entry in (entries or "8.0;9.0a;10.0a").replace(" ", ";").split(";"):
        if not entry:
            continue
        if (match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)) is None:
            sys.exit(
                "setup.py: TORCH_CUDA_ARCH_LIST must hold versions such as 8.0;9.0a;10.0a+PTX, "
                f"got {entry!r}"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def wants(name: str) -> bool | None:
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"setup.py: {name} must be 0 or 1, got {value!r}")
    return None if not value else value == "1"


def instrument() -> str | None:
    name = os.environ.get("GOSE_INSTRUMENT") or None
    if name is not None and name not in INSTRUMENTS:
        sys.exit(f"setup.py: GOSE_INSTRUMENT must be one of {', '.join(INSTRUMENTS)}, got {name!r}")
    return name


class Build(build_ext):
    """Writes a ninja file and runs it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if name := instrument():  # a later wheel takes all that lies in build_lib
            self.build_lib, self.build_temp = f"build/{name}/lib", f"build/{name}/temp"
        elif self.editable_mode:  # else a temporary folder: a later wheel would compile all again
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def build_extension(self, ext: Extension) -> None:
        torch, compiler = find_torch(), find_compiler()
        ninja = shutil.which("ninja")
        if ninja is None and importlib.util.find_spec("ninja") is not None:
            import ninja as ninja_package

            ninja = str(Path(ninja_package.BIN_DIR) / "ninja")
        missing = [
            what
            for what, found in (("torch", torch), ("a C++ compiler", compiler), ("ninja", ninja))
            if found is None
        ]
        if missing:
            text = f"gose_kernels: no compiled kernels, missing: {', '.join(missing)}"
            if wants("GOSE_NATIVE"):
                sys.exit(f"{text} (GOSE_NATIVE=1 makes this an error)")
            self.warn(text)
            return
        assert torch is not None and compiler is not None and ninja is not None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / "gose_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(torch, compiler, target))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)

    def ninja_file(self, torch: Path, compiler: str, target: Path) -> str:
        added = INSTRUMENTS[name] if (name := instrument()) else []
        flags = [*COMMON_FLAGS, *added, ninja_flag(f"-I{CSRC}")]
        torch_flags = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *(
                ninja_flag(f"-isystem{torch / 'include' / sub}")
                for sub in ("", "torch/csrc/api/include")
            ),
        ]
        cuda_home = self.cuda_home()
        if cuda_home is not None:
            torch_flags += [
                "-DUSE_CUDA",
                "-DGOSE_WITH_CUDA",
                ninja_flag(f"-isystem{cuda_home / 'include'}"),
            ]
        objects: list[str] = []
        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            f"torch_flags = {' '.join(torch_flags)}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $more -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {' '.join(['-shared', *added])} -o $out $in $libraries",
        ]

        def compile_(source: Path, name: str, more: str) -> None:
            objects.append(name)
            lines.extend([f"build {name}: compile {ninja_path(source)}", f"  more = {more}"])

        for source, name, more in cpu_objects():
            compile_(source, name, " ".join(more))
        for name in ("bind", "bind_experts"):
            compile_(CSRC / f"{name}.cpp", f"{name}.o", "$torch_flags")
        # libstdc++ before torch: libtorch_cpu exports copies of its symbols, which it may drop.
        libraries = [
            *("-Wl,--gc-sections", "-Wl,--as-needed", "-lstdc++"),
            *(ninja_flag(f"-L{torch / 'lib'}"), "-ltorch_cpu"),
        ]
        if cuda_home is not None:
            compile_(CSRC / "bind_cuda.cpp", "bind_cuda.o", "$torch_flags")
            lines += [
                f"nvcc = {ninja_flag(str(cuda_home / 'bin' / 'nvcc'))}",
                "rule compile_cuda",
                "  command = $nvcc -std=c++20 -O3 "
                "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xfatbin -compress-all "
                f"{' '.join(cuda_architectures())} {ninja_flag(f'-I{CSRC}')} "
                "-MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                objects.append(f"{source.stem}.cuda.o")
                lines.append(f"build {objects[-1]}: compile_cuda {ninja_path(source)}")
            # The runtime is linked in: the library loads where no CUDA is installed.
            libraries += [
                ninja_flag(f"-L{cuda_home / 'lib64'}"),
                ninja_flag(f"-L{cuda_home / 'lib'}"),
                *("-lcudart_static", "-lrt", "-ldl", "-lpthread"),
            ]
        lines += [
            f"build {ninja_path(target)}: link {' '.join(objects)}",
            f"  libraries = {' '.join(libraries)}",
        ]
        return "\n".join([*lines, ""])

    def cuda_home(self) -> Path | None:
        wanted = wants("GOSE_CUDA")
        if wanted is False:
            return None
        home = find_cuda_home()
        if home is None and wanted:
            sys.exit(
                "setup.py: GOSE_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH "
                "or in /usr/local/cuda"
            )
        return home

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        return [f for f in super().get_outputs() if Path(f).exists()]

    def copy_extensions_to_source(self) -> None:
        built = (Path(self.build_lib) / self.get_ext_filename(e.name) for e in self.extensions)
        if all(path.exists() for path in built):
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Any Python 3, this platform: the library has no Python symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    native = wants("GOSE_NATIVE") is not False
    suffix = f"_{name}" if (name := instrument()) else ""
    modules = [Extension(f"gose_kernels.libgose_kernels{suffix}", sources=[])]
    # Where no torch can be found: a download that the package's own requirement needs anyway.
    needs_torch = native and find_compiler() is not None and find_torch() is None
    setup(
        ext_modules=modules if native else [],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
        setup_requires=["torch>=2.11"] if needs_torch else [],
    )
