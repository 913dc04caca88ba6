// The micro-kernel on bfloat16 rows with vdpbf16ps: two multiply-adds a lane and instruction, no
// widening. On AMD's cores it runs at the rate of the float32 multiply-add, so at twice the FLOPs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "microgemm.h"

namespace gose::cpu::avx512_bf16 {
namespace {

constexpr int kRows = 12;   // 12 x 2 accumulators of 32 registers
constexpr int kGroup = 16;  // pairs of K between prefetches: one cache line of every row
constexpr int kAhead = 4;   // cache lines of a row

inline __m512bh load(const uint16_t* p) {
  __m512bh x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline __m512bh splat_pair(const uint16_t* p) {
  int pair;
  std::memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

template <int ROWS>
inline void tile(const uint16_t* a, int64_t stride, int32_t rows, const uint16_t* b, int64_t K,
                 float* c, const char* ahead, int64_t lines) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile<ROWS - 1>(a, stride, rows, b, K, c, ahead, lines);
  }
  __m512 acc[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  const int64_t pairs = K / 2, per_group = pairs == 0 ? 0 : (lines * kGroup + pairs - 1) / pairs;
  int64_t fetched = 0;
  for (int64_t p0 = 0; p0 < pairs; p0 += kGroup) {
    for (int64_t i = 0; i < per_group && fetched < lines; ++i, ++fetched) {
      _mm_prefetch(ahead + 64 * fetched, _MM_HINT_T1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(a + r * stride + 2 * (p0 + kAhead * kGroup)),
                   _MM_HINT_T0);
    }
    for (int64_t p = p0; p < p0 + kGroup; ++p) {
      const __m512bh left = load(b + p * 2 * kPanel), right = load(b + p * 2 * kPanel + kPanel);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh x = splat_pair(a + r * stride + 2 * p);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, left);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, right);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(c + r * kPanel, acc[r][0]);
    _mm512_storeu_ps(c + r * kPanel + 16, acc[r][1]);
  }
}

void run(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K, float* c,
         const char* ahead, int64_t lines) {
  tile<kRows>(static_cast<const uint16_t*>(a), stride_a / 2, rows,
              static_cast<const uint16_t*>(panel), K, c, ahead, lines);
}

}  // namespace

const MicroGemm kGemmOfBFloat16 = {"avx512_bf16 dot product", kRows, true, run};

}  // namespace gose::cpu::avx512_bf16

#endif
