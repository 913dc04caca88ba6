// Gradients of grouped_gemm's weights and bias.
#include "weight_grad.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

template <class Float>
void gradients(const GroupedGemmBackwardParams& p, const MicroGemm& micro, int64_t bytes,
               const Parallel& threads) {
  const Frozen none = {nullptr, 0, Frozen::Unit::kNone};
  const RowSource grad = {static_cast<const char*>(p.grad), p.stride_gn * int64_t(sizeof(Float)),
                          nullptr};
  const RowSource x = {static_cast<const char*>(p.x), p.stride_xn * int64_t(sizeof(Float)),
                       nullptr};
  weight_grad<Float>({.micro = &micro,
                      .offset = p.offset,
                      .frozen_e = nullptr,
                      .E = p.E,
                      .threads = p.threads,
                      .cache = p.cache,
                      .left = p.transposed ? x : grad,
                      .right = p.transposed ? grad : x,
                      .left_frozen = none,
                      .right_frozen = none,
                      .to = p.grad_w,
                      .scratch = p.scratch,
                      .scratch_bytes = bytes},
                     threads);
  bias_grad<Float>(grad, nullptr, p.offset, nullptr, none, p.E, p.F, p.grad_bias, threads);
}

}  // namespace

void grouped_gemm_backward(const GroupedGemmBackwardParams& p, const Parallel& threads) {
  const MicroGemm& micro = micro_gemm(p.dtype);
  const int64_t bytes =
      weight_grad_scratch(micro, p.offset, p.E, p.cache, p.grad_w.M, bytes_of(p.dtype));
  if (p.scratch == nullptr) {
    *p.scratch_bytes = p.threads * bytes;
    return;
  }
  switch (p.dtype) {
    case DType::kFloat32: return gradients<float>(p, micro, bytes, threads);
    case DType::kBFloat16: return gradients<bf16>(p, micro, bytes, threads);
    case DType::kFloat16: return gradients<fp16>(p, micro, bytes, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
