"""quantize, dequantize, dequantize_add_: blockwise integer codes of a tensor, and back.

    y[l] = x[i(l)] + residual[i(l)]          l = 0 .. L-1: the elements that are not frozen, in
                                             row-major order; i(l) is the flat index in x
    block g = l // block; absmax[g] = max over the block of |y|
    scale[g] = smallest number of the scale dtype with qmax * scale[g] >= absmax[g], at most the
               largest with qmax * scale finite in float32; 0 for a block of zeros
    q[l] = round(y / scale) or floor(y / scale + u(i)), 0 where scale is 0, clamped to +-qmax
    residual'[i(l)] = y[l] - q[l] * scale[g];  0 where frozen
    dequantize:       out[i(l)] = q[l] * scale[g];  0 where frozen
    dequantize_add_:  acc[i(l)] += weight * (q[l] * scale[g]);  frozen elements keep their bits

    format          bits  qmax  block  scale     code
    int8_b256_f32      8   127    256  float32   byte l = q[l], two's complement
    int8_b64_f16       8   127     64  float16   byte l = q[l], two's complement
    int4_b64_f16       4     7     64  float16   byte j = q[2j] in the low four bits, q[2j+1] in the
                                                 high four (0 when L is odd), two's complement

x           float32 | bfloat16 | float16, any shape, any strides
residual    float32, shape of x, or None: no error feedback, and the third output is empty
frozen      bool, broadcastable to x, or None; True = not coded: takes no room in the code, counts
            in no block maximum, may hold anything (NaN too). Both ends must know the mask.
rounding    "nearest": ties to even. "stochastic": u of philox.py at (seed, step, i); the expected
            value is y within 2**-17 of a scale, and only the two neighbouring codes occur
returns     quantize: code uint8 [ceil(L * bits / 8)], scale [ceil(L / block)], residual' float32 in
            the shape of x. dequantize: out float32 [numel]; its frozen mask has numel elements.
acc         float32, contiguous, any shape; frozen broadcastable to it
weight      rounded to float32

Every operation is one correctly rounded float32 operation (never a fused multiply-add, never a
multiplication by a reciprocal), so all backends give the same bytes. Hence |y - q * scale| is at
most scale / 2 (nearest) or scale (stochastic) plus the rounding of y / scale. |y| beyond qmax *
65504 saturates in the float16 formats, and the residual keeps the rest.
NaN or infinity in y raises on torch and cpu and makes the scale NaN on cuda and triton (a check
would sync); a scale that is negative, NaN or infinite raises in the decoders on torch and cpu. On
cuda and triton quantize waits for the device once where there is a mask, as the size of the code
depends on it; the decoders trust that a mask has as many live elements as there are codes. Any code
byte is valid: -128 and -8 never leave the encoder and decode as such. L = 0: empty outputs.
"""

# ruff: noqa: A002 - `format` is what the schema and the wire call it
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, float16, float32

from gose_kernels import masks, philox
from gose_kernels.backends import native, reference, triton
from gose_kernels.masks import check_frozen
from gose_kernels.registry import Cost, register


class Format(NamedTuple):
    """A wire format: bits of a code, elements per scale, the scale's dtype and largest value."""

    bits: int
    block: int
    scale_dtype: torch.dtype
    max_scale: float  # largest scale with qmax * scale finite in float32

    @property
    def qmax(self) -> int:
        """Largest code the encoder uses; the smallest is its negative."""
        return (1 << (self.bits - 1)) - 1

    def code_bytes(self, num_live: int) -> int:
        """Length of the code of this many live elements."""
        return (num_live * self.bits + 7) // 8

    def num_scales(self, num_live: int) -> int:
        """Number of scales of this many live elements."""
        return (num_live + self.block - 1) // self.block


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "int8_b256_f32": Format(8, 256, float32, float.fromhex("0x1.020406p+121")),
        "int8_b64_f16": Format(8, 64, float16, 65504.0),
        "int4_b64_f16": Format(4, 64, float16, 65504.0),
    }
)


