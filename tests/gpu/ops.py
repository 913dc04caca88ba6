"""Every op with GPU kernels as the ladder's tests see it: how its CUDA launcher is called on CPU
tensors, its Triton launcher, its cases and its reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops import combine as combine_op
from gose_kernels.ops import dispatch as dispatch_op
from gose_kernels.ops import entropy as entropy_op
from tests import cases
from tests.checks import assert_close_within_ulps
from tests.gpu.params import poisoned

Outputs = tuple[Tensor, ...]


class Call(Protocol):
    """tests.gpu.cuda_host.OnPtx and OnEmulator: runs a launcher of csrc/cuda."""

    def __call__(
        self, op: str, struct: str, tensors: Mapping[str, Tensor], **values: Any
    ) -> None: ...


class OnGpu(NamedTuple):
    """An op: `cuda(call, *args)` allocates as csrc/bind_*.h does, with poison in what the kernel
    must write."""

    source: str  # csrc/cuda/<source>.cu and gose_kernels/triton/<source>.py
    cuda: Callable[..., Outputs]
    reference: Callable[..., Any]
    cases: Callable[[torch.dtype], Iterator[tuple[str, tuple[Any, ...]]]]
    # Meta tensors that reach every tile configuration of the Triton kernel, the widest first.
    tiles: Callable[[torch.dtype], Iterator[tuple[str, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    exact: bool = False  # integers: equal, not close
    ulps: int = 0  # allowed beside the error rule, of float32 elements

    def triton(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"gose_kernels.triton.{self.source}")
        launcher: Callable[..., Any] = getattr(module, name)
        return launcher

    def check(self, got: Any, args: tuple[Any, ...]) -> None:
        """The error rule of tests/checks.py against the reference in float64."""
        same = _tuple(self.reference(*args))
        if self.exact:
            for g, s in zip(_tuple(got), same, strict=True):
                assert g.dtype == s.dtype
                assert torch.equal(g, s)
            return
        truth = _tuple(self.reference(*(_double(a) for a in args)))
        for g, s, t in zip(_tuple(got), same, truth, strict=True):
            assert_close_within_ulps(g, s, t, self.ulps)


def _tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _combine(call: Call, y: Tensor, weight: Tensor, row: Tensor) -> Outputs:
    (T, K), D = weight.shape, y.shape[1]
    out = poisoned(T, D, dtype=y.dtype)
    tensors = {"y": y, "weight": weight, "row": row, "out": out}
    call("combine", "CombineParams", tensors, T=T, D=D, K=K, stride_yn=y.stride(0), dtype=y.dtype)
    return (out,)


def _combine_backward(call: Call, grad: Tensor, y: Tensor, weight: Tensor, row: Tensor) -> Outputs:
    (T, K), D = weight.shape, y.shape[1]
    grad_y = torch.zeros_like(y, memory_format=torch.contiguous_format)
    grad_weight = poisoned(T, K, dtype=torch.float32)
    tensors = {"grad": grad, "y": y, "weight": weight, "row": row}
    sizes = {"T": T, "D": D, "K": K, "stride_gt": grad.stride(0), "stride_yn": y.stride(0)}
    call(
        "combine_backward",
        "CombineBackwardParams",
        {**tensors, "grad_y": grad_y, "grad_weight": grad_weight},
        **sizes,
        dtype=y.dtype,
    )
    return grad_y, grad_weight


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _combine_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Widths of every block size, the widest first; K unrolls."""
    for D, K in ((4096, 2), (4096, 8), *((2**i, 2) for i in range(11)), (37, 3)):
        T = 64
        y, weight = _meta(T * K, D, dtype=dtype), _meta(T, K, dtype=torch.float32)
        yield f"D{D}-K{K}", (y, weight, _meta(T, K, dtype=torch.int32))


def _combine_backward_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, args in _combine_tiles(dtype):
        yield label, (_meta(args[1].shape[0], args[0].shape[1], dtype=dtype), *args)


def _combine_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.combine:
        yield str(case), case.build(dtype)


def _combine_backward_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.combine:
        y, weight, row = case.build(dtype)
        yield str(case), (case.draw(row.shape[0], y.shape[1]).to(dtype), y, weight, row)


