// Draws of the kernels' random source for runs of elements.
#pragma once

#include "../philox.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gose::cpu::GOSE_LEVEL {
namespace {

typedef uint64_t vl __attribute__((vector_size(4 * kLanes)));

// The products of the low halves of `x` with `factor`.
inline vl mul_low(vl x, uint64_t factor) {
#if defined(__AVX512F__)
  return (vl)_mm512_mul_epu32((__m512i)x, (__m512i)(vl{} + factor));
#elif defined(__AVX2__)
  return (vl)_mm256_mul_epu32((__m256i)x, (__m256i)(vl{} + factor));
#elif defined(__SSE2__)
  return (vl)_mm_mul_epu32((__m128i)x, (__m128i)(vl{} + factor));
#else
  return (x & 0xffffffffu) * factor;
#endif
}

// The draws of the elements [8 * counter, 8 * (counter + kCounters)) as 16-bit lanes.
//
// philox() of philox.h, a counter in each 64-bit lane: a product's high half is where the next
// round wants it if x01 holds x0 above x1, and x23 holds x2 above x3.
constexpr int kCounters = 32, kDrawLanes = kLanes / 2, kDrawVectors = kCounters / kDrawLanes;

inline void draw(PhiloxKey key, uint64_t counter, uint16_t* lane) {
  vl x01[kDrawVectors], x23[kDrawVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kDrawVectors; ++v) {
    vl at;
    for (int c = 0; c < kDrawLanes; ++c) at[c] = uint64_t(v * kDrawLanes + c);
    at += counter;
    x01[v] = at << 32 | at >> 32;
    x23[v] = vl{};
  }
  for (int round = 0; round < 10; ++round) {
    const uint64_t key0 = uint64_t(key.word[0]) << 32, key1 = uint64_t(key.word[1]) << 32;
#pragma GCC unroll 16
    for (int v = 0; v < kDrawVectors; ++v) {
      const vl product0 = mul_low(x01[v] >> 32, 0xD2511F53u);
      const vl product1 = mul_low(x23[v] >> 32, 0xCD9E8D57u);
      x01[v] = product1 ^ (x01[v] << 32) ^ key0;
      x23[v] = product0 ^ (x23[v] << 32) ^ key1;
    }
    key.word[0] += 0x9E3779B9u;
    key.word[1] += 0xBB67AE85u;
  }
#pragma GCC unroll 16
  for (int v = 0; v < kDrawVectors; ++v) {
    const vl low = x01[v] << 32 | x01[v] >> 32, high = x23[v] << 32 | x23[v] >> 32;
    vl pairs[2];  // of words, in the order of the elements
#if defined(__clang__)
    for (int c = 0; c < 2 * kDrawLanes; ++c) {
      pairs[c / kDrawLanes][c % kDrawLanes] = c % 2 == 0 ? low[c / 2] : high[c / 2];
    }
#else
    for (int half = 0; half < 2; ++half) {
      vl from;
      for (int c = 0; c < kDrawLanes; ++c) {
        from[c] = uint64_t((half * kDrawLanes + c) / 2 + c % 2 * kDrawLanes);
      }
      pairs[half] = __builtin_shuffle(low, high, from);
    }
#endif
    std::memcpy(lane + 8 * kDrawLanes * v, pairs, sizeof pairs);
  }
}

// u of any elements: draws are kept for the 256 elements around the last one.
struct Draws {
  PhiloxKey key;
  int64_t first = -1;
  uint16_t lane[8 * kCounters];

  void to(int64_t element, int64_t count, float* u) {
    for (int64_t n = 0; n < count;) {
      const int64_t i = element + n, base = i / (8 * kCounters) * (8 * kCounters);
      if (base != first) draw(key, uint64_t(first = base) / 8, lane);
      const int64_t left = base + 8 * kCounters - i;
      const int64_t stop = count - n < left ? count : n + left;
      const uint16_t* from = lane + (i - base);
      for (; n + kLanes <= stop; n += kLanes, from += kLanes) {
        vh bits;
        std::memcpy(&bits, from, sizeof bits);
        store(u + n, (__builtin_convertvector(bits, vf) + 0.5f) * (1.0f / 65536.0f));
      }
      for (; n < stop; ++n) u[n] = philox_uniform(*from++);
    }
  }
};

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
