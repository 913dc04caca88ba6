// One GEMM of all experts: the rows of every expert times its weights, packed or as they are.
//
// Work items are (expert, run of panels), longer runs for experts with fewer rows, claimed one by
// one, so uneven experts spread over the threads. An item's rows come in blocks that stay in the
// second-level cache while the panels stream past. An element of the result is one thread's sum
// over all of K: its bits depend neither on the threads nor on the other rows.
#pragma once

#include "microgemm.h"
#include "pack.h"
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

struct Block {  // rows [first, first + rows) of all experts' sorted rows
  int64_t expert, first, rows;
};

// Rows that leave two fifths of the second-level cache to panels and sums.
inline int64_t rows_of_block(const MicroGemm& micro, int64_t cache, int64_t stride) {
  return most(1, least(cache * 3 / 5 / stride, 480) / micro.rows) * micro.rows;
}

struct Item {
  int32_t expert, first, end;  // panels
};

struct Gemm {
  const MicroGemm* micro;
  const int32_t* offset;  // [E1] rows of the experts
  int64_t E;
  int64_t block_rows;  // at most, of one block
  const char* packed;  // expert 0's panels, or null
  int64_t stride_packed;
  const PackParams* raw;        // the weights themselves, packed run by run where there is no copy
  char* buffer;                 // of every thread, for one run: kRunBytes
  int64_t first_panel, panels;  // which are multiplied
  int64_t K, panel_bytes, threads;
  Item* items;  // room for items_at_most()
};

// Of the sums of all rows, one row per slot of a token, this much is kept at a time: all of them
// would be a layer's largest scratch.
constexpr int64_t kSlotBytes = int64_t{32} << 20;

// Columns of D that a pass makes; whole panels. Weights that are packed as they are read come in
// pieces of rows this wide: at 256 columns the backward took 5 % longer than at 1024.
inline int64_t columns_of_pass(int64_t rows, int64_t D, int64_t bytes = kSlotBytes) {
  const int64_t fitting = bytes / 4 / most(rows, 1) / kPanel * kPanel;
  return least(D, most(fitting, 16 * kPanel));
}

// Weights that a thread packs at a time: a part of the last-level cache.
constexpr int64_t kRunBytes = int64_t{2} << 20;

constexpr int64_t kItemsPerThread = 32;
inline int64_t items_at_most(int64_t E, int64_t threads, int64_t panels, int64_t panel_bytes) {
  const int64_t by_bytes = E * ceil_div(panels * panel_bytes, kRunBytes / 2);
  return 2 * (kItemsPerThread * threads + E) + by_bytes;
}
inline int64_t run_buffer(int64_t panel_bytes) { return most(kRunBytes, panel_bytes); }

// Enough items for an even end; a run has no fewer than 16 panels, lest gathering the rows again
// for each shows, but for experts of few rows, where 128 KB of weights are plenty of work.
inline int64_t make_items(const Gemm& g) {
  const int64_t all = g.offset[g.E] * g.panels;
  const int64_t share = most(1, all / (kItemsPerThread * g.threads));  // rows x panels of an item
  const int64_t fewest = ceil_div(int64_t{128} << 10, most(g.panel_bytes, 1));
  const int64_t fitting = g.raw != nullptr ? most(1, kRunBytes / most(g.panel_bytes, 1)) : g.panels;
  int64_t count = 0;
  for (int64_t e = 0; e < g.E; ++e) {
    const int64_t rows = g.offset[e + 1] - g.offset[e];
    if (rows == 0) continue;
    const int64_t floor = rows <= 16 ? fewest : most(fewest, 16);
    const int64_t run = least(least(g.panels, fitting), most(floor, share / rows));
    const int64_t runs = ceil_div(g.panels, most(run, 1));
    for (int64_t i = 0; i < runs; ++i) {
      g.items[count++] = {int32_t(e), int32_t(g.first_panel + g.panels * i / runs),
                          int32_t(g.first_panel + g.panels * (i + 1) / runs)};
    }
  }
  return count;
}

