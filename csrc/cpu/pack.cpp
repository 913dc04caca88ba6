// pack: weights into panels of 32 columns, once, for every level (microgemm.h). Memory bound: reads
// follow the weights' contiguous dimension, writes are sequential to within a panel's 16 rows.
#include "microgemm.h"
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr int64_t kBlock =
    16;  // steps of K (pairs for bfloat16) that stay in the first-level cache

// The weights of one panel's columns; a column that does not exist is null.
template <class Storage>
struct Columns {
  const Storage* first[kPanel];
  int64_t stride_k, K;
};

template <class Storage>
inline Storage weight_at(const Columns<Storage>& from, int64_t c, int64_t k) {
  return from.first[c] != nullptr && k < from.K ? from.first[c][k * from.stride_k] : Storage(0);
}

inline uint32_t pair_of(uint16_t low, uint16_t high) {
  return uint32_t(low) | uint32_t(high) << 16;
}

inline void pack_pairs(const Columns<uint16_t>& from, int64_t steps, uint32_t* out) {
  for (int64_t p0 = 0; p0 < steps / 2; p0 += kBlock) {
    if (from.stride_k == 1 && 2 * (p0 + kBlock) <= from.K) {
      for (int64_t c = 0; c < kPanel; ++c) {
        uint32_t pairs[kBlock] = {};
        if (from.first[c] != nullptr) std::memcpy(pairs, from.first[c] + 2 * p0, sizeof pairs);
        for (int64_t i = 0; i < kBlock; ++i) out[(p0 + i) * kPanel + c] = pairs[i];
      }
      continue;
    }
    for (int64_t p = p0; p < p0 + kBlock; ++p) {
      for (int64_t c = 0; c < kPanel; ++c) {
        out[p * kPanel + c] = pair_of(weight_at(from, c, 2 * p), weight_at(from, c, 2 * p + 1));
      }
    }
  }
}

template <class Storage>
inline void pack_plain(const Columns<Storage>& from, int64_t steps, Storage* out) {
  for (int64_t k0 = 0; k0 < steps; k0 += kBlock) {
    if (from.stride_k == 1 && k0 + kBlock <= from.K) {
      for (int64_t c = 0; c < kPanel; ++c) {
        Storage column[kBlock] = {};
        if (from.first[c] != nullptr) std::memcpy(column, from.first[c] + k0, sizeof column);
        for (int64_t i = 0; i < kBlock; ++i) out[(k0 + i) * kPanel + c] = column[i];
      }
      continue;
    }
    for (int64_t k = k0; k < k0 + kBlock; ++k) {
      for (int64_t c = 0; c < kPanel; ++c) out[k * kPanel + c] = weight_at(from, c, k);
    }
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
    Columns<Storage> from = {.first = {}, .stride_k = p.stride_wk, .K = p.K};
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t column = source_column(p, panel, c);
      if (column < 0) continue;
      from.first[c] = static_cast<const Storage*>(p.w) + e * p.stride_we + column * p.stride_wc;
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
