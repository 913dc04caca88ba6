// Weight gradients of all experts: out[e] = left^T . right over the rows of expert e.
//
// The micro-kernel multiplies with K along the rows of an expert: its A is a block of columns of
// `left`, turned, its panels are 32 columns of `right`. Every element of a gradient is written
// once, past the caches where the gradient is larger than they are and is not added to what is
// there.
#pragma once

#include "expert_gemm.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Rows of a matrix, in the order of the experts: row n is row token[n] of it, or row n.
struct RowSource {
  const char* data;
  int64_t stride;  // bytes
  const int32_t* token;

  template <class Float>
  const Float* row(int64_t n) const {
    return reinterpret_cast<const Float*>(data + (token != nullptr ? token[n] : n) * stride);
  }
};

// Which rows or columns of a gradient belong to frozen hidden units.
struct Frozen {
  enum class Unit { kNone, kSame, kHalves, kPairs };  // column c is unit c, c % F, c / 2
  const uint8_t* frozen_ef;
  int64_t F;
  Unit unit;

  bool at(int64_t e, int64_t c) const {
    if (frozen_ef == nullptr || unit == Unit::kNone) return false;
    const int64_t f = unit == Unit::kSame ? c : unit == Unit::kHalves ? c % F : c / 2;
    return frozen_ef[e * F + f] != 0;
  }
  bool all(int64_t e, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      if (!at(e, c)) return false;
    }
    return begin < end;
  }
};

struct WeightGrad {
  const MicroGemm* micro;
  const int32_t* offset;
  const uint8_t* frozen_e;
  int64_t E, threads, cache;
  RowSource left, right;
  Frozen left_frozen, right_frozen;
  WeightGradParams to;
  char* scratch;  // of every thread: weight_grad_scratch()
  int64_t scratch_bytes;
};

inline int64_t longest(const int32_t* offset, int64_t E) {
  int64_t rows = 0;
  for (int64_t e = 0; e < E; ++e) rows = most(rows, offset[e + 1] - offset[e]);
  return rows;
}

// Columns of `left` that are turned at a time, for an expert of K rows (padded).
inline int64_t columns_of_block(const MicroGemm& micro, int64_t cache, int64_t M, int64_t K) {
  const int64_t fitting = cache / 2 / row_stride(K, micro.bf16_rows ? 2 : 4);
  return least(round_up(most(M, 1), micro.rows), most(1, fitting / micro.rows) * micro.rows);
}

// Bytes of one thread: the turned columns and one panel.
inline int64_t weight_grad_scratch(const MicroGemm& micro, const int32_t* offset, int64_t E,
                                   int64_t cache, int64_t M, int64_t size) {
  const int64_t K = round_up(longest(offset, E), kAlignK);
  const int64_t columns = columns_of_block(micro, cache, M, K) + kLanes;
  // A block of fewer rows may hold more columns, but no more bytes than half the cache.
  const int64_t turned = most(columns * row_stride(K, micro.bf16_rows ? 2 : 4),
                              cache / 2 + (micro.rows + kLanes) * row_stride(K, 4));
  return round_up(turned + K * kPanel * size, 64);
}

// Columns [begin, end) of rows [0, rows), turned: column c to row c - begin of `to`, zeros up to K.
template <class Float>
inline void turn(const RowSource& from, int64_t first, int64_t rows, int64_t K, int64_t begin,
                 int64_t end, bool bf16_rows, char* to, int64_t stride) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t some = least(kLanes, end - c);
    char* out = to + (c - begin) * stride;
    if (bf16_rows) {
      // Words of two neighbouring rows: a square of them turned is a run of K.
      for (int64_t k = 0; k < K; k += 2 * kLanes) {
        vu square[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          uint16_t pair[2][kLanes] = {};
          for (int odd = 0; odd < 2; ++odd) {
            if (const int64_t n = k + 2 * j + odd; n < rows) {
              std::memcpy(pair[odd], from.row<uint16_t>(first + n) + c, some * 2);
            }
          }
          vh even, odd;
          std::memcpy(&even, pair[0], sizeof even);
          std::memcpy(&odd, pair[1], sizeof odd);
          square[j] = __builtin_convertvector(even, vu) | __builtin_convertvector(odd, vu) << 16;
        }
        transpose<kLanes / 2>(square);
        const int64_t bytes = least(4 * kLanes, 2 * (K - k));
        for (int j = 0; j < some; ++j) std::memcpy(out + j * stride + 2 * k, &square[j], bytes);
      }
      continue;
    }
    for (int64_t k = 0; k < K; k += kLanes) {
      vu square[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const bool there = k + j < rows;
        square[j] = there ? (vu)load_some(from.row<Float>(first + k + j) + c, some, 0.f) : vu{};
      }
      transpose<kLanes / 2>(square);
      for (int j = 0; j < some; ++j) {
        std::memcpy(out + j * stride + 4 * k, &square[j], 4 * kLanes);
      }
    }
  }
}

