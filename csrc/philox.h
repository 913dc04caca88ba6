// The random source of all kernels, on host and device; gose_kernels/philox.py is its definition.
//
//   key     = splitmix64(seed ^ splitmix64(step)), low 32 bits first
//   words   = Philox-4x32-10(key, counter = i / 8, low 32 bits first)   [Salmon et al. 2011]
//   lane(i) = 16-bit lane i % 8 of the four words: word 0 first, low half first
//   u(i)    = (lane(i) + 0.5) / 65536
//
// i is the flat index in the whole unmasked tensor. One block of words serves eight elements.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GOSE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GOSE_HOST_DEVICE inline
#endif

namespace gose {
// Unnamed: files compiled for different CPU levels must not share one linked copy.
namespace {

struct PhiloxKey {
  uint32_t word[2];
};

struct PhiloxBlock {
  uint32_t word[4];
};

GOSE_HOST_DEVICE uint64_t splitmix64(uint64_t value) {
  value += 0x9E3779B97F4A7C15ull;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

GOSE_HOST_DEVICE PhiloxKey philox_key(int64_t seed, int64_t step) {
  const uint64_t mixed = splitmix64(uint64_t(seed) ^ splitmix64(uint64_t(step)));
  return {{uint32_t(mixed), uint32_t(mixed >> 32)}};
}

// The draws of elements 8 * counter .. 8 * counter + 7.
GOSE_HOST_DEVICE PhiloxBlock philox(PhiloxKey key, uint64_t counter) {
  uint32_t x0 = uint32_t(counter), x1 = uint32_t(counter >> 32), x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * x0;
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * x2;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ key.word[0];
    x1 = uint32_t(product1);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ key.word[1];
    x3 = uint32_t(product0);
    key.word[0] += 0x9E3779B9u;
    key.word[1] += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// Lane j in [0, 8) of a block, in [0, 65536).
GOSE_HOST_DEVICE uint32_t philox_lane(const PhiloxBlock& block, int j) {
  return (block.word[j >> 1] >> ((j & 1) * 16)) & 0xFFFFu;
}

// The same without an array in memory, for a j that no compiler knows.
GOSE_HOST_DEVICE uint32_t philox_draw(const PhiloxBlock& block, int j) {
  const uint32_t low = j & 2 ? block.word[1] : block.word[0];
  const uint32_t high = j & 2 ? block.word[3] : block.word[2];
  return (j & 4 ? high : low) >> (j & 1) * 16 & 0xFFFFu;
}

// In (0, 1); both operations are exact in float32.
GOSE_HOST_DEVICE float philox_uniform(uint32_t lane) {
  return (float(lane) + 0.5f) * (1.0f / 65536.0f);
}

}  // namespace
}  // namespace gose
