"""The draws of gose_kernels.philox inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from gose_kernels.philox import key


def key_words(seed: int, step: int) -> tuple[int, int]:
    """The key's words as the int32 that kernels take."""
    low, high = key(seed, step)
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


@triton.jit
def _words(counter, key0, key1):
    """The four 32-bit words of every int64 counter; the key as two int32."""
    x0 = counter.to(tl.uint32)
    x1 = (counter >> 32).to(tl.uint32)
    x2 = x0 & 0
    x3 = x2
    k0 = key0.to(tl.uint32, bitcast=True)
    k1 = key1.to(tl.uint32, bitcast=True)
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        a = x0 & 0
        m0 = a + M0
        m1 = a + M1
        high0 = tl.umulhi(x0, m0)
        high1 = tl.umulhi(x2, m1)
        low0 = x0 * m0
        low1 = x2 * m1
        x0 = high1 ^ x1 ^ k0
        x1 = low1
        x2 = high0 ^ x3 ^ k1
        x3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def draws_of_blocks(block, key0, key1):
    """Lanes 8 * block .. 8 * block + 7 of consecutive blocks [n], as uint32 [8 * n]: one block of
    words serves eight elements."""
    x0, x1, x2, x3 = _words(block, key0, key1)
    words = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def draw(i, key0, key1):
    """Lane i of every int64 element, as uint32: for elements that lie anywhere."""
    x0, x1, x2, x3 = _words(i >> 3, key0, key1)
    j = (i & 7).to(tl.int32)
    low = tl.where((j & 2) != 0, x1, x0)
    high = tl.where((j & 2) != 0, x3, x2)
    word = tl.where((j & 4) != 0, high, low)
    return (word >> ((j & 1) * 16).to(tl.uint32)) & 0xFFFF
