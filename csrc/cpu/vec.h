// Vectors of the level being compiled: kLanes floats, loads and stores of every storage type.
//
// GCC and Clang vector extensions, so one source serves every level. Everything is in an anonymous
// namespace (see kernels.h) inside the level's: the disassembly test reads the level off the
// symbol.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace gose::cpu::GOSE_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
  static constexpr bool is_bf16 = true;
};
struct fp16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

// Round to nearest even; NaN stays NaN (the rounding add would turn some into infinity).
inline vh bf16_bits(vf x) {
  const vu u = (vu)x;
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const vu quiet = u | 0x400000u;
  const vi is_nan = x != x;
  return __builtin_convertvector((((vu)is_nan & quiet) | (~(vu)is_nan & rounded)) >> 16, vh);
}

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  // Shift exponent and mantissa into place and rescale by 2^112: exact for subnormals too.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  if ((x.bits & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000u | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  out->bits =
      x != x ? uint16_t((u | 0x400000u) >> 16) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float x, fp16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const float magnitude = float_of(u & 0x7fffffffu);
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.f) {  // rounds past the largest half, 65504
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {  // subnormal: the unit 2^-24 becomes the float's last bit
    half = bits_of(magnitude + 0.5f) - bits_of(0.5f);
  } else {
    const uint32_t m = bits_of(magnitude);
    half = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_maskz_cvtph_ps(0xffff, half);  // GCC 12 warns of its own plain form
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vf x) {
  const vh h = bf16_bits(x);
  std::memcpy(p, &h, sizeof h);
}
inline void store(fp16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
#endif
}

// Lanes in ascending order: the sum has one value whatever the caller's threads.
inline float sum(vf x) {
  float total = 0.f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// body(begin, end) on pieces of [0, count) by the host's threads.
template <class Body>
inline void parallel_for(const Parallel& threads, int64_t count, int64_t grain, const Body& body) {
  threads.run(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kBFloat16: return 2;
    case DType::kFloat16: return 2;
    case DType::kFloat64: return 8;
    case DType::kInt32: return 4;
  }
  return 0;
}

// Rows per piece so that a piece moves about 64 KB: below that a thread costs more than it saves.
inline int64_t grain_of(int64_t bytes_per_row) {
  return bytes_per_row <= 0 ? 1 : 1 + (int64_t{1} << 16) / bytes_per_row;
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
