"""The Triton kernels compiled ahead of time, without a GPU, as their launchers compile them: they
lower for every architecture, spill nothing and move 16 bytes a thread."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gose_kernels.triton import combine

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Kernel(NamedTuple):
    """A kernel with the arguments of a wide, aligned call; "*" is replaced by the dtype."""

    name: str
    function: Any
    types: tuple[str, ...]
    constants: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


K, D = 2, 4096
KERNELS = [
    Kernel("combine", combine._combine_kernel, ("*", "*fp32", "*i32", "*", "i32", "i32"), (K,)),
    Kernel(
        "combine_backward",
        combine._combine_backward_kernel,
        ("*", "*", "*fp32", "*i32", "*", "*fp32", "i32", "i32", "i32"),
        (K,),
    ),
]


def _compile(kernel: Kernel, dtype: str, target: Any) -> Any:
    block, num_warps = combine._block(D, DTYPES[dtype].itemsize, target.warp_size)
    types = [f"*{dtype}" if t == "*" else t for t in kernel.types]
    constants = (*kernel.constants, block)
    names = kernel.function.arg_names
    return triton.compile(
        ASTSource(
            kernel.function,
            signature=dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True)),
            constexprs=dict(zip(names[len(types) :], constants, strict=True)),
            # What the launcher finds out about pointers and sizes that 16 divides.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
        ),
        target=target,
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernel_lowers(kernel: Kernel, dtype: str, target: str, tmp_path: Path) -> None:
    compiled = _compile(kernel, dtype, TARGETS[target])
    if target.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        assert re.search(r"\.(sgpr|vgpr)_spill_count:\s+[1-9]", code) is None
        assert "_load_dwordx4" in code
        assert "_store_dwordx4" in code
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    assert registers <= 64, usage
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
    assert re.search(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])
    assert ".atom" not in compiled.asm["ptx"]
