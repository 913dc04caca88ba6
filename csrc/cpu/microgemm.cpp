// The micro-kernel on float32 rows, at every level: multiply-adds, weights widened as they are
// read. Register tiles: 12 x 2 vectors of AVX-512's 32, 6 x 2 of AVX2's 16, 4 x 2 of SSE2's.
#include "microgemm.h"

#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kVecs = 2;
constexpr int kGroup = 8;  // steps of K between prefetches
// Steps of K that one register sums; the sums of such blocks are added up. One chain of 2048 has an
// error of 1.4e-6, blocks of 128 a third of that, for 2 % of the time.
constexpr int64_t kBlock = 128;

// One of two neighbours along K that lie side by side in bfloat16 panels.
struct bf16_of_pair {
  uint16_t bits;
};
template <class Weight>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<bf16_of_pair> = true;

// acc += rows . steps [begin, end) of columns [0, kVecs * kLanes) of the panel at `b`.
template <int ROWS, class Weight>
inline void steps(const float* a, int64_t stride, const Weight* b, int64_t begin, int64_t end,
                  vf (&acc)[ROWS][kVecs]) {
  if constexpr (kPaired<Weight>) {
    for (int64_t k = begin; k < end; k += 2) {
      const uint32_t* pair = reinterpret_cast<const uint32_t*>(b + k * kPanel);
      for (int odd = 0; odd < 2; ++odd) {
        vf w[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          vu both;
          std::memcpy(&both, pair + v * kLanes, sizeof both);
          w[v] = odd ? (vf)(both & 0xffff0000u) : (vf)(both << 16);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
          const vf x = splat(a[r * stride + k + odd]);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) acc[r][v] += x * w[v];
        }
      }
    }
  } else {
    for (int64_t k = begin; k < end; ++k) {
      vf w[kVecs];
      for (int v = 0; v < kVecs; ++v) w[v] = load(b + k * kPanel + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(a[r * stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] += x * w[v];
      }
    }
  }
}

// Columns [0, kVecs * kLanes) of a panel from `b` on, for ROWS rows.
template <int ROWS, class Weight>
inline void tile(const float* a, int64_t stride, const Weight* b, int64_t K, float* c,
                 const char* ahead, int64_t lines) {
  int64_t fetched = 0;
  const int64_t per_group = K == 0 ? 0 : (lines * kGroup + K - 1) / K;
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kBlock) {
    vf acc[ROWS][kVecs] = {};
    const int64_t end = begin + kBlock < K ? begin + kBlock : K;
    for (int64_t k = begin; k < end; k += kGroup) {
      for (int64_t i = 0; i < per_group && fetched < lines; ++i, ++fetched) {
        __builtin_prefetch(ahead + 64 * fetched, 0, 2);
      }
      steps<ROWS>(a, stride, b, k, k + kGroup, acc);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + r * kPanel + v * kLanes;
        store(to, begin == 0 ? acc[r][v] : load(to) + acc[r][v]);
      }
    }
  }
}

template <int ROWS, class Weight>
inline void panel_rows(const float* a, int64_t stride, int32_t rows, const Weight* panel, int64_t K,
                       float* c, const char* ahead, int64_t lines) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return panel_rows<ROWS - 1>(a, stride, rows, panel, K, c, ahead, lines);
    }
  }
  // A column of pairs is two elements wide.
  constexpr int64_t kWide = kPaired<Weight> ? 2 : 1;
  for (int64_t column = 0; column < kPanel; column += kVecs * kLanes) {
    tile<ROWS>(a, stride, panel + kWide * column, K, c + column, ahead, lines);
    lines = 0;
  }
}

template <class Weight>
void run(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K, float* c,
         const char* ahead, int64_t lines) {
  panel_rows<kRows>(static_cast<const float*>(a), stride_a / 4, rows,
                    static_cast<const Weight*>(panel), K, c, ahead, lines);
}

#define GOSE_QUOTE(level) #level
#define GOSE_NAME(level, what) GOSE_QUOTE(level) " " what

}  // namespace

const MicroGemm kGemmOfFloat32 = {GOSE_NAME(GOSE_LEVEL, "multiply-add"), kRows, false, run<float>};
const MicroGemm kGemmOfBFloat16 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, bfloat16 widened"), kRows,
                                   false, run<bf16_of_pair>};
const MicroGemm kGemmOfFloat16 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, float16 widened"), kRows,
                                  false, run<fp16>};

}  // namespace gose::cpu::GOSE_LEVEL
