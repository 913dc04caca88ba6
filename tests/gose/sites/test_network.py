from __future__ import annotations

import pytest
import torch

from gose.compress import PacketError, Section, Spec, decode, pack
from gose.sites import exchange

_SPEC = Spec("int8_b256_f32", (Section("matrices", 600, True), Section("biases", 3, False)))


def _packets(num: int) -> dict[int, bytes]:
    return {
        site: pack(
            _SPEC,
            {"matrices": torch.full((600,), float(site)), "biases": torch.ones(3) * site},
            site=site,
            round_=4,
        ).packet
        for site in range(num)
    }


def test_every_site_sends_its_packet_to_every_other():
    packets = _packets(3)
    delivered = exchange(packets, _SPEC, round_=4)
    assert delivered.bytes_sent == 3 * 2 * len(packets[0]) == 3 * 2 * _SPEC.packet_bytes
    assert delivered.bytes_float32 == 3 * 2 * _SPEC.float32_bytes
    for site, sections in delivered.received.items():
        torch.testing.assert_close(decode(sections["matrices"]), torch.full((600,), float(site)))
        assert decode(sections["biases"]).tolist() == [site] * 3


def test_a_packet_of_another_site_or_round_is_refused():
    packets = _packets(2)
    with pytest.raises(PacketError, match="site 0: site must be '0000000000', got '0000000001'"):
        exchange({0: packets[1], 1: packets[0]}, _SPEC, round_=4)
    with pytest.raises(PacketError, match="round must be '0000000005', got '0000000004'"):
        exchange(packets, _SPEC, round_=5)
