"""Packets and codes made to hurt: each is refused by name, decodes nothing, allocates little."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import gose_kernels as gk
from gose.compress import PacketError, Section, Spec, decode, pack, unpack

_SPECS = {
    name: Spec(name, (Section("matrices", 300, True), Section("biases", 6, False)))
    for name in ("none", *gk.FORMATS)
}
_VALUES = {"matrices": torch.linspace(-1, 1, 300), "biases": torch.ones(6)}
_SENT = {name: pack(spec, _VALUES, site=3, round_=5).packet for name, spec in _SPECS.items()}


def _header(packet: bytes) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(packet[8 : 8 + int.from_bytes(packet[:8], "little")])
    return parsed


def _with_header(packet: bytes, header: bytes) -> bytes:
    """The packet with another header of the same length, filled with blanks or cut."""
    length = int.from_bytes(packet[:8], "little")
    return packet[:8] + header[:length].ljust(length) + packet[8 + length :]


def _edited(packet: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    header = _header(packet)
    edit(header)
    return _with_header(packet, json.dumps(header, separators=(",", ":")).encode())


def _forged(packet: bytes, spec_: Spec, tensors: dict[str, Tensor], /, **changed: str) -> bytes:
    """The packet with other tensors or fields and a right checksum."""
    tensors = safetensors.torch.load(packet) | tensors
    fields = json.loads(_header(packet)["__metadata__"]["gose"]) | changed
    fields.pop("crc32")
    check = zlib.crc32(json.dumps(fields).encode())
    for name in spec_.layout():
        check = zlib.crc32(tensors[name].numpy().tobytes(), check)
    fields["crc32"] = f"{check:08x}"
    return safetensors.torch.save(tensors, metadata={"gose": json.dumps(fields)})


def _set(tensor: str, field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[tensor].update({field: value})


def _metadata(text: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update({"__metadata__": text})


def _packets() -> Iterator[tuple[str, str, bytes]]:
    """Name, format, packet."""
    for name, sent in _SENT.items():
        spec, size = _SPECS[name], len(sent)
        yield f"{name} empty", name, b""
        yield f"{name} one byte short", name, sent[:-1]
        yield f"{name} one byte long", name, sent + b"\0"
        yield f"{name} header only", name, sent[: 8 + int.from_bytes(sent[:8], "little")]
        yield f"{name} twice", name, sent * 2
        yield f"{name} zeros", name, bytes(size)
        yield f"{name} header length 2**64 - 1", name, b"\xff" * 8 + sent[8:]
        yield f"{name} header length past the end", name, size.to_bytes(8, "little") + sent[8:]
        yield f"{name} header length 0", name, bytes(8) + sent[8:]
        yield f"{name} blank header", name, _with_header(sent, b"")
        yield f"{name} not JSON", name, _with_header(sent, b"{" * size)
        yield f"{name} nested lists", name, _with_header(sent, b"[" * size)
        yield f"{name} no metadata", name, _edited(sent, lambda h: h.pop("__metadata__"))
        yield f"{name} metadata is a list", name, _edited(sent, _metadata([]))
        yield f"{name} metadata is empty", name, _edited(sent, _metadata({}))
        yield f"{name} fields are a number", name, _edited(sent, _metadata({"gose": "7"}))
        yield f"{name} fields are a list", name, _edited(sent, _metadata({"gose": "[]"}))
        yield f"{name} no fields", name, _edited(sent, _metadata({"gose": "{}"}))
        yield f"{name} a tensor less", name, _edited(sent, lambda h: h.pop("biases"))
        shapes = {"2**40 long": [2**40], "2**62 square": [2**62, 4], "negative": [-6]}
        shapes |= {"as a matrix": [2, 3], "without dimensions": [], "with a zero": [6, 0]}
        for text, shape in shapes.items():
            yield f"{name} biases {text}", name, _edited(sent, _set("biases", "shape", shape))
        for dtype in ("F64", "I32", "F8_E4M3", "XYZ"):
            yield f"{name} biases of {dtype}", name, _edited(sent, _set("biases", "dtype", dtype))
        for offsets in ([0, 2**50], [24, 0], [-24, 0], [1, 25]):
            edited = _edited(sent, _set("biases", "data_offsets", offsets))
            yield f"{name} biases at {offsets}", name, edited
        for value in (torch.nan, torch.inf, -torch.inf):
            changed = {"biases": torch.full((6,), value)}
            yield f"{name} biases {value}", name, _forged(sent, spec, changed)
        yield f"{name} another version", name, _forged(sent, spec, {}, version="9")
        yield f"{name} another site", name, _forged(sent, spec, {}, site="0000000004")
        yield f"{name} an old round", name, _forged(sent, spec, {}, round="0000000004")
        yield f"{name} another specification", name, _forged(sent, spec, {}, spec="0" * 16)
        if name == "none":
            continue
        dtype = gk.FORMATS[name].scale_dtype
        scale = safetensors.torch.load(sent)["matrices.scale"]
        for value in (torch.nan, torch.inf, -1.0):
            changed = {"matrices.scale": torch.full_like(scale, value)}
            yield f"{name} scale {value}", name, _forged(sent, spec, changed)
        if dtype == torch.float32:
            changed = {"matrices.scale": torch.full_like(scale, 3e38)}
            yield f"{name} scale that overflows", name, _forged(sent, spec, changed)
        other = "int8_b64_f16" if name != "int8_b64_f16" else "int4_b64_f16"
        yield f"{name} sent as {other}", name, _SENT[other]
        yield f"{name} named {other}", name, _forged(sent, spec, {}, format=other)


_PACKETS = list(_packets())


def test_there_are_many_and_their_names_differ():
    assert len(_PACKETS) >= 60
    assert len({name for name, _, _ in _PACKETS}) == len(_PACKETS)


@pytest.mark.parametrize(("name", "packet"), [pytest.param(f, p, id=n) for n, f, p in _PACKETS])
def test_hostile_packets_are_refused_before_decoding(name, packet):
    assert decode(unpack(_SENT[name], _SPECS[name], site=3, round_=5)["biases"]).sum() == 6
    with (
        pytest.raises(PacketError, match="packet of site 3"),
        gk.profiling.record() as counts,
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        unpack(packet, _SPECS[name], site=3, round_=5)
    assert not counts.table, "nothing may be decoded"
    events = profile.profiler.kineto_results.events()
    taken = max([e.nbytes() for e in events if e.name() == "[memory]"], default=0)
    assert taken <= 2 * len(_SENT["none"]), "a lie may not size an allocation"


_CODE, _SCALE = torch.ones(300, dtype=torch.uint8), torch.ones(2)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((_CODE[:-1], _SCALE, 300), "300 live elements need 300 code bytes"),
        ((_CODE, _SCALE[:1], 300), "and 2 scales, got 300 and 1"),
        ((_CODE, _SCALE, 2**60), f"{2**60} live elements need"),
        ((_CODE, _SCALE, -1), "numel must not be negative"),
        ((_CODE, _SCALE * torch.nan, 300), "scale must be finite and not negative"),
        ((_CODE, _SCALE * torch.inf, 300), "scale must be finite and not negative"),
        ((_CODE, -_SCALE, 300), "scale must be finite and not negative"),
        ((_CODE, _SCALE.half(), 300), "scale must be torch.float32, got torch.float16"),
        ((_CODE.char(), _SCALE, 300), "code must be torch.uint8"),
        ((_CODE[:, None], _SCALE, 300), "code must have 1 dimension"),
        ((_CODE, _SCALE, 300, torch.zeros(299).bool()), "frozen_P must have numel=300"),
        ((_CODE, _SCALE, 300, torch.ones(300).bool()), "0 live elements need 0 code bytes"),
        ((_CODE, _SCALE, 300, torch.zeros(300)), "frozen_P must be bool"),
    ],
)
def test_codes_that_lie_are_refused(args, message, backend):
    with pytest.raises(ValueError, match=f"dequantize: .*{message}"):
        gk.dequantize(*args, backend=backend)


def _mutated(source: random.Random, packet: bytes) -> bytes:
    """Bits flipped, bytes overwritten, parts moved; mostly of the right length."""
    data = bytearray(packet)
    for _ in range(source.randint(1, 4)):
        if len(data) < 16:
            break
        at, kind = source.randrange(len(data)), source.randrange(6)
        if kind == 0:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[at : at + 4] = source.randbytes(min(4, len(data) - at))
        elif kind == 2:
            other = source.randrange(len(data))
            data[at : at + 16], data[other : other + 16] = (
                data[other : other + 16],
                data[at : at + 16],
            )
            del data[len(packet) :]
        elif kind == 3:
            digit = data.find(b"0123456789"[source.randrange(10)], at)
            if digit >= 0:
                data[digit] = source.choice(b"0123456789-")
        elif kind == 4:
            data[8 + source.randrange(min(len(data) - 8, 200))] = source.choice(b'{}[]",:0 \\')
        else:
            data[at:] = data[at:][: source.randint(0, 40) or None]
    return bytes(data)


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """(refused, accepted) of mutated packets; what is accepted decodes to finite numbers."""
    source, refused, accepted = random.Random(seed), 0, 0
    names = list(_SENT)
    for index in range(count):
        name = names[index % len(names)]
        try:
            found = unpack(_mutated(source, _SENT[name]), _SPECS[name], site=3, round_=5)
        except PacketError:
            refused += 1
            continue
        accepted += 1
        assert all(bool(decode(payload).isfinite().all()) for payload in found.values())
    return refused, accepted


def test_mutated_packets_are_refused_or_decode():
    refused, accepted = fuzz(5_000, 0)
    assert refused + accepted == 5_000
    assert refused > 4_000
