// pack: weights into panels of 32 columns, once, for every level (microgemm.h). Memory bound: reads
// follow the weights' contiguous dimension, writes are sequential to within a panel's 16 rows.
#include "microgemm.h"
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Steps of K (pairs for bfloat16) packed together: whole cache lines of every column.
constexpr int64_t kBlock = 64;

// The weights of one panel's columns; a column that does not exist is null.
template <class Storage>
struct Columns {
  const Storage* first[kPanel];
  int64_t stride_k, K;
  bool together;  // the columns of each half lie side by side, and all exist

  Storage at(int64_t c, int64_t k) const {
    return first[c] != nullptr && k < K ? first[c][k * stride_k] : Storage(0);
  }
};

// v[i][j] becomes v[j][i]: quarters of ever smaller squares change places.
template <int HALF>
inline void transpose(vu (&v)[kLanes]) {
  vi low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & HALF ? kLanes + j - HALF : j;
    high[j] = j & HALF ? kLanes + j : j + HALF;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & HALF) continue;
    const vu a = v[i], b = v[i + HALF];
#if defined(__clang__)
    for (int j = 0; j < kLanes; ++j) {
      v[i][j] = low[j] < kLanes ? a[low[j]] : b[low[j] - kLanes];
      v[i + HALF][j] = high[j] < kLanes ? a[high[j]] : b[high[j] - kLanes];
    }
#else
    v[i] = __builtin_shuffle(a, b, low);
    v[i + HALF] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (HALF > 1) transpose<HALF / 2>(v);
}

// Steps [k, k + kBlock) of columns that are contiguous along K, as words, to out.
inline void pack_words(const uint32_t* const (&first)[kPanel], int64_t k, uint32_t* out) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    for (int64_t i = k; i < k + kBlock; i += kLanes) {
      vu square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        square[j] = vu{};
        if (first[c + j] != nullptr) {
          std::memcpy(&square[j], first[c + j] + i, sizeof square[j]);
        }
      }
      transpose<kLanes / 2>(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        std::memcpy(out + (i - k + j) * kPanel + c, &square[j], sizeof square[j]);
      }
    }
  }
}

struct Words {
  const uint32_t* first[kPanel];

  explicit Words(const Columns<uint16_t>& from) {
    for (int64_t c = 0; c < kPanel; ++c)
      first[c] = reinterpret_cast<const uint32_t*>(from.first[c]);
  }
};

inline void pack_pairs(const Columns<uint16_t>& from, int64_t steps, uint32_t* out) {
  int64_t p = 0;
  if (from.stride_k == 1) {
    const Words words(from);
    for (; 2 * (p + kBlock) <= from.K; p += kBlock) pack_words(words.first, p, out + p * kPanel);
  } else if (from.together) {
    for (; 2 * (p + 1) <= from.K; ++p) {
      for (int64_t half = 0; half < kPanel; half += kPanel / 2) {
        const uint16_t* even = from.first[half] + 2 * p * from.stride_k;
        const uint16_t* odd = even + from.stride_k;
        uint32_t* to = out + p * kPanel + half;
        for (int c = 0; c < kPanel / 2; ++c) to[c] = uint32_t(even[c]) | uint32_t(odd[c]) << 16;
      }
    }
  }
  for (; p < steps / 2; ++p) {
    for (int64_t c = 0; c < kPanel; ++c) {
      out[p * kPanel + c] = uint32_t(from.at(c, 2 * p)) | uint32_t(from.at(c, 2 * p + 1)) << 16;
    }
  }
}

template <class Storage>
inline void pack_plain(const Columns<Storage>& from, int64_t steps, Storage* out) {
  int64_t k = 0;
  if (from.together) {
    for (; k < from.K; ++k) {
      for (int64_t half = 0; half < kPanel; half += kPanel / 2) {
        std::memcpy(out + k * kPanel + half, from.first[half] + k * from.stride_k,
                    kPanel / 2 * sizeof(Storage));
      }
    }
  } else if (from.stride_k == 1) {
    if constexpr (sizeof(Storage) == 4) {
      for (; k + kBlock <= from.K; k += kBlock) pack_words(from.first, k, out + k * kPanel);
    } else {
      const Words words(from);
      uint32_t pairs[kBlock * kPanel];
      for (; k + 2 * kBlock <= from.K; k += 2 * kBlock) {
        pack_words(words.first, k / 2, pairs);
        for (int64_t p = 0; p < kBlock; ++p) {
          Storage* to = out + (k + 2 * p) * kPanel;
          for (int64_t c = 0; c < kPanel; ++c) to[c] = uint16_t(pairs[p * kPanel + c]);
          for (int64_t c = 0; c < kPanel; ++c) to[kPanel + c] = pairs[p * kPanel + c] >> 16;
        }
      }
    }
  }
  for (; k < steps; ++k) {
    for (int64_t c = 0; c < kPanel; ++c) out[k * kPanel + c] = from.at(c, k);
  }
}

// Which column of w is column c of a panel; -1 where there is none.
inline int64_t source_column(const PackParams& p, int64_t panel, int64_t c) {
  if (!p.gated) {
    const int64_t column = panel * kPanel + c;
    return column < p.columns ? column : -1;
  }
  const int64_t half = kPanel / 2, units = p.columns / 2, unit = panel * half + c % half;
  if (unit >= units) return -1;
  return p.interleaved ? 2 * unit + c / half : c / half * units + unit;
}

template <class Storage>
void pack_panels(const PackParams& p, int64_t panels, int64_t begin, int64_t end) {
  const int64_t steps = (p.K + kAlignK - 1) / kAlignK * kAlignK;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t e = item / panels, panel = item % panels;
    Columns<Storage> from = {.first = {}, .stride_k = p.stride_wk, .K = p.K, .together = true};
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t column = source_column(p, panel, c);
      if (column >= 0) {
        from.first[c] = static_cast<const Storage*>(p.w) + e * p.stride_we + column * p.stride_wc;
      }
      const int64_t half = c / (kPanel / 2) * (kPanel / 2);
      from.together &= column >= 0 && from.first[c] == from.first[half] + (c - half);
    }
    char* to = p.packed + e * p.stride_packed + panel * steps * kPanel * int64_t(sizeof(Storage));
    if constexpr (sizeof(Storage) == 2) {
      if (p.dtype == DType::kBFloat16) {
        pack_pairs(from, steps, reinterpret_cast<uint32_t*>(to));
        continue;
      }
    }
    pack_plain(from, steps, reinterpret_cast<Storage*>(to));
  }
}

}  // namespace

void pack(const PackParams& p, const Parallel& threads) {
  const int64_t aligned = p.gated ? (p.columns / 2 + kPanel - 1) / kPanel * kPanel * 2
                                  : (p.columns + kPanel - 1) / kPanel * kPanel;
  const int64_t panels = aligned / kPanel;
  parallel_for(threads, p.E * panels, 1, [&p, panels](int64_t begin, int64_t end) {
    if (bytes_of(p.dtype) == 2) return pack_panels<uint16_t>(p, panels, begin, end);
    return pack_panels<uint32_t>(p, panels, begin, end);
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
