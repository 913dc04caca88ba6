from __future__ import annotations

import json
import re
import zlib

import pytest
import safetensors.torch
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
_BYTES = {  # of the tensors of 1000 coded and 10 plain numbers
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
    header_bytes = 8 + int.from_bytes(packet[:8], "little")
    assert len(packet) == spec.packet_bytes == header_bytes + _BYTES[format_]
    assert len(pack(spec, values, site=2**31, round_=10**9).packet) == spec.packet_bytes
    assert spec.float32_bytes == len(pack(_spec("none"), values, site=0, round_=0).packet)
    assert header_bytes < 600
    tensors = safetensors.torch.load(packet)
    assert {name: (t.dtype, len(t)) for name, t in tensors.items()} == spec.layout()
    assert torch.equal(tensors["biases"], values["biases"])
    fields = _fields_of(packet)
    assert (fields["site"], fields["round"], fields["format"]) == (
        "0000000002",
        "0000000007",
        format_,
    )
    crc = fields.pop("crc32")
    check = zlib.crc32(json.dumps(fields).encode())
    for name in spec.layout():
        check = zlib.crc32(tensors[name].numpy().tobytes(), check)
    assert crc == f"{check:08x}"
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


def _fields_of(packet: bytes) -> dict[str, str]:
    header = json.loads(packet[8 : 8 + int.from_bytes(packet[:8], "little")])
    return json.loads(header["__metadata__"]["gose"])


def _forged(packet: bytes, spec_: Spec, tensors=None, /, **changed: str) -> bytes:
    """The packet with other fields or tensors and a right checksum."""
    tensors = safetensors.torch.load(packet) | (tensors or {})
    fields = {k: v for k, v in _fields_of(packet).items() if k != "crc32"} | changed
    check = zlib.crc32(json.dumps(fields).encode())
    for name in spec_.layout():
        check = zlib.crc32(tensors[name].numpy().tobytes(), check)
    fields["crc32"] = f"{check:08x}"
    return safetensors.torch.save(tensors, metadata={"gose": json.dumps(fields)})


def _nested(length: int) -> bytes:
    """A safetensors file of this length whose only content is lists in lists in lists."""
    start, end = b'{"__metadata__":{"gose":"', b'"}}'
    header = start + b"[" * (length - 8 - len(start) - len(end)) + end
    return len(header).to_bytes(8, "little") + header


_SPEC = _spec("int8_b256_f32")
_SENT = pack(_SPEC, _values(), site=3, round_=5).packet
_SCALE = torch.ones(4)
_HUGE = torch.full((4,), 3e38)
_NAN = torch.tensor([1.0, 1.0, torch.nan, 1.0])


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (_SENT[:-1], f"packet of site 3: must have {len(_SENT)} bytes, got {len(_SENT) - 1}"),
        (_SENT + b"\0", f"must have {len(_SENT)} bytes, got {len(_SENT) + 1}"),
        (b"", f"must have {len(_SENT)} bytes, got 0"),
        (bytes(len(_SENT)), "is not a packet"),
        (b"\xff" * len(_SENT), "is not a packet"),
        (_SENT.replace(b"gose", b"goat"), "is not a packet ('gose')"),
        (_SENT.replace(b"biases", b"basics"), "tensors must be"),
        (_SENT.replace(b"[10]", b"[5] "), "is not a packet"),
        (_SENT.replace(b'"F32","shape":[10]', b'"I32","shape":[10]'), "tensors must be"),
        (_forged(_SENT, _SPEC, version="2"), "version must be '1', got '2'"),
        (_forged(_SENT, _SPEC, format="int8_b256_f16"), "format must be 'int8_b256_f32', got"),
        (_forged(_SENT, _SPEC, site="0000000001"), "site must be '0000000003', got '0000000001'"),
        (_forged(_SENT, _SPEC, round="0000000001"), "round must be '0000000005', got"),
        (_forged(_SENT, _SPEC, spec="0" * 16), "spec must be"),
        (_SENT[:-500] + bytes([_SENT[-500] ^ 1]) + _SENT[-499:], "crc32 must be"),
        (_forged(_SENT, _SPEC, {"matrices.scale": _NAN}), "section 'matrices' holds NaN or inf"),
        (_forged(_SENT, _SPEC, {"matrices.scale": -_SCALE}), "has a negative scale"),
        (_forged(_SENT, _SPEC, {"matrices.scale": _HUGE}), "a scale that decodes to infinity"),
        (_nested(len(_SENT)), "is not a packet (maximum recursion"),
        (_forged(_SENT, _SPEC, {"biases": torch.full((10,), torch.inf)}), "'biases' holds NaN or"),
    ],
)
def test_damaged_packets_are_refused_before_decoding(packet, message):
    unpack(_SENT, _SPEC, site=3, round_=5)
    with pytest.raises(PacketError, match=re.escape(message)), gk.profiling.record() as counts:
        unpack(packet, _SPEC, site=3, round_=5)
    assert not counts.table, "nothing may be decoded"


@pytest.mark.matrix(keep=60)
@pytest.mark.parametrize("at", range(0, len(_SENT), 7))
def test_no_flipped_bit_goes_unseen(at):
    """In header, metadata or data: the packet is refused, or decodes to the same numbers."""
    damaged = _SENT[:at] + bytes([_SENT[at] ^ 4]) + _SENT[at + 1 :]
    try:
        found = unpack(damaged, _SPEC, site=3, round_=5)
    except PacketError:
        return
    for name, payload in unpack(_SENT, _SPEC, site=3, round_=5).items():
        assert torch.equal(decode(found[name]), decode(payload))


def test_another_specification_of_the_same_length_is_refused():
    mine = Spec("none", (Section("a", 4, False), Section("b", 6, False)))
    theirs = Spec("none", (Section("a", 6, False), Section("b", 4, False)))
    packet = pack(theirs, {"a": torch.ones(6), "b": torch.ones(4)}, site=0, round_=0).packet
    assert len(packet) == mine.packet_bytes
    with pytest.raises(PacketError, match="tensors must be"):
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
