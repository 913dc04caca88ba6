"""Packets and codes made to hurt: each is refused by name, decodes nothing, allocates little."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

import gose_kernels as gk
from gose.compress import PacketError, decode, unpack
from tests import fuzz
from tests.fuzz import SENT, SPECS, forged, header_of, with_header


def _edited(packet: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    header = header_of(packet)
    edit(header)
    return with_header(packet, json.dumps(header, separators=(",", ":")).encode())


def _set(tensor: str, field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[tensor].update({field: value})


def _metadata(text: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update({"__metadata__": text})


def _packets() -> Iterator[tuple[str, str, bytes]]:
    """Name, format, packet."""
    for name, sent in SENT.items():
        spec, size = SPECS[name], len(sent)
        yield f"{name} empty", name, b""
        yield f"{name} one byte short", name, sent[:-1]
        yield f"{name} one byte long", name, sent + b"\0"
        yield f"{name} header only", name, sent[: 8 + int.from_bytes(sent[:8], "little")]
        yield f"{name} twice", name, sent * 2
        yield f"{name} zeros", name, bytes(size)
        yield f"{name} header length 2**64 - 1", name, b"\xff" * 8 + sent[8:]
        yield f"{name} header length past the end", name, size.to_bytes(8, "little") + sent[8:]
        yield f"{name} header length 0", name, bytes(8) + sent[8:]
        yield f"{name} blank header", name, with_header(sent, b"")
        yield f"{name} not JSON", name, with_header(sent, b"{" * size)
        yield f"{name} nested lists", name, with_header(sent, b"[" * size)
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
            yield f"{name} biases {value}", name, forged(sent, spec, changed)
        yield f"{name} another version", name, forged(sent, spec, {}, version="9")
        yield f"{name} another site", name, forged(sent, spec, {}, site="0000000004")
        yield f"{name} an old round", name, forged(sent, spec, {}, round="0000000004")
        yield f"{name} another specification", name, forged(sent, spec, {}, spec="0" * 16)
        if name == "none":
            continue
        dtype = gk.FORMATS[name].scale_dtype
        scale = safetensors.torch.load(sent)["matrices.scale"]
        for value in (torch.nan, torch.inf, -1.0):
            changed = {"matrices.scale": torch.full_like(scale, value)}
            yield f"{name} scale {value}", name, forged(sent, spec, changed)
        if dtype == torch.float32:
            changed = {"matrices.scale": torch.full_like(scale, 3e38)}
            yield f"{name} scale that overflows", name, forged(sent, spec, changed)
        other = "int8_b64_f16" if name != "int8_b64_f16" else "int4_b64_f16"
        yield f"{name} sent as {other}", name, SENT[other]
        yield f"{name} named {other}", name, forged(sent, spec, {}, format=other)


_PACKETS = list(_packets())


def test_there_are_many_and_their_names_differ():
    assert len(_PACKETS) >= 60
    assert len({name for name, _, _ in _PACKETS}) == len(_PACKETS)


@pytest.mark.parametrize(("name", "packet"), [pytest.param(f, p, id=n) for n, f, p in _PACKETS])
def test_hostile_packets_are_refused_before_decoding(name, packet):
    assert decode(unpack(SENT[name], SPECS[name], site=3, round_=5)["biases"]).sum() == 6
    with (
        pytest.raises(PacketError, match="packet of site 3"),
        gk.profiling.record() as counts,
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        unpack(packet, SPECS[name], site=3, round_=5)
    assert not counts.table, "nothing may be decoded"
    events = profile.profiler.kineto_results.events()
    taken = max([e.nbytes() for e in events if e.name() == "[memory]"], default=0)
    assert taken <= 2 * len(SENT["none"]), "a lie may not size an allocation"


_CODE, _SCALE = torch.ones(300, dtype=torch.uint8), torch.ones(2)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((_CODE[:-1], _SCALE, 300), "300 live elements need 300 code bytes"),
        ((_CODE, _SCALE[:1], 300), "and 2 scales, got 300 and 1"),
        ((_CODE, _SCALE, 2**60), f"{2**60} live elements need"),
        ((_CODE[:0], _SCALE, 2**62), f"{2**62} live elements need {2**62} code bytes and {2**54}"),
        ((_CODE[:0], _SCALE, 2**63 - 1), f"elements need {2**63 - 1} code bytes and {2**55} scale"),
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


def test_broken_inputs_are_refused_or_decode_to_the_right_numbers():
    found = fuzz.fuzz(6_000, seed=0)
    assert sum(found.values()) == 6_000
    assert min(found.values()) > 100, "every kind is met"


def test_the_same_input_again():
    assert fuzz.fuzz(50, seed=7) == fuzz.fuzz(50, seed=7)
    assert fuzz.fuzz(50, seed=7) == fuzz.fuzz(20, seed=7) + fuzz.fuzz(30, seed=7, first=20)