// Columns [c, c + 32) of rows [0, rows) as a panel of K steps; what is not there is zero.
template <class Float>
inline void panel_of_rows(const RowSource& from, int64_t first, int64_t rows, int64_t K, int64_t c,
                          int64_t columns, char* to) {
  typedef Float Line[kPanel];
  const auto copy = [&](int64_t n, Line& line) {
    if (n < rows) std::memcpy(line, from.row<Float>(first + n) + c, columns * sizeof(Float));
  };
  if constexpr (sizeof(Float) == 2 && requires(Float x) { x.is_bf16; }) {
    for (int64_t k = 0; k < K; k += 2) {
      Line even = {}, odd = {};
      copy(k, even);
      copy(k + 1, odd);
      uint32_t* out = reinterpret_cast<uint32_t*>(to) + k / 2 * kPanel;
      for (int64_t i = 0; i < kPanel; ++i)
        out[i] = uint32_t(even[i].bits) | uint32_t(odd[i].bits) << 16;
    }
  } else {
    for (int64_t k = 0; k < K; ++k) {
      Line line = {};
      copy(k, line);
      std::memcpy(to + k * sizeof line, line, sizeof line);
    }
  }
}

// Past the caches, where there are instructions for it.
template <class Vector>
inline void stream(void* to, Vector x) {
#if defined(__AVX512F__)
  if constexpr (sizeof x == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof x == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof x == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)x);
#endif
  std::memcpy(to, &x, sizeof x);
}

inline void stream(float* to, vf x) { stream(static_cast<void*>(to), x); }
inline void stream(bf16* to, vf x) { stream(static_cast<void*>(to), bf16_bits(x)); }
inline void stream(fp16* to, vf x) { store(to, x); }

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One expert's part of a gradient: `count` columns of left from m on.
template <class Float>
inline void weight_grad_block(const WeightGrad& g, int64_t e, int64_t m, int64_t count,
                              bool past_caches, char* scratch) {
  const int64_t first = g.offset[e], rows = g.offset[e + 1] - first, K = round_up(rows, kAlignK);
  if (g.to.C == 0) return;
  Float* out = static_cast<Float*>(g.to.out) + (e * g.to.M + m) * g.to.C;
  if (rows == 0 || (g.frozen_e != nullptr && g.frozen_e[e])) {
    if (!g.to.add) std::memset(static_cast<void*>(out), 0, count * g.to.C * sizeof(Float));
    return;
  }
  const int64_t stride = row_stride(K, g.micro->bf16_rows ? 2 : 4);
  turn<Float>(g.left, first, rows, K, m, m + count, g.micro->bf16_rows, scratch, stride);
  char* panel = scratch + round_up(count, kLanes) * stride;
  const int64_t pieces = ceil_div(count, g.micro->rows);
  // What is added to is a line or two of every row: far apart, so fetched two dozen tiles before.
  const int64_t ahead = kPanel * ceil_div(24, pieces);
  alignas(64) float sums[kMostRows * kPanel];
  for (int64_t c = 0; c < g.to.C; c += kPanel) {
    const int64_t columns = least(kPanel, g.to.C - c);
    const bool none = g.right_frozen.all(e, c, c + columns);
    if (!none) panel_of_rows<Float>(g.right, first, rows, K, c, columns, panel);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = count * i / pieces, to = count * (i + 1) / pieces;
      const bool zero = none || g.left_frozen.all(e, m + from, m + to);
      if (zero && g.to.add) continue;
      for (int64_t r = from; g.to.add && c + ahead < g.to.C && r < to; ++r) {
        const Float* next = out + r * g.to.C + c + ahead;
        __builtin_prefetch(next, 1);
        if (sizeof(Float) == 4) __builtin_prefetch(next + kPanel / 2, 1);
      }
      if (!zero) {
        g.micro->run(scratch + from * stride, stride, int32_t(to - from), panel, K, sums, nullptr,
                     0);
      }
      const bool whole = columns == kPanel && !zero && g.left_frozen.frozen_ef == nullptr &&
                         g.right_frozen.frozen_ef == nullptr;
      for (int64_t r = 0; r < to - from; ++r) {
        Float* at = out + (from + r) * g.to.C + c;
        const float* sum_r = sums + r * kPanel;
        if (whole && g.to.add) {
          for (int64_t v = 0; v < kPanel; v += kLanes)
            store(at + v, load(at + v) + load(sum_r + v));
          continue;
        }
        if (whole && past_caches) {
          for (int64_t v = 0; v < kPanel; v += kLanes) stream(at + v, load(sum_r + v));
          continue;
        }
        Float before[kPanel] = {}, line[kPanel] = {};
        if (g.to.add) std::memcpy(static_cast<void*>(before), at, columns * sizeof(Float));
        if (zero || g.left_frozen.at(e, m + from + r)) {
          std::memcpy(static_cast<void*>(line), before, sizeof line);
        } else {
          for (int64_t v = 0; v < kPanel; v += kLanes) {
            const vf sum = load(sum_r + v);
            store(line + v, g.to.add ? load(before + v) + sum : sum);
          }
          for (int64_t v = 0; g.right_frozen.frozen_ef != nullptr && v < columns; ++v) {
            if (g.right_frozen.at(e, c + v)) line[v] = before[v];
          }
        }
        std::memcpy(static_cast<void*>(at), line, columns * sizeof(Float));
      }
    }
  }
}

