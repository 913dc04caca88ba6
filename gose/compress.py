"""Packets: what a site sends, and what a receiver refuses.

A packet is a safetensors file in memory. Its tensors, one flat vector each:

    NAME.code, NAME.scale   a coded section: uint8 codes and scales as gk.quantize gives them
    NAME                    a plain section: float32

Its metadata has one key, `gose`, a JSON object of texts of fixed length:

    version "1", format (a key of gk.FORMATS, or "none" for float32 throughout), site and round (ten
    digits), spec (first eight bytes of the SHA-256 of the specification, hexadecimal), crc32 (of
    the fields before it, then of the tensors in the order of the specification, hexadecimal)

Sender and receiver derive the specification from what both know (graph, frozen masks, config), so
names, shapes and masks are never learned from a packet, and it has exactly one right length.
Everything is checked before anything is decoded: length, tensors, metadata, checksum, and that all
numbers are finite.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import gose_kernels as gk
from gose.models import Params

VERSION = 1


class Section(NamedTuple):
    """One vector of a packet. coded: in the packet's format; else float32 always."""

    name: str
    numel: int
    coded: bool


class Spec(NamedTuple):
    """What a packet must hold. format: a key of gk.FORMATS, or "none" for float32 throughout."""

    format: str
    sections: tuple[Section, ...]

    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell two specifications apart."""
        text = "\n".join([self.format, *(f"{s.name} {s.numel} {s.coded}" for s in self.sections)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_coded(self, section: Section) -> bool:
        """Whether the section travels as codes and scales."""
        return section.coded and self.format != "none"

    def layout(self) -> dict[str, tuple[torch.dtype, int]]:
        """Tensor name -> dtype and length, of every tensor of a packet."""
        tensors: dict[str, tuple[torch.dtype, int]] = {}
        for section in self.sections:
            if self.is_coded(section):
                form = gk.FORMATS[self.format]
                tensors[f"{section.name}.code"] = torch.uint8, form.code_bytes(section.numel)
                tensors[f"{section.name}.scale"] = (
                    form.scale_dtype,
                    form.num_scales(section.numel),
                )
            else:
                tensors[section.name] = torch.float32, section.numel
        return tensors

    @property
    def packet_bytes(self) -> int:
        """Exact length of a packet."""
        return _packet_bytes(self)

    @property
    def float32_bytes(self) -> int:
        """Length of the same packet without a codec."""
        return _packet_bytes(self._replace(format="none"))


@cache
def _packet_bytes(spec: Spec) -> int:
    zeros = {name: torch.zeros(n, dtype=dtype) for name, (dtype, n) in spec.layout().items()}
    return len(_sealed(spec, zeros, site=0, round_=0))


class Coded(NamedTuple):
    """A vector in a packed format, not decoded."""

    code: Tensor
    scale: Tensor
    numel: int
    format: str


Payload: TypeAlias = Coded | Tensor


class PacketError(ValueError):
    """A packet that is not what the receiver expects; nothing of it was decoded."""


class Packed(NamedTuple):
    """A packet, and the part of each coded vector that it lost (for the next one)."""

    packet: bytes
    residuals: dict[str, Tensor]


def pack(
    spec: Spec,
    values: Mapping[str, Tensor],
    *,
    site: int,
    round_: int,
    residuals: Mapping[str, Tensor] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> Packed:
    """The packet of `values`, one flat float32 vector per section.

    residuals: what earlier packets lost of each coded section, added before coding (error
    feedback); None: no feedback, nothing is kept. seed: of stochastic rounding, with `round_`.
    Raises ValueError for other sections than the specification's and for numbers not finite.
    """
    if set(values) != {section.name for section in spec.sections}:
        raise ValueError(
            f"compress.pack: values must be the sections {[s.name for s in spec.sections]}, "
            f"got {list(values)}"
        )
    tensors: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for section in spec.sections:
        vector = values[section.name]
        if vector.shape != (section.numel,) or vector.dtype != torch.float32:
            raise ValueError(
                f"compress.pack: section {section.name!r} must be float32 of shape "
                f"({section.numel},), got {vector.dtype} of shape {tuple(vector.shape)}"
            )
        if not bool(vector.isfinite().all()):
            raise ValueError(
                f"compress.pack: section {section.name!r} must be finite; the update diverged"
            )
        if not spec.is_coded(section):
            tensors[section.name] = vector.contiguous()
            continue
        before = None if residuals is None else residuals.get(section.name)
        if residuals is not None and before is None:
            before = torch.zeros_like(vector)
        code, scale, after = gk.quantize(
            vector,
            before,
            format=spec.format,
            rounding=rounding,
            seed=seed,
            step=round_,
        )
        tensors |= {f"{section.name}.code": code, f"{section.name}.scale": scale}
        if residuals is not None:
            kept[section.name] = after
    return Packed(_sealed(spec, tensors, site=site, round_=round_), kept)


def _fields(spec: Spec, site: int, round_: int) -> dict[str, str]:
    return {
        "version": str(VERSION),
        "format": spec.format,
        "site": f"{site:010d}",
        "round": f"{round_:010d}",
        "spec": spec.digest(),
    }


def _checksum(fields: Mapping[str, str], spec: Spec, tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(json.dumps(fields).encode())
    for name in spec.layout():
        crc = zlib.crc32(tensors[name].numpy().data, crc)
    return f"{crc:08x}"


def _sealed(spec: Spec, tensors: dict[str, Tensor], *, site: int, round_: int) -> bytes:
    fields = _fields(spec, site, round_)
    fields["crc32"] = _checksum(fields, spec, tensors)
    return safetensors.torch.save(tensors, metadata={"gose": json.dumps(fields)})


def unpack(packet: bytes, spec: Spec, *, site: int, round_: int) -> dict[str, Payload]:
    """The sections of a packet from `site` in `round_`, coded ones not yet decoded.

    Raises PacketError, naming what was wanted and what came, before anything is decoded.
    """
    if len(packet) != spec.packet_bytes:
        raise PacketError(
            f"packet of site {site}: must have {spec.packet_bytes} bytes, got {len(packet)}"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(packet)
        text = json.loads(packet[8 : 8 + int.from_bytes(packet[:8], "little")])
        fields = json.loads(text["__metadata__"]["gose"])
        came = {str(name): str(value) for name, value in fields.items()}
    except (
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise PacketError(f"packet of site {site}: is not a packet ({error})") from None
    layout = {name: (dtype, (n,)) for name, (dtype, n) in spec.layout().items()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != layout:
        raise PacketError(f"packet of site {site}: tensors must be {layout}, got {found}")
    wanted = _fields(spec, site, round_)
    wanted["crc32"] = _checksum({k: v for k, v in came.items() if k != "crc32"}, spec, tensors)
    for field, value in wanted.items():
        if came.get(field) != value:
            raise PacketError(
                f"packet of site {site}: {field} must be {value!r}, got {came.get(field)!r}"
            )
    return {section.name: _read_section(tensors, section, spec, site) for section in spec.sections}


def _read_section(
    tensors: Mapping[str, Tensor], section: Section, spec: Spec, site: int
) -> Payload:
    if not spec.is_coded(section):
        _expect_finite(tensors[section.name], section, site)
        return tensors[section.name]
    scale = tensors[f"{section.name}.scale"]
    _expect_finite(scale, section, site)
    if bool((scale < 0).any()):
        raise PacketError(f"packet of site {site}: section {section.name!r} has a negative scale")
    if bool((scale > gk.FORMATS[spec.format].max_scale).any()):
        raise PacketError(
            f"packet of site {site}: section {section.name!r} has a scale that decodes to infinity"
        )
    return Coded(tensors[f"{section.name}.code"], scale, section.numel, spec.format)


def _expect_finite(values: Tensor, section: Section, site: int) -> None:
    if not bool(values.isfinite().all()):
        raise PacketError(f"packet of site {site}: section {section.name!r} holds NaN or infinity")


def decode(payload: Payload) -> Tensor:
    """The float32 vector of a section."""
    return _decode(payload) if isinstance(payload, Coded) else payload


def add_(total_P: Tensor, payload: Payload, weight: float) -> None:
    """total += weight * decoded payload, without making the decoded vector."""
    if isinstance(payload, Coded):
        gk.dequantize_add_(
            total_P, payload.code, payload.scale, format=payload.format, weight=weight
        )
    else:
        total_P.add_(payload, alpha=weight)


def free_vectors(
    stages: Sequence[Params], frozen: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """All elements that may change as two flat vectors: those of matrices, those of biases."""
    parts: dict[str, list[Tensor]] = {"matrices": [], "biases": []}
    for params, masks in zip(stages, frozen, strict=True):
        for name, mask in masks.items():
            parts[_kind(mask)].append(params[name][~mask])
    return {kind: torch.cat(vectors) for kind, vectors in parts.items()}


def with_free_vectors(
    stages: Sequence[Params],
    frozen: Sequence[Mapping[str, Tensor]],
    vectors: Mapping[str, Tensor],
) -> list[dict[str, Tensor]]:
    """Copies of the stages with their free elements replaced; frozen ones keep their bits."""
    at = dict.fromkeys(vectors, 0)
    changed = []
    for params, masks in zip(stages, frozen, strict=True):
        stage = dict(params)
        for name, mask in masks.items():
            kind, count = _kind(mask), int((~mask).sum())
            stage[name] = params[name].clone()
            stage[name][~mask] = vectors[kind][at[kind] : at[kind] + count]
            at[kind] += count
        changed.append(stage)
    return changed


def spec_of(values: Mapping[str, Tensor], format_: str) -> Spec:
    """Matrices are coded, biases never: they are few, and a small error shifts a whole unit."""
    sections = (Section(key, len(v), key.startswith("matrices")) for key, v in values.items())
    return Spec(format_, tuple(sections))


def _kind(tensor: Tensor) -> str:
    return "matrices" if tensor.dim() > 1 else "biases"


def _decode(coded: Coded) -> Tensor:
    vector: Tensor = gk.dequantize(coded.code, coded.scale, numel=coded.numel, format=coded.format)
    return vector
