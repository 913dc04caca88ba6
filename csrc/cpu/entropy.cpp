// entropy and its backward: two passes over a row that stays in cache, three for the gradient.
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

template <class Float>
void entropy_rows(const EntropyParams& p, int64_t begin, int64_t end) {
  const Float* logits = static_cast<const Float*>(p.logits);
  for (int64_t row = begin; row < end; ++row) {
    p.out[row] = moments(logits + row * p.C, p.C, static_cast<float*>(nullptr)).entropy();
  }
}

template <class Float>
void entropy_backward_rows(const EntropyBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Float* logits = static_cast<const Float*>(p.logits) + row * p.C;
    Float* grad_logits = static_cast<Float*>(p.grad_logits) + row * p.C;
    const Moments m = moments(logits, p.C, static_cast<float*>(nullptr));
    const float mean_z = m.mean_z();
    // n <= 1: no slope, but NaN stays NaN.
    const float scale = m.n > 1 ? -p.grad[row] * m.inverse_total() / m.log_n() : 0.f * m.rest;
    for_row(logits, p.C, -kInfinity, [&](int64_t c, vf x) {
      const vf z = x - m.shift;
      const vf slope = exp(z) * (z - mean_z) * scale;
      store_row(grad_logits, p.C, c, select(x == -kInfinity, splat(0.f * m.rest), slope));
    });
  }
}

}  // namespace

void entropy(const EntropyParams& p, const Parallel& threads) {
  const int64_t grain = grain_of(p.C * bytes_of(p.dtype));
  parallel_for(threads, p.rows, grain, [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return entropy_rows<float>(p, begin, end);
      case DType::kBFloat16: return entropy_rows<bf16>(p, begin, end);
      case DType::kFloat16: return entropy_rows<fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
}

void entropy_backward(const EntropyBackwardParams& p, const Parallel& threads) {
  const int64_t grain = grain_of(2 * p.C * bytes_of(p.dtype));
  parallel_for(threads, p.rows, grain, [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return entropy_backward_rows<float>(p, begin, end);
      case DType::kBFloat16: return entropy_backward_rows<bf16>(p, begin, end);
      case DType::kFloat16: return entropy_backward_rows<fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
