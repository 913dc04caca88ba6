"""Backends of an op, one implementation each: made from a reference, a compiled kernel or a Triton
launcher, with the reason why a call cannot run there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gose_kernels import native as native_library

# Every op has a row for each of these; where one is not written, that is the reason given.
BACKENDS = ("cuda", "triton", "cpu", "torch")


class Backend(NamedTuple):
    """One implementation of an op; `why_not` gives the reason a call cannot run here, or None."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    by_dtype: bool = False  # why_not looks at nothing but dtypes and devices
    never: Callable[..., str | None] | None = None  # the part of why_not that does so
    # run of the arguments that were given, (args, options), without their defaults
    given: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    # the same, asked first, for a call like one that was run by `given`; None for any other
    again: Callable[[tuple[Any, ...], dict[str, Any]], Any | None] | None = None
    path: Callable[[torch.dtype], str] | None = None  # which of its kernels serves a dtype


def tensors_of(args: Iterable[object]) -> Iterator[Tensor]:
    """Every tensor among the arguments, also those inside lists."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (t for t in a if isinstance(t, Tensor))


def _dtype_reason(args: Sequence[object], dtypes: tuple[torch.dtype, ...]) -> str | None:
    dtype = next((t.dtype for t in tensors_of(args) if t.is_floating_point()), None)
    if not dtypes or dtype is None or dtype in dtypes:
        return None
    wanted = " | ".join(str(d).removeprefix("torch.") for d in dtypes)
    return f"takes {wanted}, got {str(dtype).removeprefix('torch.')}"


def _device_reason(args: Sequence[object], device: str) -> str | None:
    for t in tensors_of(args):
        if t.device.type != device:
            return f"takes tensors on {device}, got one on {t.device.type}"
    return None


@cache
def cuda_reason() -> str | None:
    """Why CUDA kernels cannot run in this process, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no CUDA device or driver is visible to torch"
    return None


@cache
def triton_interprets() -> bool:
    """True when Triton kernels run on CPU tensors: Triton reads TRITON_INTERPRET once, as we do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def triton_reason() -> str | None:
    """Why Triton kernels cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'gose[gpu]'"
    if triton_interprets():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA or ROCm"
    return None if torch.cuda.is_available() else "no GPU or driver is visible to torch"


def _mixed_devices_reason(*args: Any, **_options: Any) -> str | None:
    """torch computes with a number (shape []) on the CPU beside tensors on any device."""
    devices = {str(t.device) for t in tensors_of(args) if t.dim() > 0}
    if len(devices) < 2:
        return None
    return f"takes tensors on one device, got them on {' and '.join(sorted(devices))}"


def reference(run: Callable[..., Any]) -> Backend:
    """The backend `torch`: the op's specification in plain torch, on every device and dtype."""
    return Backend("torch", run, _mixed_devices_reason)


def native(
    device: Literal["cpu", "cuda"],
    op: str | Callable[..., Any],
    *dtypes: torch.dtype,
    unless: Callable[..., str | None] | None = None,
    writes: tuple[int, ...] = (),
    pack: Callable[..., Tensor] | None = None,
    again: Callable[[tuple[Any, ...], dict[str, Any]], Any | None] | None = None,
    learn: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    path: Callable[[torch.dtype], str] | None = None,
) -> Backend:
    """The compiled kernel `torch.ops.gose_native.<op>` on one device, or a function that calls it.

    The kernel takes every argument in schema order; with `pack` it takes what that makes of the
    options (one tensor, kept for the next call with equal options), then the positional arguments.
    A function takes them as the reference does. With `learn`, which sees what it ran, `again` is
    asked first: it gives the result of a call like one of these, None for any other.
    `dtypes` limits the first floating-point tensor argument; `unless(*args, **options)` refuses a
    call with a reason. `writes` are the positions of arguments that change in place: autograd
    learns of it, as of torch's own in-place ops. `path(dtype)` names the kernel within, for
    `explain`.
    """

    def never(*args: Any) -> str | None:
        reason = _device_reason(args, device) or native_library.why_not()
        if reason is None and device == "cuda":
            reason = native_library.why_not_cuda() or cuda_reason()
        return reason or _dtype_reason(args, dtypes)

    def why_not(*args: Any, **options: Any) -> str | None:
        return never(*args) or (unless(*args, **options) if unless is not None else None)

    # Looked up once, below the overload's own Python; before the library is loaded there is none.
    found: list[Any] = []

    def run(*args: Any, **options: Any) -> Any:
        try:
            if isinstance(op, str) and not found:
                found.append(getattr(torch.ops.gose_native, op).default._op)
            if not isinstance(op, str):
                out = op(*args, **options)
            elif pack is None:
                out = found[0](*args, *options.values())
            else:
                out = found[0](pack(**options), *args)
        except RuntimeError as error:
            native_library.reraise(error)
        if writes:
            torch.autograd.graph.increment_version(tensors_of(args[i] for i in writes))
        return out

    if learn is not None:

        def run_and_learn(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            out = run(*args, **options)
            learn(args, options)
            return out

        return Backend(device, run, why_not, unless is None, never, run_and_learn, again, path)
    if pack is None:
        return Backend(device, run, why_not, unless is None, never, path=path)
    packed = lru_cache(maxsize=256)(pack)

    def given(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            return found[0](packed(**options), *args)
        except (IndexError, TypeError, RuntimeError):  # not found yet, a list has no hash, refused
            return run(*args, **options)

    return Backend(device, run, why_not, unless is None, never, given)


def triton(
    module: str,
    op: str,
    *dtypes: torch.dtype,
    check: Callable[..., None] | None = None,
    bind: Callable[..., tuple[Any, ...]] | None = None,
    unless: Callable[..., str | None] | None = None,
    writes: tuple[int, ...] = (),
) -> Backend:
    """The launcher `gose_kernels.triton.<module>.<op>`, imported when first run.

    A launcher trusts its arguments: `check(*args, **options)` raises what does not fit together, or
    `bind`, which returns what the launcher takes in their place. `unless` and `writes` are those of
    `native`.
    """

    def why_not(*args: Any, **options: Any) -> str | None:
        return (
            _device_reason(args, "cpu" if triton_interprets() else "cuda")
            or triton_reason()
            or _dtype_reason(args, dtypes)
            or (unless(*args, **options) if unless is not None else None)
        )

    def run(*args: Any, **options: Any) -> Any:
        if check is not None:
            check(*args, **options)
        given = (args, options) if bind is None else (bind(*args, **options), {})
        launcher = getattr(importlib.import_module(f"gose_kernels.triton.{module}"), op)
        out = launcher(*given[0], **given[1])
        if writes:
            torch.autograd.graph.increment_version(tensors_of(args[i] for i in writes))
        return out

    return Backend("triton", run, why_not, by_dtype=unless is None)
