"""Masks as the ladder's tests see them, and masked_square_sum: its CUDA launcher, cases, tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gose_kernels import masks
from gose_kernels.ops.masked_square_sum import masked_square_sum_reference
from tests.gpu.params import Call, Options, fill, poisoned, split, structs

_KINDS = {torch.bool: 1, torch.uint8: 2, torch.float32: 3}
_CHUNK = 4096  # kUpdateChunk

# Shapes with whole quads, several programs and a rest, and masks of each: (shape, mask, its kind).
UNITS = (
    ((9, 132), (9, 1), "bool"),
    ((2, 3, 64), (2, 1, 1), "scores"),
    ((37, 3), (37, 1), "bool"),
    ((6, 40), (6, 8), "scores"),
    ((6, 40), (3, 5), "bool"),
    ((1030,), (1030,), "bits"),
    ((1030,), (1030,), "bool"),
    ((1030,), (1030,), "scores"),
    ((4, 300), (), "bool"),
    ((0, 5), (1, 5), "bool"),
)


def as_kind(mask: Tensor, shape: tuple[int, ...], kind: str) -> Tensor:
    if kind == "bits":
        return masks.pack(masks.spread(mask, shape))
    return torch.where(mask, 0.5, 0.25) if kind == "scores" else mask


def mask_fields(frozen: Tensor, tensor: Tensor) -> dict[str, Any]:
    """The mask's fields of an UpdateTensor, the mask still as a tensor."""
    mask, units = frozen, tensor.numel()
    if mask.dtype != torch.uint8:
        own = masks.unit_shape(mask.shape, tensor.shape)
        mask, units = masks.spread(mask, own).contiguous(), int(torch.Size(own).numel())
    inner = tensor.numel() // max(1, units) or 1
    return {"frozen": mask, "kind": _KINDS[frozen.dtype], "inner": inner}


def square_sum(
    call: Call, grad: list[Tensor], frozen: list[Tensor], options: Options
) -> tuple[Tensor]:
    tensors: dict[str, Tensor] = {}
    entries, chunks = (structs()["UpdateTensor"] * len(grad))(), 0
    for n, g in enumerate(grad):
        chunks += -(-g.numel() // _CHUNK)
        fields = {"grad": g.contiguous(), "numel": g.numel(), "inner": max(2, g.numel())}
        if frozen:
            fields |= mask_fields(frozen[n], g)
        if options.get("threshold"):
            fields["threshold"] = options["threshold"][n]
        entries[n] = fill("UpdateTensor", end_chunk=chunks, **fields)
        tensors |= {f"{k}[{n}]": t for k, t in fields.items() if isinstance(t, Tensor)}
    out, partial = (poisoned(size, dtype=torch.float64) for size in (len(grad), chunks))
    address, dtype = ctypes.addressof(entries), grad[0].dtype
    update_list = fill("UpdateList", tensor=address, count=len(grad), dtype=dtype)
    tensors |= {"partial": partial, "out": out}
    call("masked_square_sum", "MaskedSquareSumParams", tensors, list=update_list)
    return (out,)


def every_sum_is_right(got: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
    """Sums of every size: the error rule would measure the small ones by the large ones."""
    (grad, frozen), options = split(args)
    truth = masked_square_sum_reference([g.double() for g in grad], frozen, **options)
    torch.testing.assert_close(got[0], truth, rtol=1e-13, atol=0, equal_nan=True)


def _drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(29)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def _units(dtype: torch.dtype, offset: int) -> tuple[Any, ...]:
    """All kinds of masks, NaN where frozen; `offset` elements off the vectors."""
    random = torch.Generator().manual_seed(31)
    grad, frozen = [], []
    units = [*UNITS, ((70, 129), (70, 129), "bits"), ((3, 9001), (3, 1), "bool")]
    for shape, mask_shape, kind in units:
        mask = torch.rand(mask_shape, generator=random) < 0.5
        whole = masks.spread(mask, shape)
        drawn = torch.where(whole, torch.nan, torch.randn(shape, generator=random)).to(dtype)
        grad.append(torch.cat([torch.ones(offset, dtype=dtype), drawn.view(-1)])[offset:])
        grad[-1] = grad[-1].view(shape)
        frozen.append(as_kind(mask, shape, kind))
    return grad, frozen, Options(threshold=[0.5] * len(units))


def square_sum_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Masks of all kinds; none; values whose squares float32 does not hold; more tensors than a
    launch has; more chunks than a block adds side by side, nearly all of them frozen."""
    yield "units", _units(dtype, 0)
    yield "off-by-one", _units(dtype, 1)
    yield "none", (_drawn([(1,), (7,), (0,), (64, 64), (4097,), (9001,)], dtype), [], Options())
    drawn = _drawn([(33, 40), (12, 5, 7)], dtype)
    strided = [drawn[0].t(), drawn[1].permute(2, 0, 1)[::2]]
    rows = [torch.arange(len(g)).view(-1, *[1] * (g.dim() - 1)) % 3 == 1 for g in strided]
    yield "strided", (strided, rows, Options())
    extreme = [torch.full((3,), 1e30), torch.full((5,), 1e-30), torch.tensor([1.0, torch.nan])]
    extreme.append(torch.tensor([torch.inf, 2.0]))
    yield "extreme", ([g.to(dtype) for g in extreme], [], Options())
    many = _drawn([(1 + n % 7,) for n in range(130)], dtype)
    last = [torch.arange(len(g)) == len(g) - 1 for g in many]
    yield "many", (many, last, Options())
    live = torch.zeros(132, 1, dtype=torch.bool)
    live[[0, 77, 130, 131]] = True
    yield "chunks", (_drawn([(132, 4096)], dtype), [~live], Options())


def square_sum_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The widest tile of rows, elements of every kind and no mask; every number of columns."""

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for mask, kind in (
        ((64, 1), torch.bool),
        ((64, 4096), torch.bool),
        ((64 * 512,), torch.uint8),
        ((64, 4096), torch.float32),
        (None, torch.bool),
    ):
        frozen = [] if mask is None else [meta(*mask, dtype=kind)]
        options = Options(threshold=[0.5] if kind == torch.float32 else [])
        yield f"4096-{mask}-{kind}", ([meta(64, 4096, dtype=dtype)], frozen, options)
    for i in range(1, 10):
        frozen = [meta(64, 1, dtype=torch.bool)]
        yield f"{1 << i}", ([meta(64, 1 << i, dtype=dtype)], frozen, Options())
