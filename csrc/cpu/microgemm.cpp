// The micro-kernel on float32 rows, at every level: multiply-adds, weights widened as they are
// read. Register tiles: 12 x 2 vectors of AVX-512's 32, 6 x 2 of AVX2's 16, 4 x 2 of SSE2's.
#include "microgemm.h"

#include "quantized.h"
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kVecs = 2;
constexpr int kGroup = 8;  // steps of K between prefetches

// What a panel holds beside float and fp16. Two neighbours along K lie side by side in bfloat16
// panels.
struct bf16_of_pair {
  uint16_t bits;
};
struct int8_weight {
  int8_t q;
};
struct int4_words {
  uint8_t bits;
};

// Steps of K that one register sums; the sums of such blocks are added up. One chain of 2048 has an
// error of 1.4e-6, blocks of 128 a third of that, for 2 % of the time.
constexpr int64_t kBlock = 128;

typedef int8_t vb __attribute__((vector_size(kLanes)));

inline vf widened(const int8_weight* p) {
  vb q;
  std::memcpy(&q, p, sizeof q);
  return __builtin_convertvector(__builtin_convertvector(q, vi), vf);
}

// The levels of the low 4 bits of every lane.
struct Levels {
  vf level[16 / kLanes];

  Levels() {
    for (int i = 0; i < 16; ++i) level[i / kLanes][i % kLanes] = float(kLevels[i]);
  }
  vf of(vu word) const {
#if defined(__clang__) || !defined(__AVX2__)
    vf out;
    for (int i = 0; i < kLanes; ++i) out[i] = float(kLevels[word[i] & 15]);
    return out;
#elif defined(__AVX512F__)
    return __builtin_shuffle(level[0], (vi)word);
#else
    return __builtin_shuffle(level[0], level[1], (vi)word);
#endif
  }
};

inline vu word_at(const void* panel, int64_t k, int64_t column) {
  vu word;
  const char* at = static_cast<const char*>(panel) + offset_of_word(k);
  std::memcpy(&word, at + 4 * column, sizeof word);
  return word;
}

// s of the block of step k in int4 panels.
inline vf s_of(const void* panel, int64_t k, int64_t column) {
  vb code;
  std::memcpy(&code, static_cast<const char*>(panel) + offset_of_s(k) + column, sizeof code);
  const vi c = __builtin_convertvector(code, vi);
  return (vf)((((c & 0x7f) + kScaleBias) << kScaleShift) | (c & INT32_MIN));
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// acc += rows . steps [begin, begin + kGroup) of columns [column, column + kVecs * kLanes).
template <int ROWS, class Weight>
inline void steps(const float* a, int64_t stride, const Weight* panel, int64_t column,
                  int64_t begin, const Levels& levels, vf (&acc)[ROWS][kVecs]) {
  const auto add = [&](int64_t k, const vf(&w)[kVecs]) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf x = splat(a[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] += x * w[v];
    }
  };
  vf w[kVecs];
  if constexpr (kSame<Weight, bf16_of_pair>) {
    for (int64_t k = begin; k < begin + kGroup; k += 2) {
      const uint32_t* pair = reinterpret_cast<const uint32_t*>(panel + k * kPanel) + column;
      for (int odd = 0; odd < 2; ++odd) {
        for (int v = 0; v < kVecs; ++v) {
          vu both;
          std::memcpy(&both, pair + v * kLanes, sizeof both);
          w[v] = odd ? (vf)(both & 0xffff0000u) : (vf)(both << 16);
        }
        add(k + odd, w);
      }
    }
  } else if constexpr (kSame<Weight, int4_words>) {
    vu word[kVecs];
    vf s[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      word[v] = word_at(panel, begin, column + v * kLanes);
      s[v] = s_of(panel, begin, column + v * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kWordSteps; ++i) {
      for (int v = 0; v < kVecs; ++v) w[v] = levels.of(word[v] >> shift_of(i)) * s[v];
      add(begin + i, w);
    }
  } else {
    for (int64_t k = begin; k < begin + kGroup; ++k) {
      const Weight* from = panel + k * kPanel + column;
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (kSame<Weight, int8_weight>) {
          w[v] = widened(from + v * kLanes);
        } else {
          w[v] = load(from + v * kLanes);
        }
      }
      add(k, w);
    }
  }
}

