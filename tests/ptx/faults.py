"""What a kernel can do wrong, and what a launch has counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class KernelError(Exception):
    """A kernel did what a GPU forbids or leaves undefined; `kind` names the detector."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass
class Counts:
    """What one or more launches did. Bytes are those of active lanes; a request is one instruction
    of one warp."""

    instructions: int = 0  # of warps
    flops: int = 0  # additions and multiplications of floats, a fused multiply-add is two
    mma: int = 0  # tensor-core operations of warps
    mma_flops: int = 0
    read_bytes: int = 0  # distinct bytes of every buffer, once a launch: what DRAM must move
    written_bytes: int = 0
    block_sectors: int = 0  # 32-byte sectors that the first access of a block touches: L2 traffic
    sectors: int = 0  # of every request
    requested_bytes: int = 0  # distinct bytes within every request
    shared_requests: int = 0
    shared_phases: int = 0  # what shared memory needs without conflicts
    bank_conflicts: int = 0  # what it needs more
    barriers: int = 0  # of blocks
    launches: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)  # dynamic, of warps

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    @property
    def sector_efficiency(self) -> float:
        """Share of the bytes of all touched sectors that was asked for."""
        return self.requested_bytes / (32 * self.sectors) if self.sectors else 1.0

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self