def _format(name: str, format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"{name}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def _check_quantize(
    x_P: Tensor, residual_P: Tensor | None, frozen_P: Tensor | None, format: str, rounding: str
) -> Format:
    form = _format("quantize", format)
    if x_P.dtype not in (float32, torch.bfloat16, float16):
        raise ValueError(f"quantize: x_P must be float32, bfloat16 or float16, got {x_P.dtype}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"quantize: rounding must be nearest or stochastic, got {rounding!r}")
    if residual_P is not None:
        if residual_P.shape != x_P.shape:
            raise ValueError(
                f"quantize: residual_P must have the shape of x_P {tuple(x_P.shape)}, "
                f"got {tuple(residual_P.shape)}"
            )
        if residual_P.dtype != float32:
            raise ValueError(f"quantize: residual_P must be float32, got {residual_P.dtype}")
    if frozen_P is not None:
        check_frozen("quantize: frozen_P", frozen_P, "x_P", x_P.shape)
    return form


def _check_code(name: str, code: Tensor, scale: Tensor, form: Format) -> None:
    for argument, tensor, dtype in (
        ("code", code, torch.uint8),
        ("scale", scale, form.scale_dtype),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: {argument} must be {dtype}, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(
                f"{name}: {argument} must have 1 dimension, got shape {tuple(tensor.shape)}"
            )


def _check_sizes(name: str, code: Tensor, scale: Tensor, form: Format, num_live: int) -> None:
    wanted = (form.code_bytes(num_live), form.num_scales(num_live))
    if (code.numel(), scale.numel()) != wanted:
        raise ValueError(
            f"{name}: {num_live} live elements need {wanted[0]} code bytes and {wanted[1]} scales, "
            f"got {code.numel()} and {scale.numel()}"
        )


def _live(frozen_P: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Flat bool of the elements that are coded, None for all of them."""
    return None if frozen_P is None else ~frozen_P.expand(shape).reshape(-1)


def _blocks(value_L: Tensor, block: int) -> Tensor:
    """value_L as [blocks, block], the last block filled with zeros."""
    num_blocks = (value_L.numel() + block - 1) // block
    missing = num_blocks * block - value_L.numel()
    return torch.nn.functional.pad(value_L, (0, missing)).view(num_blocks, block)


def _scales(absmax_G: Tensor, form: Format) -> Tensor:
    """Smallest scales with qmax * scale >= absmax: products with 7 bits are exact in float64."""
    scale_G = (absmax_G.double() / form.qmax).to(form.scale_dtype)
    short_G = scale_G.double() * form.qmax < absmax_G.double()
    bits = torch.int32 if form.scale_dtype == float32 else torch.int16
    scale_G = (scale_G.view(bits) + short_G.to(bits)).view(form.scale_dtype)
    return scale_G.clamp_max(form.max_scale)


def _pack(q_L: Tensor, form: Format) -> Tensor:
    if form.bits == 8:
        return q_L.to(torch.int8).view(torch.uint8)
    pair = _blocks(q_L.to(torch.int8), 2).view(torch.uint8)
    return (pair[:, 0] & 15) | (pair[:, 1] << 4)


def _unpack(code: Tensor, num_live: int, form: Format) -> Tensor:
    """Codes as float32."""
    if form.bits == 8:
        return code.view(torch.int8).float()
    nibble = torch.stack((code & 15, code >> 4), dim=1).flatten()[:num_live].to(torch.int8)
    return ((nibble ^ 8) - 8).float()


def quantize_reference(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    form = _check_quantize(x_P, residual_P, frozen_P, format, rounding)
    y_P = x_P.float() if residual_P is None else x_P.float() + residual_P
    y_P = y_P.reshape(-1)
    live_P = _live(frozen_P, x_P.shape)
    y_L = y_P if live_P is None else y_P[live_P]
    if not bool(y_L.isfinite().all()):
        bad_P = ~y_P.isfinite() if live_P is None else ~y_P.isfinite() & live_P
        first = int(bad_P.nonzero()[0])
        raise ValueError(
            f"quantize: x_P + residual_P must be finite, element {first} is {float(y_P[first])}"
        )
    scale_G = _scales(_blocks(y_L.abs(), form.block).amax(dim=1), form)
    scale_L = scale_G.float().repeat_interleave(form.block)[: y_L.numel()]
    ratio_L = torch.where(scale_L > 0, y_L / scale_L, 0)
    if rounding == "nearest":
        q_L = ratio_L.round()
    else:
        u_P = philox.uniform(x_P.numel(), seed, step, device=x_P.device)
        q_L = (ratio_L + (u_P if live_P is None else u_P[live_P])).floor()
    q_L = q_L.clamp(-form.qmax, form.qmax)
    if residual_P is None:
        return _pack(q_L, form), scale_G, y_L.new_empty(0)
    left_L = y_L - q_L * scale_L
    left_P = left_L if live_P is None else torch.zeros_like(y_P).masked_scatter_(live_P, left_L)
    return _pack(q_L, form), scale_G, left_P.view(x_P.shape)


def _decode(name: str, code: Tensor, scale: Tensor, form: Format, num_live: int) -> Tensor:
    """q * scale of the live elements, float32."""
    _check_sizes(name, code, scale, form, num_live)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError(f"{name}: scale must be finite and not negative")
    scale_L = scale.float().repeat_interleave(form.block)[:num_live]
    return _unpack(code, num_live, form) * scale_L


def dequantize_reference(
    code: Tensor,
    scale: Tensor,
    numel: int,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
) -> Tensor:
    form = _check_dequantize(code, scale, frozen_P, numel, format)
    if frozen_P is None:
        return _decode("dequantize", code, scale, form, numel)
    live_P = ~frozen_P.reshape(-1)
    value_L = _decode("dequantize", code, scale, form, int(live_P.sum()))
    return value_L.new_zeros(numel).masked_scatter_(live_P, value_L)


def _check_dequantize(
    code: Tensor, scale: Tensor, frozen_P: Tensor | None, numel: int, format: str
) -> Format:
    form = _format("dequantize", format)
    _check_code("dequantize", code, scale, form)
    if numel < 0:
        raise ValueError(f"dequantize: numel must not be negative, got {numel}")
    if frozen_P is not None:
        if frozen_P.dtype != torch.bool:
            raise ValueError(f"dequantize: frozen_P must be bool, got {frozen_P.dtype}")
        if frozen_P.numel() != numel:
            raise ValueError(
                f"dequantize: frozen_P must have numel={numel} elements, got {frozen_P.numel()}"
            )
    return form


def dequantize_add_reference_(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    weight: float = 1.0,
) -> None:
    form = _check_dequantize_add(acc_P, code, scale, frozen_P, format)
    live_P = _live(frozen_P, acc_P.shape)
    num_live = acc_P.numel() if live_P is None else int(live_P.sum())
    value_L = _decode("dequantize_add_", code, scale, form, num_live) * weight
    flat_P = acc_P.view(-1)
    if live_P is None:
        flat_P.add_(value_L)
    else:
        flat_P.masked_scatter_(live_P, flat_P[live_P] + value_L)


def _check_dequantize_add(
    acc_P: Tensor, code: Tensor, scale: Tensor, frozen_P: Tensor | None, format: str
) -> Format:
    form = _format("dequantize_add_", format)
    _check_code("dequantize_add_", code, scale, form)
    if acc_P.dtype != float32:
        raise ValueError(f"dequantize_add_: acc_P must be float32, got {acc_P.dtype}")
    if not acc_P.is_contiguous():
        raise ValueError(
            f"dequantize_add_: acc_P must be contiguous, got strides {acc_P.stride()} for shape "
            f"{tuple(acc_P.shape)}"
        )
    if frozen_P is not None:
        check_frozen("dequantize_add_: frozen_P", frozen_P, "acc_P", acc_P.shape)
    return form


def _quantize_fake(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    form = _check_quantize(x_P, residual_P, frozen_P, format, rounding)
    num_live = x_P.numel()
    if frozen_P is not None:
        num_live = cast(int, torch.library.get_ctx().new_dynamic_size())
    return (
        x_P.new_empty(form.code_bytes(num_live), dtype=torch.uint8),
        x_P.new_empty(form.num_scales(num_live), dtype=form.scale_dtype),
        x_P.new_empty(0 if residual_P is None else x_P.shape, dtype=float32),
    )


def _dequantize_fake(
    code: Tensor,
    scale: Tensor,
    numel: int,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    backend: str | None = None,
) -> Tensor:
    _check_dequantize(code, scale, frozen_P, numel, format)
    return code.new_empty(numel, dtype=float32)


def _dequantize_add_fake(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    weight: float = 1.0,
    backend: str | None = None,
) -> None:
    _check_dequantize_add(acc_P, code, scale, frozen_P, format)


def _quantize_cost(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
) -> Cost:
    """Work with every element live: the number of frozen ones would cost a pass or a sync."""
    P, form = x_P.numel(), FORMATS[format]
    moved = P * x_P.element_size() + _wire_bytes(P, form)
    moved += 0 if residual_P is None else 8 * P
    moved += 0 if frozen_P is None else frozen_P.numel()
    return Cost(P, moved, P * (2 if residual_P is None else 5))


def _wire_bytes(num_live: int, form: Format) -> int:
    return form.code_bytes(num_live) + form.num_scales(num_live) * form.scale_dtype.itemsize


def _dequantize_cost(
    code: Tensor,
    scale: Tensor,
    numel: int,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
) -> Cost:
    moved = code.numel() + scale.numel() * scale.element_size() + 4 * numel
    moved += 0 if frozen_P is None else frozen_P.numel()
    return Cost(numel, moved, code.numel() * 8 // FORMATS[format].bits)


def _dequantize_add_cost(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",
    weight: float = 1.0,
) -> Cost:
    num_live = min(acc_P.numel(), code.numel() * 8 // FORMATS[format].bits)
    moved = code.numel() + scale.numel() * scale.element_size() + 8 * num_live
    moved += 0 if frozen_P is None else frozen_P.numel()
    return Cost(num_live, moved, 3 * num_live)


def _check_quantize_call(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str,
    rounding: str,
    seed: int,
    step: int,
) -> None:
    _check_quantize(x_P, residual_P, frozen_P, format, rounding)


def _check_trusted_sizes(
    name: str, code: Tensor, scale: Tensor, form: Format, numel: int, masked: bool
) -> None:
    """What can be checked without counting a mask's live elements."""
    if not masked:
        _check_sizes(name, code, scale, form, numel)
        return
    most = code.numel() * 8 // form.bits
    if most - numel >= 8 // form.bits or scale.numel() not in (
        form.num_scales(most),
        form.num_scales(max(0, most - 8 // form.bits + 1)),
    ):
        raise ValueError(
            f"{name}: {numel} elements and their mask cannot have {code.numel()} code bytes and "
            f"{scale.numel()} scales"
        )


def _check_dequantize_call(
    code: Tensor, scale: Tensor, numel: int, frozen_P: Tensor | None = None, *, format: str
) -> None:
    form = _check_dequantize(code, scale, frozen_P, numel, format)
    _check_trusted_sizes("dequantize", code, scale, form, numel, frozen_P is not None)


def _check_dequantize_add_call(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str,
    weight: float,
) -> None:
    form = _check_dequantize_add(acc_P, code, scale, frozen_P, format)
    masked = frozen_P is not None
    _check_trusted_sizes("dequantize_add_", code, scale, form, acc_P.numel(), masked)


def _cuda_quantize(
    x_P: Tensor,
    residual_P: Tensor | None = None,
    frozen_P: Tensor | None = None,
    *,
    format: str,
    rounding: str,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize(x_P, residual_P, frozen_P, format, rounding)
    place_L = None if frozen_P is None else masks.places(frozen_P, x_P.shape)
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.gose_native.quantize_at(
        x_P, residual_P, place_L, format, rounding == "stochastic", seed, step
    )
    return outputs


def _cuda_decode(
    out_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None,
    form: Format,
    format: str,
    weight: float | None,
) -> None:
    place_L = None
    if frozen_P is not None:
        most = min(code.numel() * 8 // form.bits, scale.numel() * form.block)
        place_L = masks.places(frozen_P, out_P.shape, most)
    torch.ops.gose_native.dequantize_at(out_P, code, scale, place_L, format, weight)


def _cuda_dequantize(
    code: Tensor, scale: Tensor, numel: int, frozen_P: Tensor | None = None, *, format: str
) -> Tensor:
    _check_dequantize_call(code, scale, numel, frozen_P, format=format)
    make = code.new_empty if frozen_P is None else code.new_zeros
    out_P = make(numel, dtype=float32)
    flat_P = None if frozen_P is None else frozen_P.reshape(-1)
    _cuda_decode(out_P, code, scale, flat_P, FORMATS[format], format, None)
    return out_P


def _cuda_dequantize_add_(
    acc_P: Tensor,
    code: Tensor,
    scale: Tensor,
    frozen_P: Tensor | None = None,
    *,
    format: str,
    weight: float,
) -> None:
    _check_dequantize_add_call(acc_P, code, scale, frozen_P, format=format, weight=weight)
    _cuda_decode(acc_P, code, scale, frozen_P, FORMATS[format], format, weight)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 600, device=device, dtype=dtype),)


def _code_example(device: torch.device) -> tuple[Tensor, Tensor]:
    code = torch.ones(512, device=device, dtype=torch.uint8)
    return code, torch.ones(2, device=device, dtype=float32)


def _dequantize_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    return *_code_example(device), 512


def _dequantize_add_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.zeros(512, device=device, dtype=float32), *_code_example(device)


quantize = register(
    "quantize(Tensor x_P, Tensor? residual_P=None, Tensor? frozen_P=None, *, "
    "str format='int8_b256_f32', str rounding='nearest', int seed=0, int step=0, "
    "str? backend=None) -> (Tensor, Tensor, Tensor)",
    native("cuda", _cuda_quantize),
    triton("quantize", "quantize", check=_check_quantize_call),
    native("cpu", "quantize"),
    reference(quantize_reference),
    fake=_quantize_fake,
    cost=_quantize_cost,
    example=_example,
)

dequantize = register(
    "dequantize(Tensor code, Tensor scale, int numel, Tensor? frozen_P=None, *, "
    "str format='int8_b256_f32', str? backend=None) -> Tensor",
    native("cuda", _cuda_dequantize),
    triton("quantize", "dequantize", check=_check_dequantize_call),
    native("cpu", "dequantize"),
    reference(dequantize_reference),
    fake=_dequantize_fake,
    cost=_dequantize_cost,
    example=_dequantize_example,
)

dequantize_add_ = register(
    "dequantize_add_(Tensor(a!) acc_P, Tensor code, Tensor scale, Tensor? frozen_P=None, *, "
    "str format='int8_b256_f32', float weight=1.0, str? backend=None) -> ()",
    native("cuda", _cuda_dequantize_add_, writes=(0,)),
    triton("quantize", "dequantize_add_", check=_check_dequantize_add_call, writes=(0,)),
    native("cpu", "dequantize_add_", writes=(0,)),
    reference(dequantize_add_reference_),
    fake=_dequantize_add_fake,
    cost=_dequantize_add_cost,
    example=_dequantize_add_example,
)
