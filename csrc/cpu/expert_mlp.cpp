// expert_mlp: gather, up (and gate) GEMM with bias and activation in its epilogue, down GEMM,
// weighted sum over a token's experts in float32, k ascending.
#include "activation.h"
#include "expert_gemm.h"
#include "quantized.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Where everything lies in the scratch memory: work items, packed runs, gathered rows, hidden units
// and one row per slot of a token.
struct Layout {
  const MicroGemm* micro;
  int64_t rows, K_up, K_down;  // of all experts; columns of x and hidden, padded
  int64_t panels_up, panels_down, panel_up_bytes, panel_down_bytes;
  int64_t stride_x, stride_hidden;               // bytes
  int64_t block_rows, gathered_bytes;            // of one block, of a thread
  int64_t columns;                               // of the output, made in one pass
  int64_t runs, gathered, hidden, slots, bytes;  // offsets

  explicit Layout(const ExpertMlpParams& p)
      : micro(&micro_gemm(p.dtype, p.weights)), rows(p.offset[p.E]) {
    const int64_t size = micro->bf16_rows ? 2 : 4, plain = bytes_of(p.dtype);
    K_up = round_up(p.D, kAlignK), K_down = round_up(p.F, kAlignK);
    panels_up = K_down * (p.gated ? 2 : 1) / kPanel, panels_down = ceil_div(p.D, kPanel);
    panel_up_bytes = bytes_of_panel(p.weights, K_up, plain);
    panel_down_bytes = bytes_of_panel(p.weights, K_down, plain);
    stride_x = row_stride(K_up, size), stride_hidden = row_stride(K_down, size);
    block_rows = rows_of_block(*micro, p.cache, most(stride_x, stride_hidden));
    gathered_bytes = least(block_rows, rows) * stride_x;
    const int64_t items = most(items_at_most(p.E, p.threads, panels_up, panel_up_bytes),
                               items_at_most(p.E, p.threads, panels_down, panel_down_bytes));
    const int64_t run = most(run_buffer(panel_up_bytes), run_buffer(panel_down_bytes));
    runs = round_up(items * int64_t(sizeof(Item)), 64);
    gathered = runs + (p.up == nullptr ? p.threads * run : 0);
    hidden = gathered + p.threads * gathered_bytes;
    slots = hidden + rows * stride_hidden;
    columns = columns_of_pass(rows, p.D);
    bytes = slots + rows * columns * 4;
  }
};

template <class Float>
Rows gather(const ExpertMlpParams& p, const Layout& at, const Block& block, int64_t thread) {
  char* to = p.scratch + at.gathered + thread * at.gathered_bytes;
  for (int64_t r = 0; r < block.rows; ++r) {
    const Float* x = static_cast<const Float*>(p.x) + p.token[block.first + r] * p.stride_xt;
    copy_row(x, p.D, at.K_up, at.micro->bf16_rows, to + r * at.stride_x);
  }
  return {to, at.stride_x};
}

// Which column of `pre` and bias_up is the gate (or only) and the up of unit f.
inline int64_t gate_column(const ExpertMlpParams& p, int64_t f) {
  return p.gated && p.interleaved ? 2 * f : f;
}
inline int64_t up_column(const ExpertMlpParams& p, int64_t f) {
  return p.interleaved ? 2 * f + 1 : p.F + f;
}

void add_bias(const ExpertMlpParams& p, int64_t e, int64_t f0, int64_t units, int64_t real,
              int64_t count, float* sums) {
  float bias[kPanel] = {};
  for (int64_t u = 0; u < real; ++u) {
    bias[u] = bias_at(p.bias_up, p.dtype, e, gate_column(p, f0 + u));
    if (p.gated) bias[units + u] = bias_at(p.bias_up, p.dtype, e, up_column(p, f0 + u));
  }
  for (int64_t r = 0; r < count; ++r) {
    float* sum = sums + r * kPanel;
    for (int64_t c = 0; c < kPanel; c += kLanes) store(sum + c, load(sum + c) + load(bias + c));
  }
}

