"""The random source of all kernels: numbers that depend on (seed, step, element) and nothing else.

    key     = splitmix64(seed ^ splitmix64(step)), low 32 bits first
    words   = Philox-4x32-10(key, counter = i // 8, low 32 bits first)   [Salmon et al. 2011]
    lane(i) = 16-bit lane i % 8 of the four words: word 0 first, low half first
    u(i)    = (lane(i) + 0.5) / 65536, in (0, 1), exact in float32

i is the flat index of the element in the whole unmasked tensor, so neither a mask nor the number of
threads shifts another element's draw. csrc/philox.h is the same definition for host and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF
_LOW64 = 0xFFFFFFFFFFFFFFFF


def splitmix64(value: int) -> int:
    """The 64-bit hash of `value` modulo 2**64 [Steele, Lea, Flood 2014], in [0, 2**64)."""
    value = (value + 0x9E3779B97F4A7C15) & _LOW64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _LOW64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _LOW64
    return value ^ (value >> 31)


def key(seed: int, step: int) -> tuple[int, int]:
    """The two 32-bit words of the key; negative arguments count modulo 2**64."""
    mixed = splitmix64((seed & _LOW64) ^ splitmix64(step & _LOW64))
    return mixed & _LOW32, mixed >> 32


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product; halves of `factor` keep every step below 2**63."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Tensor, key_words: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32-10 as int64, for every element of an int64 counter."""
    x0, x1 = counter & _LOW32, (counter >> 32) & _LOW32
    x2, x3 = torch.zeros_like(x0), torch.zeros_like(x0)
    k0, k1 = key_words
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, x0)
        high1, low1 = _multiply(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return x0, x1, x2, x3


def lanes(num_lanes: int, seed: int, step: int, *, device: torch.device | None = None) -> Tensor:
    """lane(0 .. num_lanes - 1) as int64 in [0, 65536)."""
    counter = torch.arange((num_lanes + 7) // 8, dtype=torch.int64, device=device)
    words = torch.stack(philox(counter, key(seed, step)), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:num_lanes]


def uniform(num_draws: int, seed: int, step: int, *, device: torch.device | None = None) -> Tensor:
    """u(0 .. num_draws - 1) as float32."""
    return (lanes(num_draws, seed, step, device=device).float() + 0.5) / 65536
