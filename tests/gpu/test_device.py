"""Every op's backends on a device, against the reference: `make gpu` runs it on a GPU with torch,
triton, numpy and pytest alone (`pytest -c tests/gpu/device.ini --device cuda`). The tests of this
repository run the same body on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from tests.gpu.ops import OPS, arguments, every_case
from tests.gpu.params import split


def moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [moved(t, device) for t in value]
    return value.to(device) if isinstance(value, Tensor) else value


def check_on(device: str, name: str, dtype: torch.dtype, case: str) -> list[str]:
    """The backends of the op that ran on the device, each checked."""
    args = arguments(name, dtype, case)
    there = tuple(moved(a, device) for a in args)
    op, ran = gk.OPS[name], []
    given, options = split(there)
    for backend, reason in op.reasons(*given, **options).items():
        if reason is None and backend != "torch":
            got = OPS[name].run(op, *there, backend=backend)
            parts = tuple(t.cpu() for t in got) if isinstance(got, tuple) else got.cpu()
            OPS[name].check(parts, args)
            ran.append(backend)
    return ran


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "case"), every_case())
def test_on_device(name: str, dtype: torch.dtype, case: str, request: Any) -> None:
    device = request.config.getoption("--device")
    wanted = {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}[device]
    assert check_on(device, name, dtype, case) == wanted
