"""quantize, dequantize, dequantize_add_ on a GPU: one program per tile of whole blocks.

Letters: P elements, L live ones (all of them, or those at `place`), G blocks of a tile, B elements
of a block. The contract is in ops/quantize.py. Compiled without contraction: the bytes are part of
the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.masks import places
from gose_kernels.triton import BYTES_PER_LOAD, declares, size_of, threads_per_warp, warps_of
from gose_kernels.triton.philox import draw, draws_of_blocks, key_words

# bits, block, float16 scales, largest scale of ops/quantize.py's FORMATS.
FORMATS = {
    "int8_b256_f32": (8, 256, False, float.fromhex("0x1.020406p+121")),
    "int8_b64_f16": (8, 64, True, 65504.0),
    "int4_b64_f16": (4, 64, True, 65504.0),
}


def _quantize_work(args: Mapping[str, Any]) -> tuple[int, int]:
    """Divisions, conversions and the search for a scale are no operations here."""
    L, item = args["L"], args["x_ptr"].element_size()
    moved = L * item + size_of(args["code_ptr"], args["scale_ptr"])
    moved += 8 * L * (args["HAS_RESIDUAL"] + args["HAS_PLACE"])
    return moved, L * (6 if args["HAS_RESIDUAL"] else 3)


def _dequantize_work(args: Mapping[str, Any]) -> tuple[int, int]:
    L = args["L"]
    moved = size_of(args["code_ptr"], args["scale_ptr"])
    moved += L * (4 + 4 * args["ADD"] + 8 * args["HAS_PLACE"])
    return moved, L * (3 if args["ADD"] else 1)


@triton.jit
def _scales(absmax_G, QMAX: tl.constexpr, HALF: tl.constexpr, MAX_SCALE: tl.constexpr):
    """Smallest scales with QMAX * scale >= absmax, in the format's dtype."""
    scale_G = tl.div_rn(absmax_G, tl.full(absmax_G.shape, QMAX, tl.float32))  # it, or one below
    if HALF:
        half_G = scale_G.to(tl.float16)
        low_G = half_G.to(tl.float32) * QMAX < absmax_G  # 18 bits: exact
        bits_G = half_G.to(tl.int16, bitcast=True) + low_G.to(tl.int16)
        scale_G = bits_G.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # The sign of the exact difference.
        low_G = tl.fma(scale_G, tl.full(absmax_G.shape, QMAX, tl.float32), -absmax_G) < 0.0
        bits_G = scale_G.to(tl.int32, bitcast=True) + low_G.to(tl.int32)
        scale_G = bits_G.to(tl.float32, bitcast=True)
    return tl.minimum(scale_G, MAX_SCALE)


