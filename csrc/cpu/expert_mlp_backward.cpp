// Gradients of expert_mlp from x, pre and grad alone: one GEMM back through the down weights, whose
// epilogue makes the activation again and gives the gate gradient, one back through the up weights,
// and the weight gradients of the experts that are not frozen.
#include "activation.h"
#include "weight_grad.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

struct Layout {
  const MicroGemm* micro;
  int64_t rows, H, K_d, K_h, panels_f, panels_d, panel_f_bytes, panel_d_bytes;
  int64_t stride_grad, stride_back;  // bytes of a gathered row of grad, of d(pre)
  int64_t stride_pre, stride_a;      // bytes of a row of d(pre), of weight * a, both dtype
  int64_t block_rows, gathered_bytes, turned_bytes;
  int64_t columns;  // of the gradient of x, made in one pass
  int64_t runs, gathered, turned, weights, parts, grad_pre, a, slots, bytes;  // offsets
  bool direct;  // d(pre) is stored as the micro-kernel reads rows

  explicit Layout(const ExpertMlpBackwardParams& p)
      : micro(&micro_gemm(p.dtype)), rows(p.offset[p.E]), H(p.gated ? 2 * p.F : p.F) {
    const int64_t size = bytes_of(p.dtype), read = micro->bf16_rows ? 2 : 4;
    direct = read == size;
    K_d = round_up(p.D, kAlignK), K_h = round_up(H, kAlignK);
    panels_f = ceil_div(p.F, kPanel), panels_d = ceil_div(p.D, kPanel);
    panel_f_bytes = K_d * kPanel * size, panel_d_bytes = K_h * kPanel * size;
    stride_grad = row_stride(K_d, read), stride_back = row_stride(K_h, read);
    stride_pre = row_stride(K_h, size), stride_a = row_stride(p.F, size);
    block_rows = rows_of_block(*micro, p.cache, most(stride_grad, stride_back));
    gathered_bytes = least(block_rows, rows) * most(stride_grad, direct ? 0 : stride_back);
    const int64_t widest = most(most(p.grad_up.M, p.grad_down.M), 1);
    turned_bytes = weight_grad_scratch(*micro, p.offset, p.E, p.cache, widest, size);
    const int64_t items = most(items_at_most(p.E, p.threads, panels_f, panel_f_bytes),
                               items_at_most(p.E, p.threads, panels_d, panel_d_bytes));
    const int64_t run = most(run_buffer(panel_f_bytes), run_buffer(panel_d_bytes));
    runs = round_up(items * int64_t(sizeof(Item)), 64);
    gathered = runs + p.threads * run;
    turned = gathered + p.threads * gathered_bytes;
    weights = turned + p.threads * turned_bytes;
    parts = round_up(weights + rows * 4, 64);
    grad_pre = round_up(parts + rows * panels_f * 4, 64);
    a = grad_pre + rows * stride_pre;
    slots = a + rows * stride_a;
    // Beside d(pre) they are the largest scratch of a step: no more than that.
    columns = columns_of_pass(rows, p.D, least(kSlotBytes / 2, rows * stride_pre));
    bytes = slots + (p.grad_x != nullptr ? rows * columns * 4 : 0);
  }
};

// d phi / d g at g.
template <Phi PHI>
inline vf slope(vf g, float alpha) {
  if constexpr (PHI == Phi::kSilu) {
    const vf s = sigmoid(alpha * g);
    return s + alpha * g * s * (1.f - s);
  } else if constexpr (PHI == Phi::kGelu) {
    const vf tail = 0.5f * erfc(select(g < 0.f, -g, g) * 0.70710678118654752f);
    const vf density = 0.3989422804014327f * exp(-0.5f * g * g);
    return select(g < 0.f, tail, 1.f - tail) + g * density;
  } else if constexpr (PHI == Phi::kGeluTanh) {
    // Beyond 20 the sigmoid is 0 or 1 to the last bit; the clamp keeps g^2 s (1 - s) from inf * 0.
    const vf c = clamp(g, 20.f);
    const vf s = sigmoid(1.5957691216057308f * (c + 0.044715f * c * c * c));
    const vf inner = 1.5957691216057308f * (1.f + 3.f * 0.044715f * c * c);
    return s + c * s * (1.f - s) * inner;
  } else if constexpr (PHI == Phi::kRelu) {
    return select(g > 0.f, splat(1.f), splat(0.f));
  } else {
    return 2.f * select(g <= 0.f, splat(0.f), g);
  }
}

