// Draws of the kernels' random source for runs of elements.
#pragma once

#include "../philox.h"
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// The draws of the elements [8 * counter, 8 * (counter + kCounters)) as 16-bit lanes.
constexpr int kCounters = 32;

inline void draw(PhiloxKey key, uint64_t counter, uint16_t* lane) {
  uint32_t x0[kCounters], x1[kCounters], x2[kCounters] = {}, x3[kCounters] = {};
  for (int c = 0; c < kCounters; ++c) {
    x0[c] = uint32_t(counter + c);
    x1[c] = uint32_t((counter + c) >> 32);
  }
  for (int round = 0; round < 10; ++round) {
    for (int c = 0; c < kCounters; ++c) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * x0[c];
      const uint64_t product1 = uint64_t(0xCD9E8D57u) * x2[c];
      x0[c] = uint32_t(product1 >> 32) ^ x1[c] ^ key.word[0];
      x1[c] = uint32_t(product1);
      x2[c] = uint32_t(product0 >> 32) ^ x3[c] ^ key.word[1];
      x3[c] = uint32_t(product0);
    }
    key.word[0] += 0x9E3779B9u;
    key.word[1] += 0xBB67AE85u;
  }
  for (int c = 0; c < kCounters; ++c) {
    const PhiloxBlock block = {{x0[c], x1[c], x2[c], x3[c]}};
    for (int j = 0; j < 8; ++j) lane[8 * c + j] = uint16_t(philox_lane(block, j));
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
      for (const uint16_t* from = lane + (i - base); n < stop; ++n) u[n] = philox_uniform(*from++);
    }
  }
};

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