@triton.jit(launch_metadata=declares(_quantize_work))
def _quantize_kernel(
    x_ptr,  # [P]
    residual_ptr,  # [P] float32, or anything
    place_ptr,  # [L] int64 flat indices of what is coded, or anything
    code_ptr,  # uint8 [ceil(L * BITS / 8)], written once
    scale_ptr,  # [ceil(L / B)], written once
    left_ptr,  # [P] float32, or anything
    L,
    num_bytes,  # of the code: a bound that is a constant of neighbours, so that they share a store
    key0,
    key1,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    QMAX: tl.constexpr = (1 << (BITS - 1)) - 1
    g = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at = g[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < L
    i = at
    if HAS_PLACE:
        i = tl.load(place_ptr + at, mask=inside, other=0)
    y = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + i, mask=inside, other=0.0)
    # Bits of |y| have its order, and those of infinity and NaN are above all.
    top_G = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale_G = _scales(top_G.to(tl.float32, bitcast=True), QMAX, HALF, MAX_SCALE)
    scale_G = tl.where(top_G >= 0x7F800000, float("nan"), scale_G)
    tl.store(scale_ptr + g, scale_G.to(scale_ptr.dtype.element_ty), mask=g * B < L)
    scale = tl.broadcast_to(scale_G[:, None], [G, B])
    ratio = tl.where(scale > 0.0, tl.div_rn(y, scale), 0.0)
    if STOCHASTIC:
        if HAS_PLACE:
            lane = draw(i, key0, key1)
        else:
            block = tl.program_id(0).to(tl.int64) * (G * B // 8) + tl.arange(0, G * B // 8)
            lane = tl.reshape(draws_of_blocks(block, key0, key1), [G, B])
        code = tl.floor(ratio + (lane.to(tl.float32) + 0.5) * (1.0 / 65536.0))
    else:
        # To nearest, ties to even, for |ratio| < 2^22; -0 stays, it shows in what is left.
        near = (tl.minimum(tl.maximum(ratio, -QMAX - 1.0), QMAX + 1.0) + 12582912.0) - 12582912.0
        code = tl.where(near == 0.0, ratio * 0.0, near)
    code = tl.minimum(tl.maximum(code, -QMAX), QMAX)
    if HAS_RESIDUAL:
        tl.store(left_ptr + i, y - code * scale, mask=inside)
    q = code.to(tl.int32)
    if BITS == 8:
        tl.store(code_ptr + at, (q & 255).to(tl.uint8), mask=inside)
    else:
        low, high = tl.split(tl.reshape(q, [G, B // 2, 2]))
        byte = g[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
        pair = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
        tl.store(code_ptr + byte, pair, mask=byte < num_bytes)


@triton.jit(launch_metadata=declares(_dequantize_work))
def _dequantize_kernel(
    code_ptr,  # uint8 [ceil(L * BITS / 8)]
    scale_ptr,  # [ceil(L / B)]
    place_ptr,  # [L] int64 flat indices, -1 = no element, or anything
    out_ptr,  # [P] float32, written or added to once
    L,
    num_bytes,  # of the code of L elements
    weight,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at = g[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < L
    if BITS == 8:
        q = tl.load(code_ptr + at, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        byte = g[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
        pair = tl.load(code_ptr + byte, mask=byte < num_bytes, other=0).to(tl.int32)
        q = tl.reshape(tl.join(((pair & 15) ^ 8) - 8, ((pair >> 4) ^ 8) - 8), [G, B])
    i = at
    if HAS_PLACE:
        i = tl.load(place_ptr + at, mask=inside, other=-1)
        inside = inside & (i >= 0)
    scale_G = tl.load(scale_ptr + g, mask=g * B < L, other=0.0).to(tl.float32)
    value = q.to(tl.float32) * scale_G[:, None]
    if ADD:
        value = tl.load(out_ptr + i, mask=inside, other=0.0) + value * weight
    tl.store(out_ptr + i, value, mask=inside)


def _tile_size(bits: int, *tensors: Tensor) -> int:
    """Elements of a program: 16 bytes a thread of its widest tensor, so that accesses of a warp are
    dense; whole blocks of every format. Four elements a thread where they share bytes."""
    widest = 4 if bits == 4 else max(t.element_size() for t in tensors)
    return warps_of("quantize") * threads_per_warp() * BYTES_PER_LOAD // widest


def _tile(size: int, block: int) -> dict[str, int]:
    return {"G": size // block, "B": block, "num_warps": warps_of("quantize")}


def quantize(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",  # noqa: A002 - what the schema calls it
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """code, scale, residual' of ops/quantize.py. With a mask it waits for the device once: the
    size of the code depends on it."""
    bits, block, half, max_scale = FORMATS[format]
    place_L = None if frozen_P is None else places(frozen_P, x_P.shape)
    num_live = x_P.numel() if place_L is None else place_L.numel()
    code = x_P.new_empty((num_live * bits + 7) // 8, dtype=torch.uint8)
    scale_type = torch.float16 if half else torch.float32
    scale = x_P.new_empty(triton.cdiv(num_live, block), dtype=scale_type)
    shape = (0,) if residual_P is None else x_P.shape
    make = x_P.new_empty if frozen_P is None else x_P.new_zeros
    left_P = make(shape, dtype=torch.float32)
    if num_live == 0:
        return code, scale, left_P
    x_P = x_P.contiguous()
    given = x_P if residual_P is None else residual_P.contiguous()
    size = _tile_size(bits, x_P, given)
    with torch.cuda.device_of(x_P):
        _quantize_kernel[(triton.cdiv(num_live, size),)](
            x_P,
            given,
            code if place_L is None else place_L,
            code,
            scale,
            left_P if residual_P is not None else scale,
            num_live,
            code.numel(),
            *key_words(seed, step),
            BITS=bits,
            HALF=half,
            MAX_SCALE=max_scale,
            HAS_RESIDUAL=residual_P is not None,
            HAS_PLACE=place_L is not None,
            STOCHASTIC=rounding == "stochastic",
            **_tile(size, block),
            enable_fp_fusion=False,
        )
    return code, scale, left_P


def _decode(
    out_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None,
    *,
    format: str,  # noqa: A002
    weight: float | None,
) -> None:
    """out = q * scale, or out += weight * (q * scale), where not frozen."""
    bits, block, _, _ = FORMATS[format]
    num_coded = out_P.numel()
    place_L = None
    if frozen_P is not None:
        # One more than are live where that is an odd number.
        num_coded = min(code.numel() * 8 // bits, scale.numel() * block)
        place_L = places(frozen_P, out_P.shape, num_coded)
    if num_coded == 0:
        return
    size = _tile_size(bits, out_P)
    with torch.cuda.device_of(out_P):
        _dequantize_kernel[(triton.cdiv(num_coded, size),)](
            code.contiguous(),
            scale.contiguous(),
            code if place_L is None else place_L,
            out_P,
            num_coded,
            triton.cdiv(num_coded * bits, 8),
            1.0 if weight is None else weight,
            BITS=bits,
            ADD=weight is not None,
            HAS_PLACE=place_L is not None,
            **_tile(size, block),
            enable_fp_fusion=False,
        )


def dequantize(
    code: Tensor,
    scale: Tensor,
    numel: int,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",  # noqa: A002
) -> Tensor:
    """out float32 [numel]; with a mask the number of its live elements is trusted."""
    make = code.new_empty if frozen_P is None else code.new_zeros
    out_P = make(numel, dtype=torch.float32)
    frozen_P = None if frozen_P is None else frozen_P.reshape(-1)
    _decode(out_P, code, scale, frozen_P, format=format, weight=None)
    return out_P


def dequantize_add_(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",  # noqa: A002
    weight: float = 1.0,
) -> None:
    """acc += weight * (q * scale); with a mask the number of its live elements is trusted."""
    _decode(acc_P, code, scale, frozen_P, format=format, weight=weight)