// Elements of one hidden unit run in memory, `step` apart, as floats; zeros behind the last.
template <class Float>
inline void read_run(const Float* from, int64_t step, int64_t count, float (&to)[kPanel]) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = to_float(from[i * step]);
  for (; i < kPanel; ++i) to[i] = 0.f;
}

template <class Float>
inline void write_run(const float (&from)[kPanel], int64_t step, int64_t count, Float* to) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < count; ++i) from_float(from[i], to + i * step);
}

// What a row's part in one panel becomes: a and d(pre), times the row's weight, and the sum of
// d(a) * a, the panel's part of the gate gradient.
template <Phi PHI, class Float>
inline float back_through(const ExpertMlpBackwardParams& p, const float* grad_a, float weight,
                          const Float* pre, int64_t f0, int64_t real, Float* grad_pre, Float* a) {
  alignas(64) float gate[kPanel], up[kPanel], out[kPanel], grad_gate[kPanel], grad_up[kPanel];
  const int64_t step = p.gated && p.interleaved ? 2 : 1, at = f0 * step;
  const int64_t other = !p.gated ? 0 : p.interleaved ? at + 1 : p.F + f0;
  read_run(pre + at, step, real, gate);
  if (p.gated) read_run(pre + other, step, real, up);
  vf total = {};
  for (int64_t u = 0; u < kPanel; u += kLanes) {
    vf d = load(grad_a + u);
    if (real < kPanel) d = select(lane_ids() + int32_t(u) < int32_t(real), d, splat(0.f));
    const vf g = load(gate + u);
    vf value;
    if (p.gated) {
      const vf held = select(g > p.limit, splat(p.limit), g), v = load(up + u);
      const vf factor = clamp(v, p.limit) + p.shift, activated = phi<PHI>(held, p.alpha);
      value = activated * factor;
      const vf into_gate = d * factor * slope<PHI>(held, p.alpha), into_up = d * activated;
      store(grad_gate + u, weight * select(g > p.limit, splat(0.f), into_gate));
      const vi outside = (v > p.limit) | (v < -p.limit);
      store(grad_up + u, weight * select(outside, splat(0.f), into_up));
    } else {
      value = phi<PHI>(g, p.alpha);
      store(grad_gate + u, weight * (d * slope<PHI>(g, p.alpha)));
    }
    store(out + u, weight * value);
    total += d * value;
  }
  write_run(grad_gate, step, real, grad_pre + at);
  if (p.gated) write_run(grad_up, step, real, grad_pre + other);
  write_run(out, 1, real, a + f0);
  return sum(total);
}

template <class Float>
void finish_back(const ExpertMlpBackwardParams& p, const Layout& at, const Block& block,
                 int64_t first, int64_t count, int64_t panel, const float* sums) {
  const int64_t f0 = panel * kPanel, real = least(kPanel, p.F - f0);
  const float* weights = reinterpret_cast<const float*>(p.scratch + at.weights);
  float* parts = reinterpret_cast<float*>(p.scratch + at.parts);
  with_phi(p.phi, [&](auto phi) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = block.first + first + r;
      char* grad_pre = p.scratch + at.grad_pre + n * at.stride_pre;
      if (panel == 0) {
        const int64_t size = sizeof(Float);
        std::memset(grad_pre + at.H * size, 0, (at.K_h - at.H) * size);
      }
      parts[n * at.panels_f + panel] = back_through<phi.value>(
          p, sums + r * kPanel, weights[n], static_cast<const Float*>(p.pre) + n * at.H, f0, real,
          reinterpret_cast<Float*>(grad_pre),
          reinterpret_cast<Float*>(p.scratch + at.a + n * at.stride_a));
    }
  });
}

// grad_weight[t, k] = sum_f d(a) * a, and grad . bias_down; 0 in unused slots.
template <class Float>
void weight_of_slots(const ExpertMlpBackwardParams& p, const Layout& at, const Parallel& threads) {
  const float* parts = reinterpret_cast<const float*>(p.scratch + at.parts);
  parallel_for(threads, p.T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * p.K; slot < end * p.K; ++slot) {
      const int64_t n = p.row[slot];
      float total = 0.f;
      for (int64_t i = 0; n >= 0 && i < at.panels_f; ++i) total += parts[n * at.panels_f + i];
      if (n >= 0 && p.bias_down.data != nullptr) {
        const Float* grad = static_cast<const Float*>(p.grad) + slot / p.K * p.stride_gt;
        int64_t e = 0;
        while (p.offset[e + 1] <= n) ++e;
        float dot = 0.f;
        for (int64_t d = 0; d < p.D; ++d) {
          dot += to_float(grad[d]) * bias_at(p.bias_down, p.dtype, e, d);
        }
        total += dot;
      }
      p.grad_weight[slot] = total;
    }
  });
}

// grad_x[t, d] = sum_k slots[row[t, k], d - from], for the columns of one pass.
template <class Float>
void sum_slots(const ExpertMlpBackwardParams& p, const Layout& at, int64_t from, int64_t begin,
               int64_t end) {
  const int64_t columns = least(at.columns, p.D - from);
  const float* slots = reinterpret_cast<const float*>(p.scratch + at.slots);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* row = p.row + t * p.K;
    Float* out = static_cast<Float*>(p.grad_x) + t * p.D + from;
    for (int64_t d = 0; d < columns; d += kLanes) {
      const int64_t some = least(kLanes, columns - d);
      vf sum = {};
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] < 0) continue;
        const float* slot = slots + row[k] * at.columns + d;
        sum += some == kLanes ? load(slot) : load_some(slot, some, 0.f);
      }
      store_row(out, columns, d, sum);
    }
  }
}

