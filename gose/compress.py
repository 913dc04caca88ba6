"""Packets: what a site sends, byte for byte, and what a receiver refuses.

    offset  bytes  field, little endian
    0       4      magic "GoSE"
    4       2      version 1
    6       2      format: 0 float32, else 1 + place in gk.FORMATS
    8       4      site
    12      4      round
    16      8      first bytes of the SHA-256 of the specification
    24      4      payload bytes
    28      4      CRC-32 of everything before this field, then of the payload
    32      -      payload: the sections in order; coded: codes, then scales; else float32 values

Sender and receiver derive the specification from what both know (graph, frozen masks, config), so
names, shapes and masks never travel, and a packet has exactly one right length. Everything is
checked before anything is decoded: length, header, checksum, and that all numbers are finite. No
pickle anywhere.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

import gose_kernels as gk
from gose.models import Params

VERSION = 1
HEADER_BYTES = 32
_HEADER = struct.Struct("<4sHHII8sI")  # without the checksum
_MAGIC = b"GoSE"


class Section(NamedTuple):
    """One vector of a packet. coded: in the packet's format; else float32 always."""

    name: str
    numel: int
    coded: bool


class Spec(NamedTuple):
    """What a packet must hold. format: a key of gk.FORMATS, or "none" for float32 throughout."""

    format: str
    sections: tuple[Section, ...]

    def digest(self) -> bytes:
        """Eight bytes that tell two specifications apart."""
        text = "\n".join([self.format, *(f"{s.name} {s.numel} {s.coded}" for s in self.sections)])
        return hashlib.sha256(text.encode()).digest()[:8]

    def section_bytes(self, section: Section) -> int:
        if section.coded and self.format != "none":
            form = gk.FORMATS[self.format]
            scale_bytes = form.num_scales(section.numel) * form.scale_dtype.itemsize
            return form.code_bytes(section.numel) + scale_bytes
        return 4 * section.numel

    @property
    def packet_bytes(self) -> int:
        """Exact length of a packet."""
        return HEADER_BYTES + sum(self.section_bytes(section) for section in self.sections)

    @property
    def float32_bytes(self) -> int:
        """Length of the same packet without a codec."""
        return self._replace(format="none").packet_bytes


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
    parts, kept = [], {}
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
        if not section.coded or spec.format == "none":
            parts.append(_bytes_of(vector))
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
        parts += [_bytes_of(code), _bytes_of(scale)]
        if residuals is not None:
            kept[section.name] = after
    payload = b"".join(parts)
    number = 0 if spec.format == "none" else 1 + list(gk.FORMATS).index(spec.format)
    header = _HEADER.pack(_MAGIC, VERSION, number, site, round_, spec.digest(), len(payload))
    checksum = zlib.crc32(payload, zlib.crc32(header))
    return Packed(header + struct.pack("<I", checksum) + payload, kept)


def unpack(packet: bytes, spec: Spec, *, site: int, round_: int) -> dict[str, Payload]:
    """The sections of a packet from `site` in `round_`, coded ones not yet decoded.

    Raises PacketError, naming what was wanted and what came, before anything is decoded.
    """
    if len(packet) != spec.packet_bytes:
        raise PacketError(
            f"packet of site {site}: must have {spec.packet_bytes} bytes, got {len(packet)}"
        )
    magic, version, number, sender, came_round, digest, length = _HEADER.unpack_from(packet)
    wanted_number = 0 if spec.format == "none" else 1 + list(gk.FORMATS).index(spec.format)
    fields: list[tuple[str, object, object]] = [
        ("magic", _MAGIC, magic),
        ("version", VERSION, version),
        ("format", wanted_number, number),
        ("site", site, sender),
        ("round", round_, came_round),
        ("specification", spec.digest().hex(), digest.hex()),
        ("payload bytes", len(packet) - HEADER_BYTES, length),
    ]
    for field, wanted, came in fields:
        if came != wanted:
            raise PacketError(f"packet of site {site}: {field} must be {wanted!r}, got {came!r}")
    header, stored = packet[: HEADER_BYTES - 4], packet[HEADER_BYTES - 4 : HEADER_BYTES]
    checksum = zlib.crc32(packet[HEADER_BYTES:], zlib.crc32(header))
    if struct.pack("<I", checksum) != stored:
        raise PacketError(f"packet of site {site}: the checksum does not fit; it was damaged")
    found: dict[str, Payload] = {}
    at = HEADER_BYTES
    for section in spec.sections:
        piece = packet[at : at + spec.section_bytes(section)]
        at += len(piece)
        found[section.name] = _read_section(piece, section, spec.format, site)
    return found


def _read_section(piece: bytes, section: Section, format_: str, site: int) -> Payload:
    if not section.coded or format_ == "none":
        values = _tensor_of(piece, torch.float32)
        _expect_finite(values, section, site)
        return values
    form = gk.FORMATS[format_]
    split = form.code_bytes(section.numel)
    code = _tensor_of(piece[:split], torch.uint8)
    scale = _tensor_of(piece[split:], form.scale_dtype)
    _expect_finite(scale, section, site)
    if bool((scale < 0).any()):
        raise PacketError(f"packet of site {site}: section {section.name!r} has a negative scale")
    return Coded(code, scale, section.numel, format_)


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


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _tensor_of(piece: bytes, dtype: torch.dtype) -> Tensor:
    # bytearray: torch wants writable memory
    return torch.frombuffer(bytearray(piece), dtype=dtype) if piece else torch.empty(0, dtype=dtype)