def _entropy(call: Call, logits: Tensor) -> Outputs:
    logits = logits.contiguous()
    out = poisoned(*logits.shape[:-1], dtype=torch.float32)
    tensors = {"logits": logits, "out": out}
    call(
        "entropy",
        "EntropyParams",
        tensors,
        rows=out.numel(),
        C=logits.shape[-1],
        dtype=logits.dtype,
    )
    return (out,)


def _entropy_backward(call: Call, grad: Tensor, logits: Tensor) -> Outputs:
    logits = logits.contiguous()
    grad_logits = poisoned(*logits.shape, dtype=logits.dtype)
    tensors = {"grad": grad, "logits": logits, "grad_logits": grad_logits}
    sizes = {"rows": grad.numel(), "C": logits.shape[-1]}
    call("entropy_backward", "EntropyBackwardParams", tensors, **sizes, dtype=logits.dtype)
    return (grad_logits,)


def _entropy_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.entropy:
        yield str(case), (case.build(dtype),)
    broken = torch.zeros(3, 20, dtype=dtype)
    broken[0, 3], broken[1, 7] = torch.nan, torch.inf
    yield "nan-and-infinity", (broken,)


def _entropy_backward_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    random = torch.Generator().manual_seed(5)
    for label, (logits,) in _entropy_cases(dtype):
        yield label, (torch.randn(logits.shape[:-1], generator=random), logits)


def _entropy_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every number of columns of a tile, long rows first."""
    for C in (4096, *(2**i for i in range(11)), 37):
        yield f"C{C}", (_meta(64, C, dtype=dtype),)


def _entropy_backward_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (logits,) in _entropy_tiles(dtype):
        yield label, (_meta(64, dtype=torch.float32), logits)


def _dispatch(call: Call, expert: Tensor, E: int) -> Outputs:
    (T, K), chunk = expert.shape, 512
    expert = expert.to(torch.int32).contiguous()
    outputs = [poisoned(*s, dtype=torch.int32) for s in ((T, K), (T * K,), (E + 1,))]
    tensors = dict(zip(("row", "token", "offset"), outputs, strict=True))
    scratch = poisoned(-(-T * K // chunk), E + 1, dtype=torch.int32)
    tensors |= {"expert": expert, "scratch": scratch}
    call("dispatch", "DispatchParams", tensors, T=T, K=K, E=E, chunk=chunk)
    return tuple(outputs)


def _dispatch_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.dispatch:
        if case.T * case.K < 1000:
            yield str(case), case.build(dtype)
    case = cases.DispatchCase(400, 3, 61, "unused")  # several chunks, experts past one tile
    yield str(case), case.build(dtype)


def _dispatch_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "E128", (_meta(4096, 8, dtype=dtype), 128)


OPS: dict[str, OnGpu] = {
    "combine": OnGpu(
        "combine", _combine, combine_op.combine_reference, _combine_cases, _combine_tiles
    ),
    "combine_backward": OnGpu(
        "combine",
        _combine_backward,
        combine_op.combine_backward_reference,
        _combine_backward_cases,
        _combine_backward_tiles,
    ),
    "dispatch": OnGpu(
        "dispatch",
        _dispatch,
        dispatch_op.dispatch_reference,
        _dispatch_cases,
        _dispatch_tiles,
        dtypes=(torch.int32, torch.int64),
        exact=True,
    ),
    "entropy": OnGpu(
        "entropy",
        _entropy,
        entropy_op.entropy_reference,
        _entropy_cases,
        _entropy_tiles,
        ulps=4,
    ),
    "entropy_backward": OnGpu(
        "entropy",
        _entropy_backward,
        entropy_op.entropy_backward_reference,
        _entropy_backward_cases,
        _entropy_backward_tiles,
        ulps=4,
    ),
}


def every_case() -> list[Any]:
    """(op, dtype, case name) of all ops, as pytest parameters."""
    found = []
    for name, op in OPS.items():
        for dtype in op.dtypes:
            for case, _ in op.cases(dtype):
                short = str(dtype).removeprefix("torch.")
                found.append(pytest.param(name, dtype, case, id=f"{name}-{short}-{case}"))
    return found


def arguments(name: str, dtype: torch.dtype, case: str) -> tuple[Any, ...]:
    return dict(OPS[name].cases(dtype))[case]


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(_tuple(a), _tuple(b), strict=True)
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in pairs
    )


assert set(OPS) <= set(gk.OPS)
