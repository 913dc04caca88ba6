"""expert_mlp over packed weights on a GPU: the plan and the two GEMMs of expert_mlp.py, with
weights in the panels of packing.py and quantized.py, widened in registers as they are multiplied.

Letters: T tokens, K slots of a token, N = T*K rows, E experts, D width, F hidden, B bytes of an
expert's panels. A panel has 32 columns of a matrix; with a gate 16 gates, then the ups of the same
16 units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.quantized import LEVELS, panel_bytes
from gose_kernels.triton import activations, declares, size_of
from gose_kernels.triton.activations import MlpCall, clamped, phi
from gose_kernels.triton.combine import combine
from gose_kernels.triton.dispatch import dispatch
from gose_kernels.triton.expert_mlp import tile_of
from gose_kernels.triton.tiles import (
    GROUP,
    Tile,
    for_operands,
    place,
    precision,
    rows_of,
    tile_map,
    weight_bytes,
)

_PANEL = 32  # columns, and the multiple of rows that a panel is padded to
# LEVELS + 30 by the byte, 8 to a number.
_LOW = tl.constexpr(sum((level + 30) << (8 * i) for i, level in enumerate(LEVELS[:8])))
_HIGH = tl.constexpr(sum((level + 30) << (8 * i) for i, level in enumerate(LEVELS[8:])))


def _work(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, out, F = args["x_ptr"], args["w_ptr"], args["out_ptr"], args["F"]
    names = ("x_ptr", "bias_ptr", "out_ptr", "token_ptr", "map_ptr")
    moved = size_of(*(args[name] for name in names)) + weight_bytes(w, out.shape[0])
    H = 2 * F if args["FORM"] in ("halves", "pairs") else F
    return moved, 2 * out.shape[0] * H * x.shape[1]


@triton.jit
def _levels(q, like: tl.constexpr):
    """The level of every number in [0, 16), in a dtype whose numbers around 2**mantissa are whole:
    set in the low bits of one, then moved by it."""
    table = tl.where(q < 8, _LOW, _HIGH)
    above = ((table >> ((q & 7) * 8).to(tl.int64)) & 63).to(tl.int32)  # the level + 30
    if like == tl.bfloat16:
        out = (above | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 158.0
    elif like == tl.float16:
        out = (above | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1054.0
    else:
        out = (above | 0x4B000000).to(tl.float32, bitcast=True) - 8388638.0
    return out


@triton.jit
def _float8(code):
    """float32 of the normal numbers of float8_e4m3fn."""
    bits = (((code & 127) << 20) + 0x3C000000) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _packed_product(
    x_at,  # [ROWS] pointers to the rows of x
    w_ptr,  # panels of the expert, int8, int32 or the dtype of x
    s_ptr,  # the same as uint8, read if KIND is int4
    column,  # first of the tile
    columns,  # of all panels
    D,
    stride_xd,
    stride_wp,
    stride_sp,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ w without the scale of its columns. WHOLE_D: DEPTH divides D; WHOLE_F: all columns are of
    panels."""
    like: tl.constexpr = x_at.dtype.element_ty
    PACK: tl.constexpr = 8 if KIND == "int4" else 2 if KIND == "pairs" else 1  # steps in a row of w
    WIDE: tl.constexpr = 2 if KIND == "pairs" else 1  # elements of a column in a row of w
    d = tl.arange(0, DEPTH)
    x_at = x_at[:, None] + (d * stride_xd)[None, :]
    row = tl.arange(0, DEPTH // PACK)
    at = tl.arange(0, COLUMNS * WIDE)
    panel = (column // 32 + at // (32 * WIDE)).to(tl.int64)  # int64: weights pass 2**31 elements
    valid = (column + at // WIDE < columns)[None, :]
    inside = panel * stride_wp + at % (32 * WIDE)
    if KIND == "int4":  # 4 words of 8 steps a column, then 2 s
        w_at = w_ptr + inside[None, :] + (row // 4 * 144 + row % 4 * 32)[:, None]
        block = tl.arange(0, DEPTH // 16)
        s_at = s_ptr + (panel * stride_sp + at % 32)[None, :]
        s_at += (block // 2 * 576 + 512 + block % 2 * 32)[:, None]
        half = tl.arange(0, 8)
        shift = half // 2 * 4 + half % 2 * 16
    else:
        w_at = w_ptr + inside[None, :] + (row * 32 * WIDE)[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, DEPTH):
        x = tl.load(x_at) if WHOLE_D else tl.load(x_at, mask=(d < D - start)[None, :], other=0.0)
        if WHOLE_D and WHOLE_F:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=(row * PACK < D - start)[:, None] & valid, other=0)
        if KIND == "int4":
            if WHOLE_D and WHOLE_F:
                s = tl.load(s_at)
            else:
                s = tl.load(s_at, mask=(block * 16 < D - start)[:, None] & valid, other=0)
            s = _float8(s.to(tl.int32)).to(like)
            q = (w[:, None, :] >> shift[None, :, None]) & 15
            q = tl.reshape(q, [DEPTH // 16, 16, COLUMNS])
            w = tl.reshape(_levels(q, like) * s[:, None, :], [DEPTH, COLUMNS])
            s_at += DEPTH // 32 * 576
            w_at += DEPTH // 32 * 144
        else:
            if KIND == "pairs":
                w = tl.permute(tl.reshape(w, [DEPTH // 2, COLUMNS, 2]), (0, 2, 1))
                w = tl.reshape(w, [DEPTH, COLUMNS])
            w_at += DEPTH * 32
        acc = tl.dot(x, w.to(like), acc, input_precision=PRECISION)
        x_at += DEPTH * stride_xd
    return acc


@triton.jit(launch_metadata=declares(_work, "x_ptr"))
def _packed_kernel(
    x_ptr,  # [T or N, D]
    w_ptr,  # [E, B of the matrix] panels as int8, int32 (int4) or the dtype of x
    s_ptr,  # [E, B of the matrix] uint8, read if KIND is int4
    r_ptr,  # [E, B of the matrix] float32, scales at the end of panels; read if int8 or int4
    bias_ptr,  # [E, F or 2F], read if BIAS
    out_ptr,  # [N, F] written once in the rows of experts
    token_ptr,  # [N] int32 rows of x, or None: x has these rows
    map_ptr,  # [3, tiles] int32
    num_tiles,
    E,
    F,
    D,
    columns,  # of all panels
    stride_xn,
    stride_xd,
    stride_we,
    stride_wp,
    stride_se,
    stride_sp,
    stride_re,
    stride_rp,
    limit,
    alpha,
    shift,
    PHI: tl.constexpr,
    LIMITED: tl.constexpr,
    FORM: tl.constexpr,  # "linear", "alone", or with gates how the bias has them: "halves", "pairs"
    KIND: tl.constexpr,  # "int8", "int4", "pairs" along D, "plain"
    BIAS: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_F: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    GATED: tl.constexpr = FORM == "halves" or FORM == "pairs"
    QUANTIZED: tl.constexpr = KIND == "int8" or KIND == "int4"
    UNITS: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    tile, across = place(num_tiles, tl.cdiv(columns, COLUMNS), GROUP)
    e, first, r, inside = rows_of(map_ptr, num_tiles, tile, ROWS)
    if (e < 0) | (e == E):  # nobody reads the rows of no expert
        return
    row = first + r
    if token_ptr is not None:
        row = tl.load(token_ptr + row).to(tl.int64)
    e = e.to(tl.int64)
    column = across * COLUMNS
    if KIND == "int4":
        s_ptr += e * stride_se
    acc = _packed_product(
        x_ptr + row * stride_xn, w_ptr + e * stride_we, s_ptr, column, columns, D,
        stride_xd, stride_wp, stride_sp,
        KIND, ROWS, COLUMNS, DEPTH, WHOLE_D, WHOLE_F, PRECISION,
    )  # fmt: skip
    if QUANTIZED:
        c = column + tl.arange(0, COLUMNS)
        r_at = r_ptr + e * stride_re + (c // 32 + 1).to(tl.int64) * stride_rp - 32 + c % 32
        acc *= tl.load(r_at, mask=c < columns, other=0.0)[None, :]
    f = across * UNITS + tl.arange(0, UNITS)
    valid = f < F
    if GATED:  # of a panel's 32 columns
        pairs = tl.permute(tl.reshape(acc, [ROWS, COLUMNS // 32, 2, 16]), (0, 1, 3, 2))
        gate, up = tl.split(tl.reshape(pairs, [ROWS, UNITS, 2]))
        if BIAS:
            at = bias_ptr + e * 2 * F + (2 * f if FORM == "pairs" else f)
            apart = 1 if FORM == "pairs" else F
            gate += tl.load(at, mask=valid, other=0.0).to(tl.float32)[None, :]
            up += tl.load(at + apart, mask=valid, other=0.0).to(tl.float32)[None, :]
        gate, up = clamped(gate, up, limit, LIMITED)
        out = phi(gate, alpha, PHI) * (up + shift)
    else:
        out = acc
        if BIAS:
            bias = tl.load(bias_ptr + e * F + f, mask=valid, other=0.0)
            out += bias.to(tl.float32)[None, :]
        if FORM == "alone":
            out = phi(out, alpha, PHI)
    out_at = out_ptr + first * F + (r * F)[:, None] + f[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & valid[None, :])


def _aligned(size: int) -> int:
    return -(-size // _PANEL) * _PANEL


class _Matrix(NamedTuple):
    """The panels of one of the two matrices."""

    kind: str
    columns: int  # of all panels
    w: Tensor
    s: Tensor | None
    r: Tensor | None
    strides: tuple[int, ...]  # of w, s and r: from expert to expert, from panel to panel


def _bytes_of_panel(K: int, dtype: torch.dtype, weights: str | None) -> int:
    depth = _aligned(K)
    return depth * _PANEL * dtype.itemsize if weights is None else panel_bytes(depth, weights)


def _matrix(
    packed_EB: Tensor, at: int, columns: int, K: int, dtype: torch.dtype, weights: str | None
) -> _Matrix:
    """The matrix of so many columns, padded to panels, that stands from byte `at` on."""
    of_panel = _bytes_of_panel(K, dtype, weights)
    part_EB = packed_EB[:, at : at + columns // _PANEL * of_panel]
    if part_EB.shape[1] == 0:  # is not read, but nothing cannot be viewed in another dtype
        part_EB = packed_EB.new_empty(packed_EB.shape[0], _PANEL * dtype.itemsize)
    if weights is None:
        w, kind = part_EB.view(dtype), "pairs" if dtype == torch.bfloat16 else "plain"
        return _Matrix(
            kind, columns, w, None, None, (w.stride(0), of_panel // dtype.itemsize, 0, 0, 0, 0)
        )
    r = part_EB.view(torch.float32)
    of_r = (r.stride(0), of_panel // 4)
    if weights == "int8":
        w = part_EB.view(torch.int8)
        return _Matrix("int8", columns, w, None, r, (w.stride(0), of_panel, 0, 0, *of_r))
    w, s = part_EB.view(torch.int32), part_EB
    return _Matrix(
        "int4", columns, w, s, r, (w.stride(0), of_panel // 4, s.stride(0), of_panel, *of_r)
    )


def _product(
    x: Tensor,
    matrix: _Matrix,
    bias: Tensor | None,
    token_N: Tensor | None,
    map_3M: Tensor,
    out_NF: Tensor,
    tile: Tile,
    activation: dict[str, Any],
) -> Tensor:
    tile = for_operands(tile, x)
    tile = tile._replace(depth=max(tile.depth, _PANEL))  # an int4 step
    D, num_tiles = x.shape[1], map_3M.shape[1]
    grid = (num_tiles * triton.cdiv(matrix.columns, tile.columns),)
    _packed_kernel[grid](
        x,
        matrix.w,
        matrix.s,
        matrix.r,
        None if bias is None else bias.contiguous(),
        out_NF,
        token_N,
        map_3M,
        num_tiles,
        matrix.w.shape[0],
        out_NF.shape[1],
        D,
        matrix.columns,
        *x.stride(),
        *matrix.strides,
        **activation,
        KIND=matrix.kind,
        BIAS=bias is not None,
        WHOLE_D=D % tile.depth == 0,
        WHOLE_F=matrix.columns % tile.columns == 0,
        PRECISION=precision(x.dtype),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=GROUP,
        **tile.options,
    )
    return out_NF


_LINEAR = {"limit": 0.0, "alpha": 0.0, "shift": 0.0, "PHI": "", "LIMITED": False, "FORM": "linear"}


def narrowed(tile: Tile, dtype: torch.dtype, weights: str | None) -> Tile:
    """The tile of a layer of `dtype` for packed weights: of int4 and float32 no more fits the
    registers of sm_100 (32 rows spill 8 bytes, 64 192)."""
    wide = weights == "int4" and dtype == torch.float32
    return tile._replace(rows=16, warps=4) if wide else tile


def expert_mlp_packed(call: MlpCall, packed_EB: Tensor, weights: str | None) -> Tensor:
    """out_TD, dtype of x. The weights of `call` have shapes alone; expert ids are trusted."""
    (E, F, D), N = call.down_EFD.shape, call.expert_TK.numel()
    x_TD: Tensor = call.x_TD
    if N == 0 or D == 0 or E == 0:
        return x_TD.new_zeros(x_TD.shape)
    dtype = x_TD.dtype
    columns = (2 if call.act.gated else 1) * _aligned(F)
    up = _matrix(packed_EB, 0, columns, D, dtype, weights)
    up_bytes = columns // _PANEL * _bytes_of_panel(D, dtype, weights)
    down = _matrix(packed_EB, up_bytes, _aligned(D), F, dtype, weights)
    with torch.cuda.device_of(x_TD):
        row_TK, token_N, offset_E1 = dispatch(call.expert_TK, E)
        tile = narrowed(tile_of(call, E), dtype, weights)
        map_3M = tile_map(offset_E1, N, tile.rows)
        a_NF, y_ND = x_TD.new_empty(N, F), x_TD.new_empty(N, D)
        if F > 0:
            act = activations.options_of(call)
            _product(x_TD, up, call.bias_up_EH, token_N, map_3M, a_NF, tile, act)
        _product(a_NF, down, call.bias_down_ED, None, map_3M, y_ND, tile, _LINEAR)
        return combine(y_ND, call.weight_TK, row_TK)
