"""Packed copies of expert weights for the CPU kernels: made once, kept while the weights stand.

A CPU kernel reads weights as panels of 32 columns in the order in which it multiplies them, so
every size, dtype and layout runs at full speed. The copy is made at the first call and found again
while the weights keep memory, shape, strides and version counter, through whatever view they come.
It goes when they go or change, and is never saved with a model.

A change that torch does not count is not seen: through `.data`, through NumPy, or of a tensor made
in inference mode. Call `forget_packed()` after one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels import native as native_library
from gose_kernels import quantized, repeats


class Packed(NamedTuple):
    """A packed copy, and what its weights were when it was made."""

    packed_EB: Tensor
    versions: tuple[int, ...]
    watched: tuple[weakref.ref[torch.UntypedStorage], ...]  # dies with the copy


_copies: dict[tuple[object, ...], Packed] = {}
_lock = threading.RLock()  # reentrant: garbage collection may run `gone` wherever it is held

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # DType of csrc/params.h


def _version(weights: Tensor) -> int:
    return 0 if weights.is_inference() else weights._version


def _identity(weights: Tensor) -> tuple[object, ...]:
    return weights.data_ptr(), weights.dtype, weights.shape, weights.stride()


def _kept(
    weights: tuple[Tensor, ...],
    layout: tuple[object, ...],
    pack: Callable[[], Tensor],
    changing: bool,
) -> Packed | None:
    """The copy that is kept for these weights in this layout, else the one that `pack` makes; None
    for weights that are changing: the kernels pack those as they read them."""
    key = (layout, *map(_identity, weights))
    versions = tuple([_version(w) for w in weights])
    found = _copies.get(key)
    if found is not None and found.versions == versions:
        return found

    def gone(_: object) -> None:
        with _lock:
            _drop(key)

    with _lock:
        if changing:
            _drop(key)
            return None
        found = _copies.get(key)  # another thread may have made it meanwhile
        if found is None or found.versions != versions:
            found = None  # the old one goes before the new one is made: never two of one weight
            _drop(key)
            # torch keeps the Python object of a storage while any tensor uses the memory.
            watched = tuple(weakref.ref(w.untyped_storage(), gone) for w in weights)
            found = _copies[key] = Packed(pack(), versions, watched)
    return found


def _drop(key: tuple[object, ...]) -> None:
    """Let go of a copy, and of the calls, one of which may hold it."""
    if _copies.pop(key, None) is not None:
        repeats.forget()


def numbers_then(x_TD: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What a repeated call must find again (csrc/bind_mlp.h): dtype and width of x, where and in
    which layout each of the weights lies. float64 holds addresses exactly."""
    numbers: list[float] = [DTYPES.index(x_TD.dtype), x_TD.shape[1]]
    for w in weights:
        numbers += [w.data_ptr(), w.dim(), *w.shape, *w.stride()]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _aligned(size: int) -> int:
    return -(-size // 32) * 32


def _panels_bytes(
    columns: int, K: int, gated: bool, dtype: torch.dtype, weights: str | None = None
) -> int:
    """Bytes of one expert's panels for [columns, K] weights; with a gate, columns = 2 units."""
    padded = 2 * _aligned(columns // 2) if gated else _aligned(columns)
    if weights is not None:
        return padded // 32 * quantized.panel_bytes(_aligned(K), weights)
    return padded * _aligned(K) * dtype.itemsize


def expert_bytes(
    *,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    gated: bool = True,
    weights: str | None = None,
) -> int:
    """Bytes of one expert's row of packed_EB, for D = width and F = hidden; with `weights` of any
    dtype."""
    up = _panels_bytes(2 * hidden if gated else hidden, width, gated, dtype, weights)
    return up + _panels_bytes(width, hidden, False, dtype, weights)


class _Sizes(NamedTuple):
    """Of the weights of a layer that is packed."""

    num_experts: int
    rows: int  # H
    width: int
    hidden: int


def _sizes(op: str, w_up_EHD: Tensor, w_down_EDF: Tensor, gated: bool, transposed: bool) -> _Sizes:
    """ValueError for weights that do not fit together."""
    num_experts, rows, width = w_up_EHD.mT.shape if transposed else w_up_EHD.shape
    hidden, dtype = rows // 2 if gated else rows, w_up_EHD.dtype
    if dtype not in DTYPES:
        raise ValueError(f"{op}: w_up_EHD must be float32, bfloat16 or float16, got {dtype}")
    wanted = (num_experts, hidden, width) if transposed else (num_experts, width, hidden)
    if tuple(w_down_EDF.shape) != wanted or w_down_EDF.dtype != dtype or rows % (1 + gated):
        raise ValueError(
            f"{op}: w_down_EDF must be {dtype} of shape {wanted} to fit w_up_EHD of shape "
            f"{tuple(w_up_EHD.shape)} with gated={gated}, transposed={transposed}, "
            f"got {w_down_EDF.dtype} of shape {tuple(w_down_EDF.shape)}"
        )
    return _Sizes(num_experts, rows, width, hidden)


def _rows_for(op: str, num_experts: int, total: int, out: Tensor | None) -> Tensor:
    """A packed_EB to fill: `out`, checked, or a new one."""
    packed_EB = torch.empty(num_experts, total, dtype=torch.uint8) if out is None else out
    rows_apart = packed_EB.numel() == 0 or packed_EB.stride(0) % 64 == 0
    if (packed_EB.shape, packed_EB.dtype, rows_apart) != ((num_experts, total), torch.uint8, True):
        raise ValueError(
            f"{op}: out must be uint8 of shape {(num_experts, total)}, rows a multiple of "
            f"64 bytes apart, got {packed_EB.dtype} of shape {tuple(packed_EB.shape)}, "
            f"strides {packed_EB.stride()}"
        )
    return packed_EB


def pack_experts(
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    *,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """packed_EB: the weights of `expert_mlp` as its CPU kernel reads them, one row per expert.

    w_up_EHD, w_down_EDF   float32 | bfloat16 | float16, as in `expert_mlp`, any strides
    gated                  whether the activation has a gate (H = 2F)
    out                    a packed_EB to fill, e.g. rows of a larger one: experts are independent
    Returns uint8 [E, B] with B of `expert_bytes`. The layout belongs to this build of the library:
    make it anew in every process, save the weights instead.
    Raises ValueError for weights that do not fit together or a wrong `out`, RuntimeError without
    the compiled library.
    """
    if (reason := native_library.why_not()) is not None:
        raise RuntimeError(f"pack_experts: {reason}")
    sizes, dtype = _sizes("pack_experts", w_up_EHD, w_down_EDF, gated, transposed), w_up_EHD.dtype
    total = expert_bytes(width=sizes.width, hidden=sizes.hidden, dtype=dtype, gated=gated)
    packed_EB = _rows_for("pack_experts", sizes.num_experts, total, out)
    pack = torch.ops.gose_native.pack_matrix
    up_bytes = _panels_bytes(sizes.rows, sizes.width, gated, dtype)
    pack(packed_EB, w_up_EHD, 0, gated, interleaved, transposed)
    pack(packed_EB, w_down_EDF, up_bytes, False, False, transposed)
    return packed_EB


def quantize_experts(
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    *,
    weights: str,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """packed_EB: the weights of `expert_mlp` as integers and scales (`quantized`), for
    `expert_mlp_packed(..., weights=weights)` with an x of any dtype.

    weights    "int8" or "int4"
    The other arguments, what is returned and raised: as `pack_experts`. The integers are the same
    at every instruction-set level. ValueError also for weights that are not finite.
    """
    op = "quantize_experts"
    quantized.check_weights(op, weights)
    if (reason := native_library.why_not()) is not None:
        raise RuntimeError(f"{op}: {reason}")
    sizes, dtype = _sizes(op, w_up_EHD, w_down_EDF, gated, transposed), w_up_EHD.dtype
    up_bytes = _panels_bytes(sizes.rows, sizes.width, gated, dtype, weights)
    total = up_bytes + _panels_bytes(sizes.width, sizes.hidden, False, dtype, weights)
    packed_EB = _rows_for(op, sizes.num_experts, total, out)
    for name, w, at, *layout in (
        ("w_up_EHD", w_up_EHD, 0, gated, interleaved),
        ("w_down_EDF", w_down_EDF, up_bytes, False, False),
    ):
        number = 1 + quantized.WEIGHTS.index(weights)
        quantize = torch.ops.gose_native.quantize_matrix
        expert = quantize(packed_EB, w, at, *layout, transposed, number)
        if expert >= 0:
            raise ValueError(f"{op}: {name} must be finite, got nan or inf in expert {expert}")
    return packed_EB


def _plain(packed_EB: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[E, panels * 32, K] columns of panels, in the order in which they stand there."""
    num_experts, rows = packed_EB.shape[0], _aligned(K)
    values = packed_EB.contiguous().view(dtype)
    if dtype == torch.bfloat16:  # pairs along K
        values = values.view(num_experts, -1, rows // 2, 32, 2).transpose(3, 4)
    return values.reshape(num_experts, -1, rows, 32).mT.reshape(num_experts, -1, rows)


def unpack_experts(
    packed_EB: Tensor,
    *,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    gated: bool = True,
    weights: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(w_up_EHD, w_down_EDF) of a packed_EB of experts of D = width and F = hidden: gates first.

    weights   of `quantize_experts`, or None for `pack_experts`. Quantized weights come in `dtype`,
              rounded from float32
    """
    rows = 2 * hidden if gated else hidden
    up_bytes = _panels_bytes(rows, width, gated, dtype, weights)

    def columns(part_EB: Tensor, K: int) -> Tensor:
        if weights is None:
            return _plain(part_EB, K, dtype)[..., :K]
        return quantized.dequantized(part_EB, _aligned(K), weights, dtype)[..., :K]

    up, down = columns(packed_EB[:, :up_bytes], width), columns(packed_EB[:, up_bytes:], hidden)
    if gated:  # 16 gates, then the ups of the same 16 units
        up = up.unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(2, 3)[:, :, :hidden].flatten(1, 2)
    return up[:, :rows], down[:, :width]


def packed_experts(
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    *,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    changing: bool = False,
) -> Packed | None:
    """packed_EB of `pack_experts`, kept while both weights stand. None where no copy is kept of
    weights that are `changing`."""

    def pack() -> Tensor:
        return pack_experts(
            w_up_EHD, w_down_EDF, gated=gated, interleaved=interleaved, transposed=transposed
        )

    return _kept((w_up_EHD, w_down_EDF), (gated, interleaved, transposed), pack, changing)


def packed_matrix(
    w_EFD: Tensor, *, transposed: bool, changing: bool = False, dtype: torch.dtype | None = None
) -> Packed | None:
    """packed_EB of the weights of `grouped_gemm`, or of one group's (w_FD), in their own dtype or
    another; kept while they stand. None where no copy is kept of weights that are `changing`."""

    def pack() -> Tensor:
        w = w_EFD.detach().to(w_EFD.dtype if dtype is None else dtype)
        w = w if w.dim() == 3 else w.unsqueeze(0)
        num_experts, columns, K = w.mT.shape if transposed else w.shape
        size = _panels_bytes(columns, K, False, w.dtype)
        packed_EB = torch.empty(num_experts, size, dtype=torch.uint8)
        torch.ops.gose_native.pack_matrix(packed_EB, w, 0, False, False, transposed)
        return packed_EB

    return _kept((w_EFD,), (transposed, dtype), pack, changing)


@contextmanager
def changing_experts(
    w_up_EHD: Tensor, w_down_EDF: Tensor, experts: Sequence[int]
) -> Iterator[None]:
    """A context in which the weights of these experts alone may change, in place: afterwards the
    copies that are kept have their rows anew, and the rows of the others as they were.

    No op may read the weights meanwhile.
    """
    known = {_identity(w): w.detach() for w in (w_up_EHD, w_down_EDF)}

    def of(key: tuple[object, ...]) -> list[Tensor]:
        return [known[i] for i in key[1:] if isinstance(i, tuple) and i in known]

    def versions(weights: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(map(_version, weights))

    with _lock:
        current = [
            (key, of(key))
            for key, copy in _copies.items()
            if len(of(key)) == len(key) - 1 and versions(of(key)) == copy.versions
        ]
    yield
    with _lock:
        for key, weights in current:
            if (copy := _copies.get(key)) is not None:
                for e in experts:
                    _pack_row(key[0], [w[e : e + 1] for w in weights], copy.packed_EB[e : e + 1])
                _copies[key] = copy._replace(versions=versions(weights))


def _pack_row(layout: Any, weights: Sequence[Tensor], out: Tensor) -> None:
    """One expert's row of a copy in a layout of `packed_experts` or `packed_matrix`."""
    if len(weights) == 2:
        gated, interleaved, transposed = layout
        options = {"gated": gated, "interleaved": interleaved, "transposed": transposed}
        pack_experts(*weights, **options, out=out)
    else:
        transposed, dtype = layout
        w_1FD = weights[0].to(weights[0].dtype if dtype is None else dtype)
        torch.ops.gose_native.pack_matrix(out, w_1FD, 0, False, False, transposed)


def path_of(dtype: torch.dtype) -> str:
    """Which micro-kernel multiplies packed weights of a dtype on this CPU."""
    name = str(dtype).removeprefix("torch.")
    kernel: str = torch.ops.gose_native.micro_kernel(name)
    return f"{kernel}; packed weights, kept (trained weights: packed as they are read)"


def forget_packed() -> None:
    """Let go of every packed copy: needed after a change of weights that torch does not count."""
    with _lock:
        repeats.forget()
        _copies.clear()


def packed_bytes() -> int:
    """Bytes of the packed copies that are kept."""
    return sum(copy.packed_EB.numel() for copy in list(_copies.values()))