template <class Float>
inline void weight_grad(const WeightGrad& g, const Parallel& threads) {
  if (g.to.out == nullptr) return;
  const int64_t row_bytes = g.to.C * int64_t(sizeof(Float));
  const bool past_caches = g.E * g.to.M * row_bytes > (int64_t{8} << 20) && row_bytes % 64 == 0 &&
                           uintptr_t(g.to.out) % 64 == 0;
  // Blocks of an expert: as many as its rows' turned columns need, and for an even end.
  const auto block_of = [&](int64_t e) {
    const int64_t rows = g.offset[e + 1] - g.offset[e];
    const int64_t fitting = columns_of_block(*g.micro, g.cache, g.to.M, round_up(rows, kAlignK));
    const int64_t wanted = ceil_div(kItemsPerThread * g.threads, most(g.E, 1));
    const int64_t even = round_up(ceil_div(g.to.M, wanted), g.micro->rows);
    return least(fitting, most(even, 8 * g.micro->rows));
  };
  int64_t items = 0;
  for (int64_t e = 0; e < g.E; ++e) items += ceil_div(g.to.M, block_of(e));
  int64_t next = 0;
  parallel_for(threads, least(g.threads, items), 1, [&](int64_t thread, int64_t) {
    int64_t e = 0, before = 0;  // items of the experts before e
    for (;;) {
      const int64_t claimed = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (claimed >= items) break;
      while (claimed >= before + ceil_div(g.to.M, block_of(e))) {
        before += ceil_div(g.to.M, block_of(e));
        ++e;
      }
      const int64_t block = block_of(e), m = (claimed - before) * block;
      weight_grad_block<Float>(g, e, m, least(block, g.to.M - m), past_caches,
                               g.scratch + thread * g.scratch_bytes);
    }
    finish_streams();
  });
}

// out[e, c] = sum over the rows n of expert e of scale[n] * from[n, c], rows ascending.
template <class Float>
inline void bias_grad(const RowSource& from, const float* scale, const int32_t* offset,
                      const uint8_t* frozen_e, const Frozen& frozen, int64_t E, int64_t columns,
                      void* out, const Parallel& threads) {
  if (out == nullptr) return;
  constexpr int64_t kSome = 64;
  const int64_t runs = ceil_div(columns, kSome);
  parallel_for(threads, E * runs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = item / runs, c = item % runs * kSome, some = least(kSome, columns - c);
      float sum[kSome] = {};
      const bool still = frozen_e != nullptr && frozen_e[e];
      for (int64_t n = offset[e]; !still && n < offset[e + 1]; ++n) {
        const Float* row = from.row<Float>(n) + c;
        const float w = scale != nullptr ? scale[n] : 1.f;
        for (int64_t i = 0; i < some; ++i) sum[i] += w * to_float(row[i]);
      }
      Float* to = static_cast<Float*>(out) + e * columns + c;
      for (int64_t i = 0; i < some; ++i) from_float(frozen.at(e, c + i) ? 0.f : sum[i], to + i);
    }
  });
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
