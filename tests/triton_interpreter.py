"""Triton's interpreter, repaired until it computes what a GPU computes, and made stricter.

As shipped (3.6 to 3.9) it holds bfloat16 as uint16 and computes on the bit patterns: a * b, a < b,
tl.dot and reductions are silently wrong, casts to bfloat16 truncate, and a comparison of scalars
keeps the type of its operands, so that it is no mask when broadcast. `repair` swaps in parts that

- compute bfloat16 in float32 and round to nearest even, once per operation;
- refuse to reduce or scan bfloat16: a GPU rounds at every step, in an order of its own;
- fault on any load or store outside the tensors handed to the kernel;
- can run the programs of a grid in reverse order: results must not depend on it.

Not modelled: races inside a program, layouts, limits of memory, float8 rounding, tf32, FMA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from gose_kernels.backends import triton_interprets


def float32_of(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bit patterns."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as bit patterns; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(handle: object) -> bool:
    return (
        isinstance(handle, TensorHandle)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    )


def _widened(handle: Any) -> Any:
    if _is_bfloat16(handle):
        return TensorHandle(float32_of(handle.data), tl.float32)
    return handle


def _through_float32(compute: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The operation with bfloat16 operands and result, computed on float32."""

    def wrapped(self: Any, *args: Any) -> TensorHandle:
        narrow = any(_is_bfloat16(a) for a in args)
        out = compute(self, *map(_widened, args)) if narrow else compute(self, *args)
        if out.data.dtype == np.bool_:
            return TensorHandle(out.data, tl.int1)
        return TensorHandle(bfloat16_bits(out.data), tl.bfloat16) if narrow else out

    return wrapped


class _Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    extents: tuple[tuple[int, int], ...] = ()  # [begin, end) addresses a kernel may touch
    backwards = False

    binary_op = _through_float32(interpreter.InterpreterBuilder.binary_op)
    unary_op = _through_float32(interpreter.InterpreterBuilder.unary_op)
    create_clampf = _through_float32(interpreter.InterpreterBuilder.create_clampf)
    create_fma = _through_float32(interpreter.InterpreterBuilder.create_fma)
    create_erf = _through_float32(interpreter.InterpreterBuilder.create_erf)
    create_rsqrt = _through_float32(interpreter.InterpreterBuilder.create_rsqrt)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> TensorHandle:
        return super().create_dot(_widened(a), _widened(b), d, *options)

    def cast_impl(self, src: Any, dst_type: Any) -> TensorHandle:
        src = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(src.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        nearest = rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def set_grid_idx(self, *idx: int) -> None:
        if self.backwards:
            idx = tuple(count - 1 - i for count, i in zip(self.grid_dim, idx, strict=True))
        super().set_grid_idx(*idx)

    def _check_addresses(self, verb: str, pointers: Any, mask: Any) -> None:
        begin = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        end = begin + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(begin.shape, bool)
        for first, last in self.extents:
            inside |= (begin >= first) & (end <= last)
        if not inside.all():
            raise IndexError(
                f"program {self.grid_idx}: {verb} of {(~inside).sum()} elements "
                "outside every tensor"
            )

    def create_masked_load(self, pointers: Any, mask: Any, *others: Any) -> TensorHandle:
        self._check_addresses("load", pointers, mask)
        return super().create_masked_load(pointers, mask, *others)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *others: Any) -> None:
        self._check_addresses("store", pointers, mask)
        super().create_masked_store(pointers, value, mask, *others)

    def create_atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        self._check_addresses("atomic", pointers, mask)
        return super().create_atomic_rmw(op, pointers, value, mask, *others)

    def create_atomic_cas(self, pointers: Any, *others: Any) -> Any:
        everywhere = TensorHandle(np.ones_like(pointers.data, bool), tl.int1)
        self._check_addresses("atomic", pointers, everywhere)
        return super().create_atomic_cas(pointers, *others)


def _refuse_bfloat16(inputs: tuple[Any, ...]) -> None:
    if any(_is_bfloat16(x.handle) for x in inputs):
        raise TypeError("reduce and scan round bfloat16 at every step; cast to float32 first")


class _ReduceOps(interpreter.ReduceOps):  # type: ignore[misc]
    def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
        _refuse_bfloat16(inputs)
        return super().apply_impl(inputs)


class _ScanOps(interpreter.ScanOps):  # type: ignore[misc]
    def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
        _refuse_bfloat16(inputs)
        return super().apply_impl(inputs)


def _extents(args: object) -> Iterator[tuple[int, int]]:
    if isinstance(args, Tensor) and args.numel():
        last = sum((n - 1) * s for n, s in zip(args.shape, args.stride(), strict=True))
        yield args.data_ptr(), args.data_ptr() + (last + 1) * args.element_size()
    elif isinstance(args, (tuple, list)):
        for a in args:
            yield from _extents(a)
    elif hasattr(args, "base"):  # a tensor descriptor, or a tensor seen with another dtype
        yield from _extents(args.base)


class _GridExecutor(interpreter.GridExecutor):  # type: ignore[misc]
    def _init_args_hst(self, args: Any, options: Any) -> Any:
        on_host = super()._init_args_hst(args, options)
        interpreter.interpreter_builder.extents = tuple(
            _extents([*on_host[0], *on_host[1].values()])
        )
        return on_host

    def __call__(self, *args: Any, **options: Any) -> None:
        with np.errstate(all="ignore"):  # a GPU does not warn of inf - inf
            super().__call__(*args, **options)


def repair() -> None:
    """Swaps the repaired parts in, for the rest of the process; harmless when repeated.

    Raises RuntimeError unless TRITON_INTERPRET=1 was set when the process began: Triton decides
    what a kernel is when the kernel is defined.
    """
    if not triton_interprets() or not hasattr(tl.sum, "rewrite"):
        raise RuntimeError("repair: start the process with TRITON_INTERPRET=1")
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.ReduceOps, interpreter.ScanOps = _ReduceOps, _ScanOps
    interpreter.GridExecutor = _GridExecutor


@contextmanager
def programs_backwards() -> Iterator[None]:
    """Kernels launched inside run the programs of their grids last to first."""
    interpreter.interpreter_builder.backwards = True
    try:
        yield
    finally:
        interpreter.interpreter_builder.backwards = False
