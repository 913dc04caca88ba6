"""Every GPU kernel, as compiled for sm_80, in the PTX machine: right, and without a fault.

The order of blocks is another one from case to case. One order is enough: the machine faults where
a block reads or writes what another one writes, and only atomics are exempt from that, which these
kernels do not have.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import pytest
import torch

from tests.gpu import cuda_host, triton_host
from tests.gpu.ops import OPS, arguments, every_case
from tests.ptx import machine
from tests.ptx.faults import Counts


def order_of(case: str) -> str:
    return machine.ORDERS[zlib.crc32(case.encode()) % len(machine.ORDERS)]


def assert_no_atomics(counts: Counts) -> None:
    assert not {"atom.global", "red.global", "atom.generic", "red.generic"} & set(counts.opcodes)


@pytest.mark.matrix(keep=90)
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_cuda_kernel(
    name: str, dtype: torch.dtype, case: str, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    op, args = OPS[name], arguments(name, dtype, case)
    on_ptx = cuda_host.OnPtx(ptx[op.source], order=order_of(case), count=False)
    outputs = op.cuda(on_ptx, *args)
    op.check(outputs if len(outputs) > 1 else outputs[0], args)
    assert_no_atomics(on_ptx.counts)


@pytest.mark.matrix(keep=90)
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_triton_kernel(name: str, dtype: torch.dtype, case: str) -> None:
    op, args = OPS[name], arguments(name, dtype, case)
    outputs, counts = triton_host.run_on_ptx(
        op.triton(name), *args, order=order_of(case), count=False
    )
    op.check(outputs, args)
    assert_no_atomics(counts)
