"""What compilers say about a kernel: registers, spills, shared memory, occupancy, access widths,
instructions that matter. From cubins by the tools in Triton's package, from AMD's assembly text."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Instructions whose presence or absence is a promise; the rest is noise. RED is an atomic one in
# memory, REDUX a reduction within a warp.
NOTABLE = (
    *("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "LDSM", "UTMALDG"),
    *("ATOMG", "RED", "ATOMS", "SHFL", "REDUX"),
)
NOTABLE_AMD = ("v_mfma", "ds_bpermute", "global_atomic", "flat_atomic")


class Report(NamedTuple):
    registers: int
    spills: int  # bytes of stack and local memory
    shared: int  # bytes
    warps: int  # of a multiprocessor that are resident, of 64 (CUDA only; 0 elsewhere)
    load_bits: int  # of the widest access of global memory
    store_bits: int
    opcodes: tuple[str, ...]


def tool(name: str) -> Path:
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def cuobjdump(*args: str | Path) -> str:
    done = subprocess.run([tool("cuobjdump"), *args], capture_output=True, text=True, check=True)
    return done.stdout


def resident_warps(arch: str, registers: int, shared: int, threads: int) -> int:
    """Of 64, by the limits of a multiprocessor: 65536 registers, handed to warps by 256 (8 a
    thread), 2048 threads, 32 blocks, 164 KB shared (228 from sm_90 on) with 1 KB of each block for
    the system."""
    warps = -(-threads // 32)
    by_registers = 65536 // (32 * (-(-registers // 8) * 8)) // warps
    by_shared = (164 if arch == "sm_80" else 228) * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps


def _widest(code: str, opcode: str) -> int:
    """Bits of the widest access of an opcode in SASS; the plain form is 32 bits."""
    found = re.findall(rf"\b{opcode}\.E(?:\.\w+)*", code)
    widths = [re.search(r"\.(128|64|U16|S16|U8|S8)\b", f) for f in found]
    bits = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return max((32 if w is None else bits[w[1]] for w in widths), default=0)


def _notable(code: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in names if re.search(rf"\b{n}(?![A-Z])", code))


def of_cuda(library: Path, threads: int) -> Iterator[tuple[str, str, Report]]:
    """(architecture, kernel, report) of every kernel in a library; names as in the source."""
    usage: dict[tuple[str, str], tuple[int, ...]] = {}
    arch = ""
    lines = cuobjdump("--dump-resource-usage", library).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            numbers = [
                re.search(rf"{k}:(\d+)", following) for k in ("REG", "STACK", "SHARED", "LOCAL")
            ]
            usage[arch, found[1]] = tuple(int(n[1]) for n in numbers if n)
    for part in re.split(r"\n\s*code for ", cuobjdump("-sass", library))[1:]:
        arch = part.split()[0]
        for function in re.split(r"\n\s*Function : ", part)[1:]:
            name, code = function.split("\n", 1)
            # A bare cubin names its architecture in the second dump alone.
            registers, stack, shared, local = usage.get((arch, name)) or usage["", name]
            yield (
                arch,
                _readable(name),
                Report(
                    registers,
                    stack + local,
                    shared,
                    resident_warps(arch, registers, shared, threads),
                    max(_widest(code, "LDG"), _widest(code, "LDGSTS")),
                    _widest(code, "STG"),
                    _notable(code, NOTABLE),
                ),
            )


def _readable(mangled: str) -> str:
    """combine_kernel<float, 4> of a mangled name."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    text = re.sub(r"\(anonymous namespace\)::|gose::cuda::|_GLOBAL__N__\w+::", "", done.stdout)
    text = re.sub(r"^void ", "", text.strip())
    text = re.sub(r"\((int|long|bool|unsigned int)\)", "", text)
    return text[: text.rindex("(")] if "(" in text else text


# In a main loop: products, fragments and copies with what waits for them, and the loads to nowhere
# that ptxas puts before sm_80's first asynchronous copy. NOP fills slots of products.
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
COPIES = ("LDSM", "LDGSTS", "UTMALDG", "LDGDEPBAR", "DEPBAR", "BAR", "LDS RZ")


def main_loop(compiled: Any, folder: Path) -> Counter[str]:
    """How often each opcode stands in the shortest loop that multiplies matrices and copies ahead,
    by its SASS: from where its last branch leads back to up to that branch. The last rows of a sum
    may have a loop of their own, which waits for its loads."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", cuobjdump("-sass", cubin)
    )
    code = [(int(address, 16), text) for address, text in found]
    loops = []
    for last, text in code:
        back = re.match(r"BRA\b.*?\b0x([0-9a-f]+)", text)
        if back is not None and int(back[1], 16) < last:
            body = [t for address, t in code if int(back[1], 16) <= address <= last]
            names = (re.match(r"LDS RZ|\w+", t) for t in body)
            loops.append(Counter(name[0] for name in names if name is not None))
    loops = [loop for loop in loops if any(loop[p] for p in PRODUCTS) and loop["LDGDEPBAR"]]
    assert loops, "no loop multiplies and copies"
    shortest = min(loops, key=Counter.total)
    del shortest["NOP"]
    return shortest


def of_triton(compiled: Any, folder: Path) -> Report:
    """The report of a kernel that Triton compiled, for either vendor."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", code)
            return int(found[1]) if found else 0

        def widest(verb: str) -> int:
            sizes = {"x4": 128, "x3": 96, "x2": 64, "": 32}
            found = re.findall(rf"(?:global|buffer)_{verb}_dword(x[234])?\b", code)
            narrow = 16 if re.search(rf"(?:global|buffer)_{verb}_(?:\w*short|\w*byte)", code) else 0
            return max([sizes[f] for f in found], default=narrow)

        return Report(
            number("vgpr_count"),
            # Scalar registers that spill go to lanes of vector registers: no memory is touched.
            number("vgpr_spill_count") + number("private_segment_fixed_size"),
            compiled.metadata.shared,
            0,
            widest("load"),
            widest("store"),
            _notable(code, NOTABLE_AMD),
        )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    threads = 32 * compiled.metadata.num_warps
    ((arch, _, report),) = of_cuda(cubin, threads)
    shared = compiled.metadata.shared  # given at launch: the cubin does not tell
    warps = resident_warps(arch, report.registers, shared, threads)
    return report._replace(shared=shared, warps=warps)
