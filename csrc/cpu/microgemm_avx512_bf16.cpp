// The micro-kernel on bfloat16 rows with vdpbf16ps: two multiply-adds a lane and instruction, no
// widening. On AMD's cores it runs at the rate of the float32 multiply-add, so at twice the FLOPs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "quantized.h"

namespace gose::cpu::avx512_bf16 {
namespace {

constexpr int kRows = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kLine = 16;  // pairs of K in a cache line of a row
constexpr int kAhead = 4;  // cache lines of a row

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

// What a panel holds: its kGroup pairs from p0 on, given to add(pair, left columns, right columns).
struct Plain {
  static constexpr int kGroup = kLine;

  template <class Add>
  static void group(const char* panel, int64_t p0, const Add& add) {
    const uint16_t* b = reinterpret_cast<const uint16_t*>(panel);
    for (int64_t p = p0; p < p0 + kGroup; ++p) {
      add(p, load(b + p * 2 * kPanel), load(b + p * 2 * kPanel + kPanel));
    }
  }
};

struct Int8 {
  static constexpr int kGroup = kLine;
  static constexpr Weights kWeights = Weights::kInt8;

  // 16 columns at two steps: integers up to 127 are exact in bfloat16.
  static __m512bh pair(const char* even) {
    const auto widened = [](const char* q) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
      return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    };
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(widened(even), 16), widened(even + kPanel));
  }

  template <class Add>
  static void group(const char* panel, int64_t p0, const Add& add) {
    for (int64_t p = p0; p < p0 + kGroup; ++p) {
      const char* q = panel + p * 2 * kPanel;
      add(p, pair(q), pair(q + kPanel / 2));
    }
  }
};

struct Int4 {
  static constexpr int kGroup = kScaleSteps / 2;  // the sums of a group have their own s
  static constexpr Weights kWeights = Weights::kInt4;

  // The levels in bfloat16, twice: vpermw looks at 5 bits, and the fifth is another q's.
  struct Table {
    alignas(64) uint16_t bits[32];

    constexpr Table() : bits() {
      for (int i = 0; i < 32; ++i) {
        bits[i] = uint16_t(__builtin_bit_cast(uint32_t, float(kLevels[i % 16])) >> 16);
      }
    }
  };

  template <class Add>
  static void group(const char* panel, int64_t p0, const Add& add) {
    static constexpr Table kTable;
    const __m512i table = _mm512_load_si512(kTable.bits);
    for (int64_t p = p0; p < p0 + kGroup; p += kWordSteps / 2) {
      const char* words = panel + offset_of_word(2 * p);
      const __m512i left = _mm512_loadu_si512(words), right = _mm512_loadu_si512(words + 64);
#pragma GCC unroll 4
      for (int i = 0; i < kWordSteps / 2; ++i) {
        add(p + i, (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(left, 4 * i), table),
            (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(right, 4 * i), table));
      }
    }
  }

  static __m512 s_of(const char* panel, int64_t p0, int64_t column) {
    const char* at = panel + offset_of_s(2 * p0) + column;
    const __m512i code =
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
    const __m512i biased = _mm512_add_epi32(magnitude, _mm512_set1_epi32(kScaleBias));
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi32(INT32_MIN));
    return (__m512)_mm512_or_si512(_mm512_slli_epi32(biased, kScaleShift), sign);
  }
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <int ROWS, class Panel>
inline void tile(const uint16_t* a, int64_t stride, int32_t rows, const char* panel, int64_t K,
                 float* c, const char* ahead, int64_t lines) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile<ROWS - 1, Panel>(a, stride, rows, panel, K, c, ahead, lines);
  }
  constexpr int64_t kGroup = Panel::kGroup;
  __m512 acc[ROWS][2], total[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = acc[r][1] = total[r][0] = total[r][1] = _mm512_setzero_ps();
  }
  const int64_t pairs = K / 2, per_group = pairs == 0 ? 0 : (lines * kGroup + pairs - 1) / pairs;
  int64_t fetched = 0;
  for (int64_t p0 = 0; p0 < pairs; p0 += kGroup) {
    for (int64_t i = 0; i < per_group && fetched < lines; ++i, ++fetched) {
      _mm_prefetch(ahead + 64 * fetched, _MM_HINT_T1);
    }
    if (p0 % kLine == 0) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(a + r * stride + 2 * (p0 + kAhead * kLine)),
                     _MM_HINT_T0);
      }
    }
    Panel::group(panel, p0, [&](int64_t p, __m512bh left, __m512bh right) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh x = splat_pair(a + r * stride + 2 * p);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, left);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, right);
      }
    });
    if constexpr (kSame<Panel, Int4>) {
      const __m512 s[2] = {Int4::s_of(panel, p0, 0), Int4::s_of(panel, p0, kPanel / 2)};
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        for (int half = 0; half < 2; ++half) {
          total[r][half] = _mm512_fmadd_ps(acc[r][half], s[half], total[r][half]);
          acc[r][half] = _mm512_setzero_ps();
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    for (int half = 0; half < 2; ++half) {
      __m512 sum = kSame<Panel, Int4> ? total[r][half] : acc[r][half];
      if constexpr (!kSame<Panel, Plain>) {
        const char* of_columns = panel + offset_of_r(Panel::kWeights, K);
        sum = _mm512_mul_ps(sum, _mm512_loadu_ps(of_columns + half * 64));
      }
      _mm512_storeu_ps(c + r * kPanel + half * 16, sum);
    }
  }
}

template <class Panel>
void run(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K, float* c,
         const char* ahead, int64_t lines) {
  tile<kRows, Panel>(static_cast<const uint16_t*>(a), stride_a / 2, rows,
                     static_cast<const char*>(panel), K, c, ahead, lines);
}

}  // namespace

const MicroGemm kGemmOfBFloat16 = {"avx512_bf16 dot product", kRows, true, run<Plain>};
const MicroGemm kGemmOfInt8 = {"avx512_bf16 dot product, int8 widened", kRows, true, run<Int8>};
const MicroGemm kGemmOfInt4 = {"avx512_bf16 dot product, int4 widened", kRows, true, run<Int4>};

}  // namespace gose::cpu::avx512_bf16

#endif
