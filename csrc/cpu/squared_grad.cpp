// squared_grad: rows are packed into panels once; then a tile of the output stays in registers over
// the rows of its expert. Where every row is its own sample the panels hold squares and a tile is a
// matrix product; else a tile of the sample's gradient is squared and added at the sample's last
// row. A column of ones behind x makes the bias the last column.
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Rows and vectors of a tile: 28 of AVX-512's 32 registers, 16 of the others' 16.
template <bool kRuns>
struct Tile {
  static constexpr int kRows = kLanes == 16 ? (kRuns ? 4 : 8) : (kRuns ? 2 : 4);
  static constexpr int kVectors = kLanes == 16 || !kRuns ? 3 : 2;
  static constexpr int kColumns = kVectors * kLanes;
};

constexpr int64_t kRowsAtOnce = 192;  // of a panel of x: 36 KB

inline int64_t panels(int64_t count, int64_t width) { return (count + width - 1) / width; }

// Columns [0, count) of a row, then `behind`, then zeros, to panels of `width` columns.
template <bool kSquares, class Float>
void pack_row(const Float* row, int64_t count, float behind, int64_t width, int64_t num_panels,
              int64_t stride, float* to) {
  for (int64_t panel = 0; panel < num_panels; ++panel, to += stride) {
    const int64_t first = panel * width, left = count - first;
    const int64_t here = left < 0 ? 0 : left < width ? left : width;
    for (int64_t c = 0; c < here; ++c) {
      const float value = to_float(row[first + c]);
      to[c] = kSquares ? value * value : value;
    }
    for (int64_t c = here; c < width; ++c) to[c] = first + c == count ? behind : 0.f;
  }
}

template <bool kRuns, class Float>
void pack(const SquaredGradParams& p, int64_t begin, int64_t end) {
  const int64_t width_x = Tile<kRuns>::kColumns, width_g = Tile<kRuns>::kRows;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = p.order == nullptr ? r : p.order[r];
    pack_row<!kRuns>(static_cast<const Float*>(p.x) + n * p.stride_xn, p.D, 1.f, width_x,
                     panels(p.D + 1, width_x), p.rows * width_x, p.panel_x + r * width_x);
    pack_row<!kRuns>(static_cast<const Float*>(p.grad) + n * p.stride_gn, p.F, 0.f, width_g,
                     panels(p.F, width_g), p.rows * width_g, p.panel_g + r * width_g);
  }
}

// What rows [begin, end) add to one tile.
template <bool kRuns>
inline void add_tile(const float* x, const float* g, const uint8_t* last, int64_t begin,
                     int64_t end, vf (&total)[Tile<kRuns>::kRows][Tile<kRuns>::kVectors]) {
  constexpr int kRows = Tile<kRuns>::kRows, kVectors = Tile<kRuns>::kVectors;
  vf sum[kRows][kVectors] = {};
  for (int64_t r = begin; r < end; ++r) {
    vf column[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) column[j] = load(x + (r * kVectors + j) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const vf factor = splat(g[r * kRows + i]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * column[j];
    }
    if constexpr (kRuns) {
      if (!last[r]) continue;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) {
          total[i][j] += sum[i][j] * sum[i][j];
          sum[i][j] = vf{};
        }
      }
    }
  }
  if constexpr (!kRuns) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) total[i][j] = sum[i][j];
    }
  }
}

// Tiles are numbered by expert, panel of x, panel of grad: neighbours share the panel of x.
template <bool kRuns>
void tiles(const SquaredGradParams& p, int64_t begin, int64_t end) {
  constexpr int kRows = Tile<kRuns>::kRows, kVectors = Tile<kRuns>::kVectors;
  constexpr int kColumns = Tile<kRuns>::kColumns;
  const int64_t panels_x = panels(p.D + 1, kColumns), panels_g = panels(p.F, kRows);
  for (int64_t at = begin; at < end;) {
    const int64_t e = at / (panels_x * panels_g), of_x = at / panels_g % panels_x;
    const int64_t first_g = at % panels_g;
    const int64_t stop_g = panels_g < first_g + end - at ? panels_g : first_g + end - at;
    at += stop_g - first_g;
    const float* x = p.panel_x + of_x * p.rows * kColumns;
    bool is_first = true;
    int64_t start = p.offset[e], stop = p.offset[e + 1];
    do {
      int64_t until = stop - start < kRowsAtOnce ? stop : start + kRowsAtOnce;
      if constexpr (kRuns) {
        while (until < stop && !p.last[until - 1]) ++until;
      }
      for (int64_t of_g = first_g; of_g < stop_g; ++of_g) {
        vf total[kRows][kVectors] = {};
        add_tile<kRuns>(x, p.panel_g + of_g * p.rows * kRows, p.last, start, until, total);
        for (int64_t i = 0; i < kRows && of_g * kRows + i < p.F; ++i) {
          const int64_t f = e * p.F + of_g * kRows + i;
          for (int j = 0; j < kVectors; ++j) {
            const int64_t c = of_x * kColumns + j * kLanes;
            float* out = p.square + f * p.D + c;
            vf value = total[i][j];
            if (c + kLanes <= p.D) {
              store(out, is_first ? value : load(out) + value);
            } else {
              for (int64_t k = 0; c + k <= p.D && k < kLanes; ++k) {
                float& one = c + k == p.D ? p.square_bias[f] : out[k];
                one = is_first ? value[k] : one + value[k];
              }
            }
          }
        }
      }
      is_first = false;
      start = until;
    } while (start < stop);
  }
}

template <bool kRuns>
void run(const SquaredGradParams& p, const Parallel& threads) {
  parallel_for(threads, p.rows, grain_of(8 * (p.D + p.F)), [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return pack<kRuns, float>(p, begin, end);
      case DType::kBFloat16: return pack<kRuns, bf16>(p, begin, end);
      case DType::kFloat16: return pack<kRuns, fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
  const int64_t count =
      p.E * panels(p.D + 1, Tile<kRuns>::kColumns) * panels(p.F, Tile<kRuns>::kRows);
  const int64_t rows = p.E == 0 ? 1 : 1 + p.rows / p.E;
  parallel_for(threads, count, 1 + (int64_t{1} << 13) / rows,
               [&p](int64_t begin, int64_t end) { tiles<kRuns>(p, begin, end); });
}

}  // namespace

void squared_grad(const SquaredGradParams& p, const Parallel& threads) {
  return p.last == nullptr ? run<false>(p, threads) : run<true>(p, threads);
}

}  // namespace gose::cpu::GOSE_LEVEL