template <class Float>
void keep_pre(const ExpertMlpParams& p, int64_t n, int64_t f0, int64_t units, int64_t real,
              int64_t count, const float* sums) {
  for (int64_t r = 0; r < count; ++r) {
    const float* sum = sums + r * kPanel;
    Float* pre = static_cast<Float*>(p.pre) + (n + r) * (p.gated ? 2 * p.F : p.F);
    if (p.gated && p.interleaved) {
      for (int64_t u = 0; u < real; ++u) {
        from_float(sum[u], pre + 2 * (f0 + u));
        from_float(sum[units + u], pre + 2 * (f0 + u) + 1);
      }
      continue;
    }
    for (int64_t u = 0; u < real; u += kLanes) {
      store_row(pre + f0, real, u, load(sum + u));
      if (p.gated) store_row(pre + p.F + f0, real, u, load(sum + units + u));
    }
  }
}

// The activation of `count` rows of sums, into rows of `stride` bytes from `hidden` on.
template <Phi PHI, bool GATED, class Hidden>
void activate(const ExpertMlpParams& p, const float* sums, int64_t count, char* hidden,
              int64_t stride) {
  constexpr int64_t kUnits = GATED ? kPanel / 2 : kPanel;
  for (int64_t r = 0; r < count; ++r) {
    const float* sum = sums + r * kPanel;
    Hidden* to = reinterpret_cast<Hidden*>(hidden + r * stride);
#pragma GCC unroll 8
    for (int64_t u = 0; u < kUnits; u += kLanes) {
      vf gate = load(sum + u);
      if constexpr (GATED) {
        gate = select(gate > p.limit, splat(p.limit), gate);
        const vf factor = clamp(load(sum + kUnits + u), p.limit) + p.shift;
        store(to + u, phi<PHI>(gate, p.alpha) * factor);
      } else {
        store(to + u, phi<PHI>(gate, p.alpha));
      }
    }
  }
}

// Bias, pre and activation of one tile of the up GEMM.
template <class Float>
void finish_up(const ExpertMlpParams& p, const Layout& at, const Block& block, int64_t first,
               int64_t count, int64_t panel, float* sums) {
  const int64_t units = p.gated ? kPanel / 2 : kPanel, f0 = panel * units;
  const int64_t real = least(units, p.F - f0), n = block.first + first;
  if (p.bias_up.data != nullptr) add_bias(p, block.expert, f0, units, real, count, sums);
  if (p.pre != nullptr) keep_pre<Float>(p, n, f0, units, real, count, sums);
  const int64_t size = at.micro->bf16_rows ? 2 : 4;
  char* hidden = p.scratch + at.hidden + n * at.stride_hidden + f0 * size;
  with_phi(p.phi, [&](auto phi) {
    if (p.gated) {
      if (size == 2)
        return activate<phi.value, true, bf16>(p, sums, count, hidden, at.stride_hidden);
      return activate<phi.value, true, float>(p, sums, count, hidden, at.stride_hidden);
    }
    if (size == 2)
      return activate<phi.value, false, bf16>(p, sums, count, hidden, at.stride_hidden);
    return activate<phi.value, false, float>(p, sums, count, hidden, at.stride_hidden);
  });
  // The padding multiplies weights of 0: it must not hold what NaN or infinity made of it.
  for (int64_t r = 0; real < units && r < count; ++r) {
    std::memset(hidden + r * at.stride_hidden + real * size, 0, (units - real) * size);
  }
}

void finish_down(const ExpertMlpParams& p, const Layout& at, const Block& block, int64_t first,
                 int64_t count, int64_t panel, float* sums) {
  const int64_t d0 = panel * kPanel, real = least(kPanel, p.D - d0);
  float* slots = reinterpret_cast<float*>(p.scratch + at.slots);
  for (int64_t c = 0; p.bias_down.data != nullptr && c < real; ++c) {
    const float bias = bias_at(p.bias_down, p.dtype, block.expert, d0 + c);
    for (int64_t r = 0; r < count; ++r) sums[r * kPanel + c] += bias;
  }
  for (int64_t r = 0; r < count; ++r) {
    float* to = slots + (block.first + first + r) * at.columns + d0 % at.columns;
    if (real == kPanel) {
      for (int64_t c = 0; c < kPanel; c += kLanes) store(to + c, load(sums + r * kPanel + c));
    } else {
      std::memcpy(to, sums + r * kPanel, real * sizeof(float));
    }
  }
}

// out[t, d] = sum_k weight[t, k] * slots[row[t, k], d - from], for the columns of one pass.
template <class Float>
void combine_slots(const ExpertMlpParams& p, const Layout& at, int64_t from, int64_t begin,
                   int64_t end) {
  const int64_t columns = least(at.columns, p.D - from);
  for (int64_t t = begin; t < end; ++t) {
    const float* weight = p.weight + t * p.K;
    const int32_t* row = p.row + t * p.K;
    const float* slots = reinterpret_cast<const float*>(p.scratch + at.slots);
    Float* out = static_cast<Float*>(p.out) + t * p.D + from;
    int64_t d = 0;
    for (; d + kLanes <= columns; d += kLanes) {
      vf sum = {};
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] >= 0) sum += weight[k] * load(slots + row[k] * at.columns + d);
      }
      store(out + d, sum);
    }
    for (; d < columns; ++d) {
      float sum = 0.f;
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] >= 0) sum += weight[k] * slots[row[k] * at.columns + d];
      }
      from_float(sum, out + d);
    }
  }
}

template <class Float>
void layer(const ExpertMlpParams& p, const Layout& at, const Parallel& threads) {
  Gemm gemm = {.micro = at.micro,
               .offset = p.offset,
               .E = p.E,
               .block_rows = at.block_rows,
               .packed = p.up,
               .stride_packed = p.stride_packed,
               .raw = p.up == nullptr ? &p.raw_up : nullptr,
               .buffer = p.scratch + at.runs,
               .first_panel = 0,
               .panels = at.panels_up,
               .K = at.K_up,
               .panel_bytes = at.panel_up_bytes,
               .threads = p.threads,
               .items = reinterpret_cast<Item*>(p.scratch)};
  multiply(
      gemm, threads,
      [&](const Block& block, int64_t thread) { return gather<Float>(p, at, block, thread); },
      [&](const Block& block, int64_t first, int64_t count, int64_t panel, float* sums) {
        finish_up<Float>(p, at, block, first, count, panel, sums);
      });
  gemm.packed = p.down;
  gemm.raw = p.down == nullptr ? &p.raw_down : nullptr;
  gemm.K = at.K_down;
  gemm.panel_bytes = at.panel_down_bytes;
  for (int64_t d = 0; d < p.D; d += at.columns) {
    gemm.first_panel = d / kPanel;
    gemm.panels = ceil_div(least(at.columns, p.D - d), kPanel);
    multiply(
        gemm, threads,
        [&](const Block& block, int64_t) {
          return Rows{p.scratch + at.hidden + block.first * at.stride_hidden, at.stride_hidden};
        },
        [&](const Block& block, int64_t first, int64_t count, int64_t panel, float* sums) {
          finish_down(p, at, block, first, count, panel, sums);
        });
    parallel_for(threads, p.T, grain_of(p.K * at.columns * 4),
                 [&](int64_t begin, int64_t end) { combine_slots<Float>(p, at, d, begin, end); });
  }
}

}  // namespace

void expert_mlp(const ExpertMlpParams& p, const Parallel& threads) {
  const Layout at(p);
  if (p.scratch == nullptr) {
    *p.scratch_bytes = at.bytes;
    return;
  }
  switch (p.dtype) {
    case DType::kFloat32: return layer<float>(p, at, threads);
    case DType::kBFloat16: return layer<bf16>(p, at, threads);
    case DType::kFloat16: return layer<fp16>(p, at, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