template <class Float>
void gradients(const ExpertMlpBackwardParams& p, const Layout& at, const Parallel& threads) {
  float* weights = reinterpret_cast<float*>(p.scratch + at.weights);
  for (int64_t slot = 0; slot < p.T * p.K; ++slot) {
    if (p.row[slot] >= 0) weights[p.row[slot]] = p.weight[slot];
  }
  // Only the down weights' own gradient needs a alone: then nothing is multiplied.
  const bool back = p.grad_x != nullptr || p.grad_weight != nullptr || p.grad_up.out != nullptr ||
                    p.grad_bias_up != nullptr;
  Gemm gemm = {.micro = at.micro,
               .offset = p.offset,
               .E = p.E,
               .block_rows = at.block_rows,
               .packed = nullptr,
               .stride_packed = 0,
               .raw = &p.raw_down,
               .buffer = p.scratch + at.runs,
               .first_panel = 0,
               .panels = at.panels_f,
               .K = back ? at.K_d : 0,
               .panel_bytes = at.panel_f_bytes,
               .threads = p.threads,
               .items = reinterpret_cast<Item*>(p.scratch)};
  const auto gathered = [&](int64_t thread) {
    return p.scratch + at.gathered + thread * at.gathered_bytes;
  };
  multiply(
      gemm, threads,
      [&](const Block& block, int64_t thread) {
        char* to = gathered(thread);
        for (int64_t r = 0; r < block.rows; ++r) {
          const Float* grad =
              static_cast<const Float*>(p.grad) + p.token[block.first + r] * p.stride_gt;
          copy_row(grad, p.D, at.K_d, at.micro->bf16_rows, to + r * at.stride_grad);
        }
        return Rows{to, at.stride_grad};
      },
      [&](const Block& block, int64_t first, int64_t count, int64_t panel, float* sums) {
        finish_back<Float>(p, at, block, first, count, panel, sums);
      });
  if (p.grad_weight != nullptr) weight_of_slots<Float>(p, at, threads);

  const RowSource x = {static_cast<const char*>(p.x), p.stride_xt * int64_t(sizeof(Float)),
                       p.token};
  const RowSource grad = {static_cast<const char*>(p.grad), p.stride_gt * int64_t(sizeof(Float)),
                          p.token};
  const RowSource grad_pre = {p.scratch + at.grad_pre, at.stride_pre, nullptr};
  const RowSource a = {p.scratch + at.a, at.stride_a, nullptr};
  if (p.grad_x != nullptr) {
    gemm.raw = &p.raw_up;
    gemm.K = at.K_h;
    gemm.panel_bytes = at.panel_d_bytes;
    float* slots = reinterpret_cast<float*>(p.scratch + at.slots);
    for (int64_t d = 0; d < p.D; d += at.columns) {
      gemm.first_panel = d / kPanel;
      gemm.panels = ceil_div(least(at.columns, p.D - d), kPanel);
      multiply(
          gemm, threads,
          [&](const Block& block, int64_t thread) {
            if (at.direct) return Rows{grad_pre.data + block.first * at.stride_pre, at.stride_pre};
            char* to = gathered(thread);
            for (int64_t r = 0; r < block.rows; ++r) {
              copy_row(grad_pre.row<Float>(block.first + r), at.H, at.K_h, false,
                       to + r * at.stride_back);
            }
            return Rows{to, at.stride_back};
          },
          [&](const Block& block, int64_t first, int64_t count, int64_t panel, float* sums) {
            const int64_t d0 = panel * kPanel, real = least(kPanel, p.D - d0);
            for (int64_t r = 0; r < count; ++r) {
              float* to = slots + (block.first + first + r) * at.columns + d0 % at.columns;
              std::memcpy(to, sums + r * kPanel, real * sizeof(float));
            }
          });
      parallel_for(threads, p.T, grain_of(p.K * at.columns * 4),
                   [&](int64_t begin, int64_t end) { sum_slots<Float>(p, at, d, begin, end); });
    }
  }

  using Unit = Frozen::Unit;
  const Frozen none = {nullptr, p.F, Unit::kNone}, units = {p.frozen_ef, p.F, Unit::kSame};
  const Frozen rows = {p.frozen_ef, p.F,
                       !p.gated        ? Unit::kSame
                       : p.interleaved ? Unit::kPairs
                                       : Unit::kHalves};
  WeightGrad of_up = {.micro = at.micro,
                      .offset = p.offset,
                      .frozen_e = p.frozen_e,
                      .E = p.E,
                      .threads = p.threads,
                      .cache = p.cache,
                      .left = p.transposed ? x : grad_pre,
                      .right = p.transposed ? grad_pre : x,
                      .left_frozen = p.transposed ? none : rows,
                      .right_frozen = p.transposed ? rows : none,
                      .to = p.grad_up,
                      .scratch = p.scratch + at.turned,
                      .scratch_bytes = at.turned_bytes};
  weight_grad<Float>(of_up, threads);
  WeightGrad of_down = of_up;
  of_down.left = p.transposed ? a : grad;
  of_down.right = p.transposed ? grad : a;
  of_down.left_frozen = p.transposed ? units : none;
  of_down.right_frozen = p.transposed ? none : units;
  of_down.to = p.grad_down;
  weight_grad<Float>(of_down, threads);
  bias_grad<Float>(grad_pre, nullptr, p.offset, p.frozen_e, rows, p.E, at.H, p.grad_bias_up,
                   threads);
  bias_grad<Float>(grad, weights, p.offset, p.frozen_e, none, p.E, p.D, p.grad_bias_down, threads);
}

}  // namespace

void expert_mlp_backward(const ExpertMlpBackwardParams& p, const Parallel& threads) {
  const Layout at(p);
  if (p.scratch == nullptr) {
    *p.scratch_bytes = at.bytes;
    return;
  }
  switch (p.dtype) {
    case DType::kFloat32: return gradients<float>(p, at, threads);
    case DType::kBFloat16: return gradients<bf16>(p, at, threads);
    case DType::kFloat16: return gradients<fp16>(p, at, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
