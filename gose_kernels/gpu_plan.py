"""gpu_plan: what the GPU kernels of an expert layer would launch, and with which tiles.

    gpu_plan("moe", T=4096, E=64, K=8, D=2048, F=1024, dtype=torch.bfloat16, cc=90)

The functions that choose the launchers' tiles are asked; nothing is compiled, measured or run, and
no GPU is needed. Programs are those of the grid, of which the surplus ends at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels.ops.mlp_call import MlpCall

OPS = ("moe", "expert_mlp", "grouped_gemm")
# KB of shared memory that a block may have, by compute capability (CUDA programming guide,
# technical specifications).
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
# What setup.py compiles by default: cubins, and PTX for every GPU from 9.0 on.
_CUBINS = {80: "sm_80", 86: "sm_80", 87: "sm_80", 89: "sm_80", 90: "sm_90a", 100: "sm_100a"}


class Launch(NamedTuple):
    """Launches of one kernel; tile sizes are 0 for a kernel that multiplies no matrices."""

    phase: str  # forward | backward
    kernel: str
    launches: int
    programs: int | None = None  # said of those whose number the tiles decide
    rows: int = 0
    columns: int = 0
    depth: int = 0
    warps: int = 0
    stages: int = 0
    instruction: str = ""  # of the tensor cores: mma | wgmma | tcgen05
    shared_kb: float | None = None  # of the copies in flight, where they alone decide
    fits: bool = True  # into the shared memory of a block


class Plan(NamedTuple):
    cc: int
    code: str  # what runs of the CUDA C++ kernels
    launches: tuple[Launch, ...]


def _want(holds: bool, argument: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"gpu_plan: {argument} must be {wanted}, got {got}")


def gpu_plan(
    op: str,
    *,
    T: int = 4096,
    E: int = 64,
    K: int = 8,
    D: int = 2048,
    F: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    cc: int = 90,
) -> Plan:
    """What a call of `op`, forward and backward, launches on a GPU of compute capability cc / 10.

    op     "moe" or "expert_mlp" of T tokens, E experts, K slots a token, width D and hidden F in
           plain layout; "grouped_gemm" of T*K rows, E groups, from width D to F
    ValueError for other ops, sizes below 1, dtypes and architectures that Triton's kernels do not
    take. RuntimeError without triton.
    """
    _want(op in OPS, "op", f"one of {', '.join(OPS)}", repr(op))
    for name, size in (("T", T), ("E", E), ("K", K), ("D", D), ("F", F)):
        _want(size >= 1, name, "at least 1", size)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    _want(dtype in dtypes, "dtype", "float32, bfloat16 or float16", dtype)
    known = ", ".join(str(c) for c in SHARED_KB)
    _want(cc in SHARED_KB, "cc", f"one of {known} (Triton takes 8.0 and newer)", cc)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"gpu_plan: needs triton ({error}); pip install 'gose[gpu]'") from error
    code = _CUBINS.get(cc, "PTX of compute_90, compiled by the driver at the first load")
    if op == "grouped_gemm":
        found = list(_grouped_gemm(T * K, E, D, F, dtype, cc))
    else:
        found = list(_expert_mlp(_call(T, E, K, D, F, dtype, activation), cc))
    if op == "moe":
        found[:0] = [_scores(T, E, D, dtype, cc), Launch("forward", "route", 2)]
        found.append(Launch("backward", "route_backward", 3))
    return Plan(cc, code, tuple(found))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(T: int, E: int, K: int, D: int, F: int, dtype: torch.dtype, activation: str) -> MlpCall:
    from gose_kernels.ops.activations import ACTIVATIONS

    names = ", ".join(ACTIVATIONS)
    _want(activation in ACTIVATIONS, "activation", f"one of {names}", repr(activation))
    H = 2 * F if ACTIVATIONS[activation].gated else F
    return MlpCall(
        _meta(T, D, dtype=dtype),
        _meta(T, K, dtype=torch.float32),
        _meta(T, K, dtype=torch.int32),
        _meta(E, H, D, dtype=dtype),
        _meta(E, D, F, dtype=dtype),
        activation=activation,
    )


def _gemm(
    phase: str, kernel: str, programs: int, tile: Any, dtype: torch.dtype, cc: int, products: int
) -> Launch:
    """One launch; `products` matrices of weights share the rows of a tile."""
    wide = tile.rows >= 64  # a warp group multiplies 64 rows
    instruction = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}.get(cc, "mma") if wide else "mma"
    # Copies in flight; where the tensor core reads shared memory itself, also what it reads.
    buffers = tile.stages if instruction != "mma" else tile.stages - 1
    step = (tile.rows + products * tile.columns) * tile.depth * dtype.itemsize
    shared = buffers * step / 1024
    fits = shared <= SHARED_KB[cc]
    told = instruction == "mma" or dtype != torch.float32
    sizes = (tile.rows, tile.columns, tile.depth, tile.warps, tile.stages)
    return Launch(phase, kernel, 1, programs, *sizes, instruction, shared if told else None, fits)


def _scores(T: int, E: int, D: int, dtype: torch.dtype, cc: int) -> Launch:
    """Of a router in the dtype of x."""
    from triton import cdiv

    from gose_kernels.triton import moe, tiles

    x, router = _meta(T, D, dtype=dtype), _meta(E, D, dtype=dtype)
    tile = tiles.for_operands(moe.tile_of(T, dtype == torch.float32), x, router)
    return _gemm("forward", "score", cdiv(T, tile.rows) * cdiv(E, tile.columns), tile, dtype, cc, 1)


def _grouped_gemm(N: int, E: int, D: int, F: int, dtype: torch.dtype, cc: int) -> Iterator[Launch]:
    from triton import cdiv

    from gose_kernels.triton import tiles, weight_grad

    x, w, y = _meta(N, D, dtype=dtype), _meta(E, F, D, dtype=dtype), _meta(N, F, dtype=dtype)
    tile = tiles.row_tile(N, E, N, dtype)
    most = tiles.most_tiles(N, E, tile.rows)
    for phase, left, right, out in (("forward", x, w, F), ("backward", y, w.mT, D)):
        own = tiles.for_operands(tile, left, right)
        yield Launch(phase, "tile_map", 1, cdiv(most, 64))
        yield _gemm(phase, "grouped_gemm", most * cdiv(out, own.columns), own, dtype, cc, 1)
    own = weight_grad.tile_for(y, x)
    programs = E * cdiv(F, own.rows) * cdiv(D, own.columns)
    yield _gemm("backward", "weight_grad", programs, own, dtype, cc, 1)._replace(shared_kb=None)


def _expert_mlp(call: MlpCall, cc: int) -> Iterator[Launch]:
    from triton import cdiv

    from gose_kernels.triton import expert_mlp, expert_mlp_backward, tiles, weight_grad

    (E, H, D), F, dtype = call.w_up_EHD.shape, call.w_down_EDF.shape[2], call.x_TD.dtype
    N = call.expert_TK.numel()
    tile = expert_mlp.tile_of(call, E)
    most = tiles.most_tiles(N, E, tile.rows)
    a_NF, pre_NH, y_ND = (_meta(N, size, dtype=dtype) for size in (F, H, D))
    plan = (("dispatch", 3, None), ("tile_map", 1, cdiv(most, 64)))

    yield from (Launch("forward", *row) for row in plan)
    own = expert_mlp.up_tile(call, tile)
    programs = most * cdiv(F, own.columns)
    yield _gemm("forward", "up", programs, own, dtype, cc, H // F)
    own = tiles.for_operands(tile, a_NF, call.w_down_EDF)
    yield _gemm("forward", "grouped_gemm", most * cdiv(D, own.columns), own, dtype, cc, 1)
    yield Launch("forward", "combine", 1)

    yield from (Launch("backward", *row) for row in (*plan, ("row_weight", 1, None)))
    own = expert_mlp_backward.hidden_tile(call, call.x_TD, tile)
    yield _gemm("backward", "hidden_grad", most * cdiv(F, own.columns), own, dtype, cc, 1)
    own = tiles.for_operands(tile, pre_NH, call.w_up_EHD.mT)
    yield _gemm("backward", "grouped_gemm", most * cdiv(D, own.columns), own, dtype, cc, 1)
    yield from (Launch("backward", name, 1) for name in ("combine", "gate_grad"))
    for left, right in ((pre_NH, call.x_TD), (y_ND, a_NF)):
        own = weight_grad.tile_for(left, right)
        tiles_of = cdiv(left.shape[1], own.rows) * cdiv(right.shape[1], own.columns)
        found = _gemm("backward", "weight_grad", E * tiles_of, own, dtype, cc, 1)
        yield found._replace(shared_kb=None)
