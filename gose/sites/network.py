"""The wire in one process: every site sends its packet to every other site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gose.compress import Payload, Spec, unpack


class Exchange(NamedTuple):
    """What every site holds after a round, and what the round cost."""

    received: dict[int, dict[str, Payload]]  # sender -> checked sections
    bytes_sent: int  # over all edges of the complete graph, headers included
    bytes_float32: int  # the same without a codec


def exchange(packets: Mapping[int, bytes], spec: Spec, *, round_: int) -> Exchange:
    """Packets of all sites, delivered over a complete graph and checked by the receivers.

    Every receiver sees the same bytes, its own packet too (a sender must merge what it sent, not
    what it meant), so the sections are decoded once for all.
    """
    edges = len(packets) * (len(packets) - 1)
    received = {
        site: unpack(packet, spec, site=site, round_=round_) for site, packet in packets.items()
    }
    sent = sum(len(packet) for packet in packets.values()) * (len(packets) - 1)
    return Exchange(received, sent, edges * spec.float32_bytes)
