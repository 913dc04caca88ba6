from __future__ import annotations

import re
import struct
import zlib

import pytest
import torch

import gose_kernels as gk
from gose.compress import (
    Coded,
    PacketError,
    Section,
    Spec,
    add_,
    decode,
    free_vectors,
    pack,
    spec_of,
    unpack,
    with_free_vectors,
)

_FORMATS = ["none", *gk.FORMATS]
_BYTES = {  # of 1000 coded and 10 plain numbers, without the 32 of the header
    "none": 4 * 1000 + 40,
    "int8_b256_f32": 1000 + 4 * 4 + 40,
    "int8_b64_f16": 1000 + 16 * 2 + 40,
    "int4_b64_f16": 500 + 16 * 2 + 40,
}


def _spec(format_: str) -> Spec:
    return Spec(format_, (Section("matrices", 1000, True), Section("biases", 10, False)))


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrices": torch.randn(1000, generator=generator),
        "biases": torch.randn(10, generator=generator),
    }


@pytest.mark.parametrize("format_", _FORMATS)
def test_packets_have_the_stated_bytes_and_come_back(format_):
    spec, values = _spec(format_), _values()
    packet = pack(spec, values, site=2, round_=7).packet
    assert len(packet) == spec.packet_bytes == 32 + _BYTES[format_]
    assert spec.float32_bytes == 32 + 4040
    assert packet[:8] == b"GoSE" + struct.pack("<HH", 1, _FORMATS.index(format_))
    assert struct.unpack_from("<II", packet, 8) == (2, 7)
    assert struct.unpack_from("<I", packet, 28)[0] == zlib.crc32(
        packet[32:], zlib.crc32(packet[:28])
    )
    sections = unpack(packet, spec, site=2, round_=7)
    assert torch.equal(decode(sections["biases"]), values["biases"])
    if format_ == "none":
        assert torch.equal(decode(sections["matrices"]), values["matrices"])
    else:
        code, scale, _ = gk.quantize(values["matrices"], format=format_)
        truth = gk.dequantize(code, scale, numel=1000, format=format_)
        assert torch.equal(decode(sections["matrices"]), truth)


def test_add_is_decode_times_weight():
    sections = unpack(
        pack(_spec("int8_b256_f32"), _values(), site=0, round_=0).packet,
        _spec("int8_b256_f32"),
        site=0,
        round_=0,
    )
    for name, payload in sections.items():
        total = torch.ones(len(_values()[name]))
        add_(total, payload, 0.25)
        torch.testing.assert_close(total, 1 + 0.25 * decode(payload))


def test_error_feedback_sends_later_what_a_packet_lost():
    spec, values = _spec("int4_b64_f16"), _values()
    residuals, sent = {}, torch.zeros(1000)
    for round_ in range(30):
        packed = pack(spec, values, site=0, round_=round_, residuals=residuals)
        residuals = packed.residuals
        sent += decode(unpack(packed.packet, spec, site=0, round_=round_)["matrices"])
    torch.testing.assert_close(sent + residuals["matrices"], 30 * values["matrices"])
    once = decode(
        unpack(pack(spec, values, site=0, round_=0).packet, spec, site=0, round_=0)["matrices"]
    )
    without = (once - values["matrices"]).abs().mean()
    assert (sent / 30 - values["matrices"]).abs().mean() < 0.1 * without
    assert pack(spec, values, site=0, round_=0).residuals == {}


def _resealed(packet: bytes, at: int, piece: bytes) -> bytes:
    """The packet with other bytes at a place and a right checksum."""
    changed = packet[:at] + piece + packet[at + len(piece) :]
    checksum = zlib.crc32(changed[32:], zlib.crc32(changed[:28]))
    return changed[:28] + struct.pack("<I", checksum) + changed[32:]


