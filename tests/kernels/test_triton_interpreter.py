"""The repaired interpreter against torch: bfloat16 over all its bit patterns, casts, dot, faults.

Collected only in a process that began with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from tests import triton_interpreter

_COUNT = 65536
_ALL = torch.arange(_COUNT, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def _partners(seed: int) -> Tensor:
    """The same patterns in another order, so that every one meets another one."""
    return _ALL[torch.randperm(_COUNT, generator=torch.Generator().manual_seed(seed))]


def _quiet(x: Tensor) -> Tensor:
    """x with quiet NaNs: the C library's fmin returns NaN for a signalling one, a GPU does not."""
    return torch.where(x.isnan(), torch.nan, x)


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits, with one NaN as good as another."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[got.element_size()]
    either_nan = got.isnan() & wanted.isnan()
    return got.dtype == wanted.dtype and bool(
        ((got.view(bits) == wanted.view(bits)) | either_nan).all()
    )


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "less":
        out = a < b
    elif OP == "equal":
        out = a == b
    elif OP == "not_equal":
        out = a != b
    elif OP == "minimum":
        out = tl.minimum(a, b)
    elif OP == "maximum":
        out = tl.maximum(a, b)
    elif OP == "where":
        out = tl.where(a < b, a, b)
    elif OP == "negate":
        out = -a
    elif OP == "abs":
        out = tl.abs(a)
    tl.store(out_ptr + i, out)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "less": torch.lt,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "minimum": lambda a, b: torch.fmin(_quiet(a), _quiet(b)),
    "maximum": lambda a, b: torch.fmax(_quiet(a), _quiet(b)),
    "where": lambda a, b: torch.where(a < b, a, b),
    "negate": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
}


@pytest.mark.parametrize("op", _BINARY)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_operations(op: str, seed: int) -> None:
    a, b = _ALL, _partners(seed)
    wanted = _BINARY[op](a, b)
    got = torch.empty_like(wanted)
    _binary_kernel[(1,)](a, b, got, op, _COUNT)
    assert _same(got, wanted)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("low_bits", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_cast_to_bfloat16_rounds_to_nearest_even(low_bits: int) -> None:
    """All upper halves of float32, with lower halves at, below and above the tie."""
    upper = torch.arange(_COUNT, dtype=torch.int64) << 16
    x = (upper | low_bits).to(torch.uint32).view(torch.float32)
    got = torch.empty(_COUNT, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, got, _COUNT)
    assert _same(got, x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_cast_from_bfloat16(dtype: torch.dtype) -> None:
    got = torch.empty(_COUNT, dtype=dtype)
    _cast_kernel[(1,)](_ALL, got, _COUNT)
    assert _same(got, _ALL.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16], ids=str)
def test_cast_to_bfloat16_from_other_types(dtype: torch.dtype) -> None:
    x = torch.arange(-_COUNT // 2, _COUNT // 2).to(dtype)
    got = torch.empty(_COUNT, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, got, _COUNT)
    assert _same(got, x.to(torch.bfloat16))


@triton.jit
def _constant_kernel(out_ptr, VALUE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 4), tl.full([4], VALUE, tl.bfloat16))


@pytest.mark.parametrize("value", [1 / 3, 257.0, 1e-40, 3.38e38])
def test_constants_round(value: float) -> None:
    got = torch.empty(4, dtype=torch.bfloat16)
    _constant_kernel[(1,)](got, value)
    assert _same(got, torch.full((4,), value, dtype=torch.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    acc = tl.dot(a, b, tl.full([M, N], 0.5, tl.float32))
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    a = torch.randn(16, 64, generator=draw).to(dtype)
    b = torch.randn(64, 32, generator=draw).to(dtype)
    got = torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, got, 16, 32, 64)
    torch.testing.assert_close(got, a.float() @ b.float() + 0.5, rtol=1e-5, atol=1e-5)


@triton.jit
def _row_mask_kernel(x_ptr, row_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    row = tl.load(row_ptr).to(tl.int64)
    tl.store(out_ptr + i, tl.load(x_ptr + row * COUNT + i, mask=(row >= 0) & (i < 5), other=7.0))


@pytest.mark.parametrize("row", [-1, 1])
def test_scalar_comparison_is_a_mask(row: int) -> None:
    x = torch.arange(16.0).view(2, 8)
    got = torch.empty(8)
    _row_mask_kernel[(1,)](x, torch.tensor([row], dtype=torch.int32), got, 8)
    wanted = torch.full((8,), 7.0)
    if row >= 0:
        wanted[:5] = x[row, :5]
    assert torch.equal(got, wanted)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, KIND: tl.constexpr, COUNT: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, COUNT))
    if KIND == "sum of bfloat16":
        tl.store(out_ptr, tl.sum(x, axis=0).to(tl.float32))
    elif KIND == "scan of bfloat16":
        tl.store(out_ptr + tl.arange(0, COUNT), tl.cumsum(x, axis=0).to(tl.float32))
    elif KIND == "max":
        tl.store(out_ptr, tl.max(x, axis=0).to(tl.float32))
    elif KIND == "sum":
        tl.store(out_ptr, tl.sum(x.to(tl.float32), axis=0))


@pytest.mark.parametrize("kind", ["sum of bfloat16", "scan of bfloat16"])
def test_reductions_of_bfloat16_are_refused(kind: str) -> None:
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        _reduce_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(16), kind, 16)


@pytest.mark.parametrize("kind", ["max", "sum"])
def test_reductions_through_float32(kind: str) -> None:
    x = torch.linspace(-3, 5, 64).to(torch.bfloat16)
    got = torch.empty(1)
    _reduce_kernel[(1,)](x, got, kind, 64)
    wanted = x.float().max() if kind == "max" else x.float().sum()
    torch.testing.assert_close(got[0], wanted, rtol=1e-6, atol=0)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, stride, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, tl.load(x_ptr + i * stride))


def test_access_outside_a_tensor_is_a_fault() -> None:
    """Also inside the same storage: what is handed over is a view."""
    wide = torch.arange(16.0)
    got = torch.empty(8)
    _copy_kernel[(1,)](wide[:15:2], got, 2, 8)
    assert torch.equal(got, wide[::2])
    with pytest.raises(InterpreterError, match="load of 1 elements outside every tensor"):
        _copy_kernel[(1,)](wide[:13:2], got, 2, 8)
    with pytest.raises(InterpreterError, match="store of 3 elements outside every tensor"):
        _copy_kernel[(1,)](wide, got[:5], 1, 8)


@triton.jit
def _last_writer_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0) * 10 + tl.program_id(1))


def test_programs_run_backwards() -> None:
    """A kernel whose result depends on the order of its programs is found out."""
    out = torch.zeros(1, dtype=torch.int32)
    _last_writer_kernel[(3, 2)](out)
    assert out.item() == 21
    with triton_interpreter.programs_backwards():
        _last_writer_kernel[(3, 2)](out)
    assert out.item() == 0
