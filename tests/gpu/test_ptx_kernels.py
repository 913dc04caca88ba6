"""Every GPU kernel, as compiled for sm_80, in the PTX machine: right, without a fault, and with the
same bits whatever the order of its blocks."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import cuda_host, triton_host
from tests.gpu.ops import OPS, arguments, every_case, same_bits
from tests.ptx import machine


@pytest.mark.matrix(keep=150)
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_cuda_kernel(
    name: str, dtype: torch.dtype, case: str, ptx: dict[str, cuda_host.Compiled]
) -> None:
    op, args = OPS[name], arguments(name, dtype, case)
    outputs = []
    for order in machine.ORDERS:
        on_ptx = cuda_host.OnPtx(ptx[op.source], order=order, count=False)
        outputs.append(op.cuda(on_ptx, *args))
    op.check(outputs[0] if len(outputs[0]) > 1 else outputs[0][0], args)
    assert all(same_bits(outputs[0], other) for other in outputs[1:])


@pytest.mark.matrix(keep=150)
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_triton_kernel(name: str, dtype: torch.dtype, case: str) -> None:
    op, args = OPS[name], arguments(name, dtype, case)
    outputs = []
    for order in machine.ORDERS:
        launcher = op.triton(name)
        outputs.append(triton_host.run_on_ptx(launcher, *args, order=order, count=False)[0])
    op.check(outputs[0], args)
    assert all(same_bits(outputs[0], other) for other in outputs[1:])
