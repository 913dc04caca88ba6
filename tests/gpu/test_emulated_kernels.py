"""The sources of csrc/cuda under g++ (csrc/emulate): right in every order of blocks and threads,
clean under AddressSanitizer. Small wrong kernels show that the emulator would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from gose_kernels.ops import route as route_op
from gose_kernels.ops.route_call import CUDA_BANDS, CUDA_EXPERTS
from tests.gpu import cuda_host
from tests.gpu.ops import OPS, arguments, every_case, same_bits
from tests.gpu.params import ROOT, poisoned


@pytest.mark.matrix(keep=130)
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_emulated_kernel(
    name: str, dtype: torch.dtype, case: str, emulated: Mapping[str, Path]
) -> None:
    op, args = OPS[name], arguments(name, dtype, case)
    outputs = []
    for order in cuda_host.ORDERS:
        outputs.append(op.cuda(cuda_host.OnEmulator(emulated[op.source], order), *args))
    op.check(outputs[0] if len(outputs[0]) > 1 else outputs[0][0], args)
    assert all(same_bits(outputs[0], other) for other in outputs[1:])


def test_route_refuses_what_its_kernel_cannot_hold(emulated: Mapping[str, Path]) -> None:
    """The limits that the op states as its reason are those of the launcher."""
    experts, bands = CUDA_EXPERTS, list(range(CUDA_BANDS + 1))
    narrow, wide = torch.zeros(1, 4), torch.zeros(1, experts + 1)
    call = cuda_host.OnEmulator(emulated["route"])
    OPS["route"].cuda(call, wide[:, :experts].contiguous(), 2)
    with pytest.raises(RuntimeError, match="route: error 1:"):
        OPS["route"].cuda(call, wide, 2)
    refused = {"adaptive": "bands", "bands": bands}
    assert (
        route_op.too_large_for_cuda(wide) == f"takes at most {experts} experts, got {experts + 1}"
    )
    assert route_op.too_large_for_cuda(narrow, **refused) == (
        f"takes at most {len(bands) - 1} bands, got {len(bands)}"
    )
    assert route_op.too_large_for_cuda(narrow, adaptive="bands", bands=bands[1:]) is None
    structs = (ROOT / "csrc" / "params.h").read_text()
    assert f"kRouteBands = {len(bands) - 1};" in structs


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parent / "faulty.cu"
    return cuda_host.compile_emulated(source, tmp_path_factory.mktemp("faulty"))


def _run_faulty(library: Path, mistake: int, order: str) -> torch.Tensor:
    out = poisoned(64, dtype=torch.float32)
    call = cuda_host.OnEmulator(library, order)
    call("entropy", "EntropyParams", {"out": out}, rows=mistake, C=1)
    return out


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_emulator_shows_a_missing_barrier(faulty: Path, order: str) -> None:
    """Poisoned shared memory: threads read what is not yet written, in every order."""
    out = _run_faulty(faulty, 0, order)
    wanted = torch.arange(64.0).view(-1, 2).flip(1).flatten()
    assert int(out.isnan().sum()) >= 16
    assert torch.equal(out[~out.isnan()], wanted[~out.isnan()])


@pytest.mark.parametrize("order", cuda_host.ORDERS)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, r"thread 0 waits in __syncthreads at line \d+; thread 40 has returned"),
        (2, r"cannot go on: thread 0 waits in __syncthreads"),
        (3, r"thread 0 waits in __shfl_xor_sync"),
    ],
)
def test_emulator_names_what_waits(faulty: Path, mistake: int, message: str, order: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _run_faulty(faulty, mistake, order)


def _under_sanitizer(*arguments_: str) -> subprocess.CompletedProcess[str]:
    """This process cannot load an instrumented library; one that preloads the runtime can."""
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu.sanitized", *arguments_],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.matrix(keep=5)
@pytest.mark.parametrize("name", OPS)
def test_address_sanitizer_finds_nothing(name: str, tmp_path: Path) -> None:
    """Every case of an op; tensors and shared arrays have red zones around them."""
    done = _under_sanitizer(str(tmp_path), name)
    assert done.returncode == 0, done.stderr[-4000:]
    count = sum(len(list(OPS[name].cases(dtype))) for dtype in OPS[name].dtypes)
    assert done.stdout == f"{count} cases\n"


@pytest.mark.parametrize("where", ["shared", "tensor"])
def test_address_sanitizer_would_find_it(tmp_path: Path, where: str) -> None:
    done = _under_sanitizer(str(tmp_path), where)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