struct Rows {
  const char* data;
  int64_t stride;  // bytes
};

struct Ahead {
  const char* first;
  int64_t lines;
};

// What call i of a panel fetches while it multiplies. A panel that is used once slides a window
// ahead of itself; the one that follows a panel that is used often is fetched in equal shares.
// Measured with vdpbf16ps, two threads, panels from memory: 12 rows 26 GB/s without, 63 with 16 KB
// ahead; 24 rows 490 GFLOP/s without, 844 with the next panel. Up to 4 rows the CPU's own
// prefetchers keep up (62 to 69 GB/s).
inline Ahead ahead_of(const Gemm& g, const char* panel, int64_t rows, int64_t i, int64_t pieces,
                      const char* following) {
  const int64_t lines = g.panel_bytes / 64;
  if (pieces == 1) return {panel + 16384, rows <= 4 ? 0 : lines};
  if (following == nullptr) return {nullptr, 0};
  const int64_t begin = lines * i / pieces;
  return {following + 64 * begin, lines * (i + 1) / pieces - begin};
}

// The first panel of a packed item; null for weights that are packed as they are read.
inline const char* first_panel_of(const Gemm& g, const Item& item) {
  if (g.raw != nullptr) return nullptr;
  return g.packed + item.expert * g.stride_packed + item.first * g.panel_bytes;
}

// rows_of(block, thread) -> Rows; done(block, first, count, panel, sums) takes count x 32 sums of
// rows [first, first + count) of the block.
template <class RowsOf, class Done>
inline void multiply(const Gemm& g, const Parallel& threads, const RowsOf& rows_of,
                     const Done& done) {
  const int64_t items = make_items(g);
  int64_t next = 0;
  parallel_for(threads, least(g.threads, items), 1, [&](int64_t thread, int64_t) {
    alignas(64) float sums[kMostRows * kPanel];
    Rows rows = {};
    int64_t held = -1;
    for (;;) {
      const int64_t claimed = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (claimed >= items) return;
      const Item& item = g.items[claimed];
      const char* weights = first_panel_of(g, item);
      if (g.raw != nullptr) {
        char* run = g.buffer + thread * run_buffer(g.panel_bytes);
        pack_run(*g.raw, item.expert, item.first, item.end - item.first, run);
        weights = run;
      }
      const int64_t begin = g.offset[item.expert], all = g.offset[item.expert + 1] - begin;
      const int64_t blocks = ceil_div(all, g.block_rows);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = all * b / blocks;
        const Block block = {item.expert, begin + first, all * (b + 1) / blocks - first};
        if (held != block.first) rows = rows_of(block, thread);
        held = block.first;
        const int64_t pieces = ceil_div(block.rows, g.micro->rows);
        for (int64_t panel = item.first; panel < item.end; ++panel) {
          const char* at = weights + (panel - item.first) * g.panel_bytes;
          const char* following = at + g.panel_bytes;
          if (panel + 1 == item.end) {
            // The next item is a guess, which another thread may claim first.
            const int64_t likely = __atomic_load_n(&next, __ATOMIC_RELAXED);
            following = b + 1 < blocks   ? weights
                        : likely < items ? first_panel_of(g, g.items[likely])
                                         : nullptr;
          }
          for (int64_t i = 0; i < pieces; ++i) {
            const int64_t from = block.rows * i / pieces, to = block.rows * (i + 1) / pieces;
            const Ahead ahead = ahead_of(g, at, block.rows, i, pieces, following);
            g.micro->run(rows.data + from * rows.stride, rows.stride, int32_t(to - from), at, g.K,
                         sums, ahead.first, ahead.lines);
            done(block, from, to - from, panel, sums);
          }
        }
      }
    }
  });
}

// Row `from` of D elements as the micro-kernel takes it, zeros up to K.
template <class Float>
inline void copy_row(const Float* from, int64_t D, int64_t K, bool bf16_rows, char* to) {
  if (bf16_rows || sizeof(Float) == 4) {
    if (D > 0) std::memcpy(to, from, D * sizeof(Float));
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
