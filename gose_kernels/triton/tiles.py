"""Tiles of the expert GEMMs: their sizes by closed form, and which rows every tile has.

Letters: N rows sorted by expert, E experts, E1 = E+1.

Groups are ragged and their sizes stay on the device: a launch has as many tiles as any sizes could
need, a map gives every tile its expert and rows, and tiles that are not needed end at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target

from gose_kernels.triton import declares, size_of, threads_per_warp

_MAP_TILES = 64  # of a program of the map
_MAP_EXPERTS = 64
_ELEMENT_COLUMNS, _ELEMENT_BYTES = 64, 64  # of tiles accessed by the element; bytes of a step
GROUP = 8  # tiles of rows that walk the columns together: their weights stay in L2


class Tile(NamedTuple):
    """rows x columns of the output by one program, in steps of depth along the sum."""

    rows: int
    columns: int
    depth: int
    warps: int  # of 32 threads
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch takes beside the kernel's arguments."""
        # ROCm counts buffers, not copies in flight: two fill its 64 KB of shared memory.
        return {
            "num_warps": max(1, self.warps * 32 // threads_per_warp()),
            "num_stages": 2 if torch.version.hip else self.stages,
            "enable_fp_fusion": True,
        }


# By rows. 16-bit: 16 rows wait for memory, so long steps; float32 is three products of tf32.
_HALF = {
    16: Tile(16, 64, 128, 4, 3),
    32: Tile(32, 128, 64, 4, 3),
    64: Tile(64, 128, 64, 4, 3),
    128: Tile(128, 128, 64, 8, 3),
}
_SINGLE = {
    16: Tile(16, 64, 64, 4, 3),
    32: Tile(32, 64, 32, 4, 3),
    64: Tile(64, 64, 32, 4, 3),
    128: Tile(128, 64, 32, 8, 3),
}


def row_tile(rows: int, experts: int, most: int, dtype: torch.dtype) -> Tile:
    """The tile for `rows` rows over `experts` experts, none of which has more than `most`.

    Twice the mean while that is small, so that nearly every expert has one tile and its weights are
    read once; 64 rows until the last, half empty tile of an expert is a tenth of its rows.
    """
    mean = rows / max(experts, 1)
    wanted = 2 * mean if mean <= 32 else 64 if mean < 640 else 128
    size = triton.next_power_of_2(max(1, int(min(wanted, most))))
    table = _SINGLE if dtype == torch.float32 else _HALF
    return table[min(max(size, 16), 128)]


def by_element(t: Tensor) -> bool:
    """Whether Triton accesses it by the element: only strides of 1 and of 16 n are vectorized."""
    return 1 not in t.stride() or any(s % 16 for s in t.stride() if s != 1) or t.data_ptr() % 16 > 0


def for_operands(tile: Tile, *operands: Tensor) -> Tile:
    """The tile that a product of them takes. What is accessed by the element needs an address each:
    only a smaller tile's fit the registers."""
    if not any(by_element(t) for t in operands):
        return tile
    depth = _ELEMENT_BYTES // operands[0].element_size()
    return tile._replace(columns=_ELEMENT_COLUMNS, depth=depth)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: as TF32 only where torch is told to, else in float32 (AMD) or
    as three TF32 products, which leave an error of 2**-21."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def weight_bytes(w: Tensor, num_rows: int) -> int:
    """What so many rows read of the experts' weights at most."""
    experts = max(w.shape[0], 1)
    return min(experts, num_rows) * (size_of(w) // experts)


def _map_work(args: Mapping[str, Any]) -> tuple[int, int]:
    return size_of(args["offset_ptr"], args["map_ptr"]), 0


@triton.jit(launch_metadata=declares(_map_work))
def _tile_map_kernel(
    offset_ptr,  # [E1] int32
    map_ptr,  # [3, tiles] int32: expert, first row, row after the last
    N,
    E,
    num_tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Expert E has the rows of no expert; -1: the tile is not needed."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.zeros([TILES], tl.int32)
    begin = tl.zeros([TILES], tl.int32)  # tiles of the experts before
    carry = 0
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        first = tl.load(offset_ptr + e, mask=e < E, other=0)
        last = tl.load(offset_ptr + e + 1, mask=e < E, other=0)
        tiles = (last - first + ROWS - 1) // ROWS
        until = carry + tl.cumsum(tiles, axis=0)
        passed = (until[None, :] <= tile[:, None]) & (e < E)[None, :]
        expert += tl.sum(passed.to(tl.int32), axis=1)
        begin = tl.maximum(begin, tl.max(tl.where(passed, until[None, :], 0), axis=1))
        carry += tl.sum(tiles, axis=0)
    first = tl.load(offset_ptr + expert)
    last = tl.load(offset_ptr + expert + 1, mask=expert < E, other=N)
    row = first + (tile - begin) * ROWS
    here = tile < num_tiles
    tl.store(map_ptr + tile, tl.where(row < last, expert, -1), mask=here)
    tl.store(map_ptr + num_tiles + tile, row, mask=here)
    tl.store(map_ptr + 2 * num_tiles + tile, tl.minimum(row + ROWS, last), mask=here)


def most_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """As many tiles of `rows` rows as any sizes of the groups need at most."""
    groups = min(num_experts + 1, num_rows)
    return groups + (num_rows - groups) // rows


def tile_map(offset_E1: Tensor, num_rows: int, rows: int) -> Tensor:
    """map [3, tiles] int32 for tiles of `rows` rows; as many tiles as any offsets need at most."""
    num_experts = offset_E1.numel() - 1
    num_tiles = most_tiles(num_rows, num_experts, rows)
    map_3M = offset_E1.new_empty(3, num_tiles)
    with torch.cuda.device_of(offset_E1):
        _tile_map_kernel[(triton.cdiv(num_tiles, _MAP_TILES),)](
            offset_E1.contiguous(),
            map_3M,
            num_rows,
            num_experts,
            num_tiles,
            rows,
            _MAP_TILES,
            _MAP_EXPERTS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return map_3M


@triton.jit
def place(num_tiles, num_columns, GROUP: tl.constexpr):
    """(tile of rows, tile of columns) of a program: GROUP tiles of rows, which mostly share their
    expert, take one tile of columns after the other."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    inside = program % (GROUP * num_columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def rows_of(map_ptr, num_tiles, tile, ROWS: tl.constexpr):
    """expert, first row (int64), rows from there on, which of them are the tile's: the others
    repeat its last one."""
    expert = tl.load(map_ptr + tile)
    first = tl.load(map_ptr + num_tiles + tile)
    count = tl.load(map_ptr + 2 * num_tiles + tile) - first
    r = tl.arange(0, ROWS)
    return expert, first.to(tl.int64), tl.minimum(r, count - 1), r < count


@triton.constexpr_function
def products_run_ahead():
    """Whether matrix units take their operands from shared memory while the warps go on (sm_90 and
    sm_100; sm_120 is like sm_80)."""
    target = current_target()
    return target is not None and target.backend == "cuda" and 90 <= target.arch < 120


@triton.constexpr_function
def piece_of(rows, bits, depth):
    """Elements of a step that one product takes. Where products run ahead all of them: of several
    each would wait for the one before. Else 64 bytes of a row, 128 of 16 rows of halves: all pieces
    of a row share its address, and of several products in a step Triton carries no fragments to the
    next one, which would cost a move of every register."""
    if products_run_ahead():
        return depth
    return min(depth // 2, (1024 if rows * bits == 256 else 512) // bits)


@triton.constexpr_function
def piece_of_rows(bits, depth):
    """Rows of a step that one product takes where the sum runs over rows, as `piece_of`."""
    return depth if products_run_ahead() or bits == 32 else 16


@triton.jit
def ahead(at, start, stride):
    """Pointers `start` elements on. What lies side by side takes one instruction an address; with
    other strides it may pass 2**31 elements."""
    if isinstance(stride, int):  # a stride of 1 is a constant
        return at + start * stride
    return at + tl.cast(start, tl.int64) * stride


@triton.jit
def product(
    acc,  # [ROWS, COLUMNS]
    x_at,  # [ROWS] pointers to the rows of x, or to d = 0 of them
    w_at,  # [COLUMNS] pointers to the columns of w at d = 0
    valid,  # [COLUMNS]
    D,
    stride_xd,
    stride_wd,
    DEPTH: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x @ w. WHOLE_D: DEPTH divides D; WHOLE_F: every column is valid."""
    PIECE: tl.constexpr = piece_of(acc.shape[0], x_at.dtype.element_ty.primitive_bitwidth, DEPTH)
    d = tl.arange(0, PIECE)
    x_at = x_at[:, None] + (d * stride_xd)[None, :]
    w_at = w_at[None, :] + (d * stride_wd)[:, None]
    for start in range(0, D, DEPTH):
        x_here = ahead(x_at, start, stride_xd)
        w_here = ahead(w_at, start, stride_wd)
        # Pieces of a row share its address.
        for piece in tl.static_range(0, DEPTH, PIECE):
            inside = d < D - start - piece
            x_piece = x_here + piece * stride_xd
            w_piece = w_here + piece * stride_wd
            x = tl.load(x_piece) if WHOLE_D else tl.load(x_piece, mask=inside[None, :], other=0.0)
            if WHOLE_D and WHOLE_F:
                w = tl.load(w_piece)
            else:
                w = tl.load(w_piece, mask=inside[:, None] & valid[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc
