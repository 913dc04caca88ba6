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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gose_kernels import native as native_library


class _Copy(NamedTuple):
    packed_EB: Tensor
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]

    def stale(self) -> bool:
        return any(storage.expired() for storage in self.storages)


_copies: dict[tuple[object, ...], _Copy] = {}
_watched: dict[int, weakref.ref[Tensor]] = {}
_lock = threading.RLock()


def _version(weights: Tensor) -> int:
    return 0 if weights.is_inference() else weights._version


def _drop_stale() -> None:
    for key in [key for key, copy in _copies.items() if copy.stale()]:
        del _copies[key]


def _watch(weights: Tensor) -> None:
    """Drop the copies of a tensor's memory with the tensor, unless others still use the memory."""
    name, storage = id(weights), weights.untyped_storage()._cdata

    def gone(_: object) -> None:
        with _lock:
            _watched.pop(name, None)
            if torch._C._storage_Use_Count(storage) <= 1:
                for key, copy in list(_copies.items()):
                    if any(kept.cdata == storage for kept in copy.storages):
                        del _copies[key]

    if name not in _watched:
        _watched[name] = weakref.ref(weights, gone)


def _kept(
    weights: tuple[Tensor, ...], layout: tuple[object, ...], pack: Callable[[], Tensor]
) -> Tensor:
    """The copy that is kept for these weights in this layout, else the one that `pack` makes."""
    key = (layout, *[(w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights])
    versions = tuple([_version(w) for w in weights])
    found = _copies.get(key)
    if found is not None and found.versions == versions and not found.stale():
        return found.packed_EB
    with _lock:
        _copies.pop(key, None)  # before the new one is made: never two copies of one weight
        _drop_stale()
        packed_EB = pack()
        storages = tuple(StorageWeakRef(w.untyped_storage()) for w in weights)
        _copies[key] = _Copy(packed_EB, versions, storages)
        for w in weights:
            _watch(w)
    return packed_EB


def _panels_bytes(columns: int, K: int, gated: bool, dtype: torch.dtype) -> int:
    """Bytes of one expert's panels for [columns, K] weights; with a gate, columns = 2 units."""

    def aligned(size: int) -> int:
        return -(-size // 32) * 32

    padded = 2 * aligned(columns // 2) if gated else aligned(columns)
    return padded * aligned(K) * dtype.itemsize


def expert_bytes(*, width: int, hidden: int, dtype: torch.dtype, gated: bool = True) -> int:
    """Bytes of one expert's row of packed_EB, for D = width and F = hidden."""
    up = _panels_bytes(2 * hidden if gated else hidden, width, gated, dtype)
    return up + _panels_bytes(width, hidden, False, dtype)


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
    num_experts, rows, width = w_up_EHD.mT.shape if transposed else w_up_EHD.shape
    hidden, dtype = rows // 2 if gated else rows, w_up_EHD.dtype
    wanted = (num_experts, hidden, width) if transposed else (num_experts, width, hidden)
    if tuple(w_down_EDF.shape) != wanted or w_down_EDF.dtype != dtype or rows % (1 + gated):
        raise ValueError(
            f"pack_experts: w_down_EDF must be {dtype} of shape {wanted} to fit w_up_EHD of shape "
            f"{tuple(w_up_EHD.shape)} with gated={gated}, transposed={transposed}, "
            f"got {w_down_EDF.dtype} of shape {tuple(w_down_EDF.shape)}"
        )
    up_bytes = _panels_bytes(rows, width, gated, dtype)
    total = expert_bytes(width=width, hidden=hidden, dtype=dtype, gated=gated)
    packed_EB = torch.empty(num_experts, total, dtype=torch.uint8) if out is None else out
    if packed_EB.shape != (num_experts, total):
        raise ValueError(
            f"pack_experts: out must have shape {(num_experts, total)}, "
            f"got {tuple(packed_EB.shape)}"
        )
    pack = torch.ops.gose_native.pack_matrix
    pack(packed_EB, w_up_EHD, 0, gated, interleaved, transposed)
    pack(packed_EB, w_down_EDF, up_bytes, False, False, transposed)
    return packed_EB


def _unpacked(packed_EB: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[E, panels * 32, K] columns of panels, in the order in which they stand there."""
    num_experts, rows = packed_EB.shape[0], -(-K // 32) * 32
    values = packed_EB.contiguous().view(dtype)
    if dtype == torch.bfloat16:  # pairs along K
        values = values.view(num_experts, -1, rows // 2, 32, 2).transpose(3, 4)
    return values.reshape(num_experts, -1, rows, 32).mT.reshape(num_experts, -1, rows)[..., :K]


def unpack_experts(
    packed_EB: Tensor, *, width: int, hidden: int, dtype: torch.dtype, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """(w_up_EHD, w_down_EDF) of a packed_EB of experts of D = width and F = hidden: gates first."""
    rows = 2 * hidden if gated else hidden
    up_bytes = _panels_bytes(rows, width, gated, dtype)
    up = _unpacked(packed_EB[:, :up_bytes], width, dtype)
    if gated:  # 16 gates, then the ups of the same 16 units
        up = up.unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(2, 3)[:, :, :hidden].flatten(1, 2)
    down = _unpacked(packed_EB[:, up_bytes:], hidden, dtype)
    return up[:, :rows], down[:, :width]


def packed_experts(
    w_up_EHD: Tensor, w_down_EDF: Tensor, *, gated: bool, interleaved: bool, transposed: bool
) -> tuple[Tensor, int]:
    """packed_EB of `pack_experts`, kept while both weights stand, and F."""

    def pack() -> Tensor:
        return pack_experts(
            w_up_EHD, w_down_EDF, gated=gated, interleaved=interleaved, transposed=transposed
        )

    packed_EB = _kept((w_up_EHD, w_down_EDF), (gated, interleaved, transposed), pack)
    return packed_EB, w_down_EDF.shape[1 if transposed else 2]


def packed_matrix(w_EFD: Tensor, *, transposed: bool) -> Tensor:
    """packed_EB of the weights of `grouped_gemm`, kept while they stand."""

    def pack() -> Tensor:
        num_experts, columns, K = w_EFD.mT.shape if transposed else w_EFD.shape
        size = _panels_bytes(columns, K, False, w_EFD.dtype)
        packed_EB = torch.empty(num_experts, size, dtype=torch.uint8)
        torch.ops.gose_native.pack_matrix(packed_EB, w_EFD, 0, False, False, transposed)
        return packed_EB

    return _kept((w_EFD,), (transposed,), pack)


def forget_packed() -> None:
    """Let go of every packed copy: needed after a change of weights that torch does not count."""
    with _lock:
        _copies.clear()


def packed_bytes() -> int:
    """Bytes of the packed copies that are kept."""
    return sum(copy.packed_EB.numel() for copy in list(_copies.values()))