// Columns [column, column + kVecs * kLanes) of a panel for ROWS rows.
template <int ROWS, class Weight>
inline void tile(const float* a, int64_t stride, const Weight* panel, int64_t column, int64_t K,
                 float* c, const char* ahead, int64_t lines) {
  const Levels levels;
  int64_t fetched = 0;
  const int64_t per_group = K == 0 ? 0 : (lines * kGroup + K - 1) / K;
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kBlock) {
    vf acc[ROWS][kVecs] = {};
    const int64_t end = begin + kBlock < K ? begin + kBlock : K;
    for (int64_t k = begin; k < end; k += kGroup) {
      for (int64_t i = 0; i < per_group && fetched < lines; ++i, ++fetched) {
        __builtin_prefetch(ahead + 64 * fetched, 0, 2);
      }
      steps<ROWS>(a, stride, panel, column, k, levels, acc);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + r * kPanel + column + v * kLanes;
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
  for (int64_t column = 0; column < kPanel; column += kVecs * kLanes) {
    tile<ROWS>(a, stride, panel, column, K, c, ahead, lines);
    lines = 0;
  }
}

template <class Weight>
void run(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K, float* c,
         const char* ahead, int64_t lines) {
  panel_rows<kRows>(static_cast<const float*>(a), stride_a / 4, rows,
                    static_cast<const Weight*>(panel), K, c, ahead, lines);
}

template <class Weight, Weights WEIGHTS>
void run_quantized(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K,
                   float* c, const char* ahead, int64_t lines) {
  run<Weight>(a, stride_a, rows, panel, K, c, ahead, lines);
  const char* r = static_cast<const char*>(panel) + offset_of_r(WEIGHTS, K);
  for (int64_t column = 0; column < kPanel; column += kLanes) {
    const vf scale = load(reinterpret_cast<const float*>(r) + column);
    for (float* to = c + column; to < c + rows * kPanel; to += kPanel) {
      store(to, load(to) * scale);
    }
  }
}

// Of two exact bfloat16 numbers, k even and odd.
inline void store_pairs(vf even, vf odd, uint32_t* out) {
  const vu pairs = (vu)even >> 16 | (vu)odd;
  std::memcpy(out, &pairs, sizeof pairs);
}

#define GOSE_QUOTE(level) #level
#define GOSE_NAME(level, what) GOSE_QUOTE(level) " " what

}  // namespace

void widen_int8(const void* panel, int64_t begin, int64_t end, uint16_t* out) {
  const int8_weight* q = static_cast<const int8_weight*>(panel);
  uint32_t* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t k = begin; k < end; k += 2, to += kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      store_pairs(widened(q + k * kPanel + c), widened(q + (k + 1) * kPanel + c), to + c);
    }
  }
}

void widen_int4(const void* panel, int64_t begin, int64_t end, uint16_t* out) {
  const Levels levels;
  uint32_t* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t k = begin; k < end; k += kWordSteps, to += kWordSteps / 2 * kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const vu word = word_at(panel, k, c);
      const vf s = s_of(panel, k, c);
      for (int64_t i = 0; i < kWordSteps; i += 2) {
        store_pairs(levels.of(word >> shift_of(i)) * s, levels.of(word >> shift_of(i + 1)) * s,
                    to + i / 2 * kPanel + c);
      }
    }
  }
}

const MicroGemm kGemmOfFloat32 = {GOSE_NAME(GOSE_LEVEL, "multiply-add"), kRows, false, run<float>};
const MicroGemm kGemmOfBFloat16 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, bfloat16 widened"), kRows,
                                   false, run<bf16_of_pair>};
const MicroGemm kGemmOfFloat16 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, float16 widened"), kRows,
                                  false, run<fp16>};
const MicroGemm kGemmOfInt8 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, int8 widened"), kRows, false,
                               run_quantized<int8_weight, Weights::kInt8>};
const MicroGemm kGemmOfInt4 = {GOSE_NAME(GOSE_LEVEL, "multiply-add, int4 widened"), kRows, false,
                               run_quantized<int4_words, Weights::kInt4>};

}  // namespace gose::cpu::GOSE_LEVEL
