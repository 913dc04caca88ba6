// One GEMM of all experts: the rows of every expert times its packed panels.
//
// Rows come in blocks of one expert, small enough that a block stays in the second-level cache
// while the panels stream past; work is (block, run of panels), claimed one by one, so uneven
// experts spread over the threads. An element of the result is one thread's sum over all of K: its
// bits depend neither on the threads nor on the other rows.
#pragma once

#include "microgemm.h"
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A row stride that is no power of two: rows of one block do not fight for the same cache sets.
inline int64_t row_stride(int64_t columns, int64_t bytes) {
  return round_up(columns * bytes, 64) + 64;
}

struct Block {  // rows [first, first + rows) of the experts' sorted rows
  int32_t expert, first, rows;
};

// Cuts the rows of every expert evenly into blocks of at most `most_rows`.
inline int64_t make_blocks(const int32_t* offset, int64_t E, int64_t most_rows, Block* blocks) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t rows = offset[e + 1] - offset[e], pieces = ceil_div(rows, most_rows);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = rows * i / pieces, end = rows * (i + 1) / pieces;
      blocks[count++] = {int32_t(e), int32_t(offset[e] + begin), int32_t(end - begin)};
    }
  }
  return count;
}
inline int64_t blocks_at_most(int64_t rows, int64_t E, int64_t most_rows) {
  return E + rows / most_rows + 1;
}

struct Gemm {
  const MicroGemm* micro;
  const Block* blocks;
  int64_t num_blocks;
  const char* packed;  // expert 0's panels
  int64_t stride_packed, panels, K, panel_bytes;
  int64_t threads;

  // Panels of a work item: enough items for an even end, few enough that gathering the block's rows
  // again for each stays below a twentieth of its work, and never less than 128 KB of weights.
  int64_t panels_per_item() const {
    const int64_t items = ceil_div(32 * threads, most(num_blocks, 1));
    const int64_t by_work = ceil_div(panels, items);
    const int64_t by_bytes = ceil_div(int64_t{128} << 10, most(panel_bytes, 1));
    return most(1, least(panels, most(by_work, by_bytes)));
  }
};

struct Rows {
  const char* data;
  int64_t stride;  // bytes
};

struct Ahead {
  const char* first;
  int64_t lines;
};

// What call i of a panel fetches while it multiplies. A panel that is used once slides a window
// ahead of itself; the next one after a panel that is used often is fetched in equal shares.
// Measured with vdpbf16ps, two threads, panels from memory: 12 rows 26 GB/s without, 63 with 16 KB
// ahead; 24 rows 490 GFLOP/s without, 844 with the next panel. Up to 4 rows the CPU's own
// prefetchers keep up (62 to 69 GB/s).
inline Ahead ahead_of(const Gemm& g, const char* panel, int64_t rows, int64_t i, int64_t pieces,
                      bool more) {
  const int64_t lines = g.panel_bytes / 64;
  if (pieces == 1) return {panel + 16384, rows <= 4 ? 0 : lines};
  if (!more) return {nullptr, 0};
  const int64_t begin = lines * i / pieces;
  return {panel + g.panel_bytes + 64 * begin, lines * (i + 1) / pieces - begin};
}

// rows_of(block, thread) -> Rows; done(block, first, count, panel, sums) takes count x 32 sums of
// rows [first, first + count) of the block.
template <class RowsOf, class Done>
inline void multiply(const Gemm& g, const Parallel& threads, const RowsOf& rows_of,
                     const Done& done) {
  const int64_t run = g.panels_per_item(), runs = ceil_div(g.panels, run);
  const int64_t items = g.num_blocks * runs;
  int64_t next = 0;
  parallel_for(threads, least(g.threads, items), 1, [&](int64_t thread, int64_t) {
    alignas(64) float sums[kMostRows * kPanel];
    Rows rows = {};
    int64_t held = -1;
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      const Block& block = g.blocks[item / runs];
      if (item / runs != held) {
        rows = rows_of(block, thread);
        held = item / runs;
      }
      const char* weights = g.packed + block.expert * g.stride_packed;
      const int64_t pieces = ceil_div(block.rows, g.micro->rows);
      const int64_t first = item % runs * run, end = least(g.panels, first + run);
      for (int64_t panel = first; panel < end; ++panel) {
        const char* at = weights + panel * g.panel_bytes;
        for (int64_t i = 0; i < pieces; ++i) {
          const int64_t from = block.rows * i / pieces, to = block.rows * (i + 1) / pieces;
          const Ahead ahead = ahead_of(g, at, block.rows, i, pieces, panel + 1 < end);
          g.micro->run(rows.data + from * rows.stride, rows.stride, int32_t(to - from), at, g.K,
                       sums, ahead.first, ahead.lines);
          done(block, from, to - from, panel, sums);
        }
      }
    }
  });
}

// Row `from` of D elements as the micro-kernel takes it, zeros up to K.
template <class Float>
inline void copy_row(const Float* from, int64_t D, int64_t K, bool bf16_rows, char* to) {
  if (bf16_rows || sizeof(Float) == 4) {
    std::memcpy(to, from, D * sizeof(Float));
    std::memset(to + D * sizeof(Float), 0, (K - D) * sizeof(Float));
    return;
  }
  float* out = reinterpret_cast<float*>(to);
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(out + d, load(from + d));
  for (; d < D; ++d) out[d] = to_float(from[d]);
  for (; d < K; ++d) out[d] = 0.f;
}

inline float bias_at(const Bias& bias, DType dtype, int64_t e, int64_t c) {
  const int64_t at = e * bias.stride_e + c * bias.stride_c;
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(bias.data)[at];
    case DType::kBFloat16: return to_float(static_cast<const bf16*>(bias.data)[at]);
    case DType::kFloat16: return to_float(static_cast<const fp16*>(bias.data)[at]);
    case DType::kFloat64:
    case DType::kInt32: break;  // refused by the binding
  }
  return 0.f;
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
