"""The closed forms of benchmarks/gpu_model.py against what the PTX machine counts, and the targets
of memory-bound kernels: no byte moved twice, full sectors, no bank conflicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu_model
from tests import cases
from tests.gpu import cuda_host, triton_host
from tests.gpu.ops import OPS
from tests.ptx.faults import Counts


def _combine(T: int, K: int, D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return cases.CombineCase("model", T=T, K=K, D=D).build(dtype)


def _with_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return torch.ones(args[1].shape[0], args[0].shape[1], dtype=args[0].dtype), *args


# Shapes scaled down from gpu_model.SHAPES: whole tiles, every slot used.
SCALED: dict[str, dict[str, Any]] = {
    "combine": {
        f"{T}x{K}x{D}-{dtype}": lambda T=T, K=K, D=D, dtype=dtype: _combine(T, K, D, dtype)
        for T, K, D in ((8, 8, 2048), (16, 2, 1024), (16, 2, 64))
        for dtype in (torch.float32, torch.bfloat16)
    },
}
SCALED["combine_backward"] = {
    label: lambda build=build: _with_grad(build()) for label, build in SCALED["combine"].items()
}
SCALED["entropy"] = {
    f"{rows}x{C}-{dtype}": lambda rows=rows, C=C, dtype=dtype: (
        torch.randn(rows, C, generator=torch.Generator().manual_seed(0)).to(dtype),
    )
    for rows, C in ((64, 1024), (256, 64))
    for dtype in (torch.float32, torch.bfloat16)
}
SCALED["entropy_backward"] = {
    label: lambda build=build: (torch.ones(build()[0].shape[0]), *build())
    for label, build in SCALED["entropy"].items()
}
SCALED["dispatch"] = {"256x8-E16": lambda: cases.DispatchCase(256, 8, 16).build()}
CASES = [(op, label) for op, table in SCALED.items() for label in table]


def _count(op: str, backend: str, args: tuple[Any, ...], ptx: dict[str, Any]) -> Counts:
    if backend == "triton":
        return triton_host.run_on_ptx(OPS[op].triton(op), *args)[1]
    on_ptx = cuda_host.OnPtx(ptx[OPS[op].source])
    OPS[op].cuda(on_ptx, *args)
    return on_ptx.counts


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("op", "label"), CASES)
def test_closed_forms_are_what_is_counted(
    op: str, label: str, backend: str, ptx: dict[str, cuda_host.Compiled]
) -> None:
    args = SCALED[op][label]()
    counts, work = _count(op, backend, args, ptx), gpu_model.work(op, backend, *args)
    scratch = gpu_model.scratch_bytes(op, backend, *args)
    assert work.bytes <= counts.bytes <= work.bytes + scratch
    assert counts.launches == work.launches
    if op.startswith("entropy"):
        assert counts.flops >= work.flops
    else:
        assert counts.flops == work.flops
    assert counts.mma == 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", SCALED)
def test_targets(op: str, backend: str, ptx: dict[str, cuda_host.Compiled]) -> None:
    """At the widest scaled shape: what blocks fetch is at most 1.1 times the minimum, nine tenths
    of every fetched sector is used."""
    args = next(iter(SCALED[op].values()))()
    counts = _count(op, backend, args, ptx)
    work = gpu_model.work(op, backend, *args)
    if gpu_model.scratch_bytes(op, backend, *args) == 0:
        assert 32 * counts.block_sectors <= 1.10 * work.bytes
        assert counts.sector_efficiency >= 0.9
    assert counts.bank_conflicts == 0


def test_every_gpu_kernel_has_a_model() -> None:
    assert set(OPS) == set(gpu_model.ARGUMENTS) == set(SCALED)


def test_prediction_by_hand() -> None:
    """combine of Qwen3 at 4096 tokens, bfloat16: 36864 rows of 4096 bytes, 32768 slots of 8."""
    done = gpu_model.work(
        "combine", "cuda", *gpu_model.ARGUMENTS["combine"](gpu_model.SHAPES["qwen3 T=4096"])
    )
    assert (done.bytes, done.flops) == (36864 * 4096 + 32768 * 8, 2 * 32768 * 2048)
    seconds, bound = gpu_model.predicted_seconds(done, gpu_model.DEVICES["H100"])
    assert bound == "memory"
    assert seconds == pytest.approx(2.5e-6 + 151257088 / (0.85 * 3.35e12))
    tiny = gpu_model.Work(bytes=100, flops=0, launches=3)
    assert gpu_model.predicted_seconds(tiny, gpu_model.DEVICES["A100"])[1] == "launch"
    heavy = gpu_model.Work(bytes=100, flops=10**12, launches=1)
    assert gpu_model.predicted_seconds(heavy, gpu_model.DEVICES["A100"])[1] == "compute"


def test_table_says_that_it_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_model.main([]) == 0
    assert "predicted, not measured" in capsys.readouterr().out.splitlines()[0]
