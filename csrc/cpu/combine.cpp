// combine and its backward: memory bound, so one pass over the rows and float32 sums in registers.
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Columns held in registers while the K rows of a token stream past.
constexpr int kBlock = 4;

// Vectors that a dot product is summed in: 32 partial sums at every level, for their small error.
constexpr int kDot = 32 / kLanes;

template <class Float>
void combine_tokens(const CombineParams& p, int64_t begin, int64_t end) {
  const Float* y = static_cast<const Float*>(p.y);
  for (int64_t t = begin; t < end; ++t) {
    const float* weight = p.weight + t * p.K;
    const int32_t* row = p.row + t * p.K;
    Float* out = static_cast<Float*>(p.out) + t * p.D;
    int64_t d = 0;
    for (; d + kBlock * kLanes <= p.D; d += kBlock * kLanes) {
      vf acc[kBlock] = {};
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] < 0) continue;
        const Float* from = y + row[k] * p.stride_yn + d;
        const vf w = splat(weight[k]);
        for (int b = 0; b < kBlock; ++b) acc[b] += w * load(from + b * kLanes);
      }
      for (int b = 0; b < kBlock; ++b) store(out + d + b * kLanes, acc[b]);
    }
    for (; d + kLanes <= p.D; d += kLanes) {
      vf acc = {};
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] >= 0) acc += splat(weight[k]) * load(y + row[k] * p.stride_yn + d);
      }
      store(out + d, acc);
    }
    for (; d < p.D; ++d) {
      float acc = 0.f;
      for (int64_t k = 0; k < p.K; ++k) {
        if (row[k] >= 0) acc += weight[k] * to_float(y[row[k] * p.stride_yn + d]);
      }
      from_float(acc, out + d);
    }
  }
}

template <class Float>
void combine_backward_tokens(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  const Float* y = static_cast<const Float*>(p.y);
  Float* grad_y = static_cast<Float*>(p.grad_y);
  for (int64_t t = begin; t < end; ++t) {
    const Float* grad = static_cast<const Float*>(p.grad) + t * p.stride_gt;
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t slot = t * p.K + k;
      const int64_t row = p.row[slot];
      p.grad_weight[slot] = 0.f;
      if (row < 0) continue;
      const Float* from = y + row * p.stride_yn;
      Float* to = grad_y + row * p.D;
      const vf w = splat(p.weight[slot]);
      vf dot[kDot] = {};
      int64_t d = 0;
      for (; d + kDot * kLanes <= p.D; d += kDot * kLanes) {
        for (int b = 0; b < kDot; ++b) {
          const vf g = load(grad + d + b * kLanes);
          store(to + d + b * kLanes, w * g);
          dot[b] += g * load(from + d + b * kLanes);
        }
      }
      float tail = 0.f;
      for (; d < p.D; ++d) {
        const float g = to_float(grad[d]);
        from_float(p.weight[slot] * g, to + d);
        tail += g * to_float(from[d]);
      }
      for (int b = 1; b < kDot; ++b) dot[0] += dot[b];
      p.grad_weight[slot] = sum(dot[0]) + tail;
    }
  }
}

}  // namespace

void combine(const CombineParams& p, const Parallel& threads) {
  const int64_t grain = grain_of((p.K + 1) * p.D * bytes_of(p.dtype));
  parallel_for(threads, p.T, grain, [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return combine_tokens<float>(p, begin, end);
      case DType::kBFloat16: return combine_tokens<bf16>(p, begin, end);
      case DType::kFloat16: return combine_tokens<fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
}

void combine_backward(const CombineBackwardParams& p, const Parallel& threads) {
  const int64_t grain = grain_of((2 * p.K + 1) * p.D * bytes_of(p.dtype));
  parallel_for(threads, p.T, grain, [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return combine_backward_tokens<float>(p, begin, end);
      case DType::kBFloat16: return combine_backward_tokens<bf16>(p, begin, end);
      case DType::kFloat16: return combine_backward_tokens<fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