_NAN = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p[:-1], "packet of site 3: must have 1088 bytes, got 1087"),
        (lambda p: p + b"\0", "must have 1088 bytes, got 1089"),
        (lambda p: b"", "must have 1088 bytes, got 0"),
        (lambda p: _resealed(p, 0, b"EVIL"), "magic must be b'GoSE', got b'EVIL'"),
        (lambda p: _resealed(p, 4, b"\2\0"), "version must be 1, got 2"),
        (lambda p: _resealed(p, 6, b"\2\0"), "format must be 1, got 2"),
        (lambda p: _resealed(p, 8, b"\1\0\0\0"), "site must be 3, got 1"),
        (lambda p: _resealed(p, 12, b"\1\0\0\0"), "round must be 5, got 1"),
        (lambda p: _resealed(p, 16, b"\0" * 8), "specification must be"),
        (lambda p: _resealed(p, 24, b"\0\0\0\1"), "payload bytes must be 1056, got 16777216"),
        (lambda p: p[:500] + bytes([p[500] ^ 1]) + p[501:], "the checksum does not fit"),
        (lambda p: _resealed(p, 32 + 1000, _NAN), "section 'matrices' holds NaN or infinity"),
        (lambda p: _resealed(p, 32 + 1000, struct.pack("<f", -1)), "has a negative scale"),
        (lambda p: _resealed(p, 32 + 1016, _NAN), "section 'biases' holds NaN or infinity"),
    ],
)
def test_damaged_packets_are_refused_before_decoding(damage, message):
    spec = _spec("int8_b256_f32")
    packet = pack(spec, _values(), site=3, round_=5).packet
    unpack(packet, spec, site=3, round_=5)
    with pytest.raises(PacketError, match=re.escape(message)), gk.profiling.record() as counts:
        unpack(damage(packet), spec, site=3, round_=5)
    assert not counts.table, "nothing may be decoded"


def test_another_specification_of_the_same_length_is_refused():
    mine = Spec("none", (Section("a", 4, False), Section("b", 6, False)))
    theirs = Spec("none", (Section("a", 6, False), Section("b", 4, False)))
    packet = pack(theirs, {"a": torch.ones(6), "b": torch.ones(4)}, site=0, round_=0).packet
    assert len(packet) == mine.packet_bytes
    with pytest.raises(PacketError, match="specification must be"):
        unpack(packet, mine, site=0, round_=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": torch.full((10,), float("nan"))}, "section 'biases' must be finite"),
        ({"matrices": torch.full((1000,), torch.inf)}, "section 'matrices' must be finite"),
        ({"matrices": torch.ones(999)}, "must be float32 of shape (1000,), got"),
        ({"biases": torch.ones(10).double()}, "got torch.float64"),
        ({"more": torch.ones(1)}, "values must be the sections ['matrices', 'biases']"),
    ],
)
def test_pack_refuses_what_it_cannot_send(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(_spec("int8_b256_f32"), _values() | change, site=0, round_=0)


def test_frozen_elements_are_never_sent_and_keep_their_bits():
    generator = torch.Generator().manual_seed(1)
    stages = [
        {"w": torch.randn(5, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    ]
    frozen = [
        {name: torch.rand(t.shape, generator=generator) < 0.4 for name, t in stages[0].items()}
    ]
    stages[0]["w"][frozen[0]["w"]] = torch.nan  # must never be looked at
    vectors = free_vectors(stages, frozen)
    assert {name: len(v) for name, v in vectors.items()} == {
        "matrices": int((~frozen[0]["w"]).sum()),
        "biases": int((~frozen[0]["b"]).sum()),
    }
    assert all(v.isfinite().all() for v in vectors.values())
    assert [s.coded for s in spec_of(vectors, "int8_b256_f32").sections] == [True, False]
    (changed,) = with_free_vectors(stages, frozen, {k: v + 1 for k, v in vectors.items()})
    for name, mask in frozen[0].items():
        assert changed[name][mask].numpy().tobytes() == stages[0][name][mask].numpy().tobytes()
        assert torch.equal(changed[name][~mask], stages[0][name][~mask] + 1)


def test_coded_is_what_the_ledger_counts():
    packet = pack(_spec("int8_b256_f32"), _values(), site=0, round_=0).packet
    section = unpack(packet, _spec("int8_b256_f32"), site=0, round_=0)["matrices"]
    assert isinstance(section, Coded)
    assert section.code.nbytes + section.scale.nbytes == 1016
