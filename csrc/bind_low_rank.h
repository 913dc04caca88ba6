// Checks and allocation of low_rank on the CPU.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "bind_routing.h"

namespace gose {

inline void check_low_rank(const Tensor& x, const Tensor& q,
                           const std::optional<Tensor>& residual) {
  const char* op = "low_rank";
  if (x.dim() != 2 || !is_floating(x)) {
    refuse(op, ": x_MN must be floating point with 2 dimensions, got ", dtype_name(x.scalar_type()),
           " of shape ", shape_of(x));
  }
  const int64_t M = x.size(0), N = x.size(1);
  if (q.dim() != 2 || q.size(0) != N || q.scalar_type() != ScalarType::Float) {
    refuse(op, ": q_NR must be torch.float32 of shape (", N, ", R), got ",
           dtype_name(q.scalar_type()), " of shape ", shape_of(q));
  }
  const int64_t R = q.size(1);
  if (R < 1 || R * (M + N) >= M * N) {
    refuse(op, ": rank R=", R, " must be at least 1 and send less than the matrix, ",
           "R * (M + N) < M * N, got ", R * (M + N), " and ", M * N);
  }
  if (residual && (residual->dim() != 2 || residual->size(0) != M || residual->size(1) != N ||
                   residual->scalar_type() != ScalarType::Float)) {
    refuse(op, ": residual_MN must be torch.float32 of shape ", shape_of(x), ", got ",
           dtype_name(residual->scalar_type()), " of shape ", shape_of(*residual));
  }
}

// kernel: low_rank of the level in use.
template <class Kernel>
inline std::tuple<Tensor, Tensor, Tensor> low_rank(const Tensor& x_MN, const Tensor& q_NR,
                                                   const std::optional<Tensor>& residual_MN,
                                                   const Kernel& kernel) {
  check_low_rank(x_MN, q_NR, residual_MN);
  const DType dtype = float_dtype("low_rank", "x_MN", x_MN);
  const auto padded = [](int64_t count, int64_t to) { return (count + to - 1) / to * to; };
  const int64_t M = x_MN.size(0), N = x_MN.size(1), R = q_NR.size(1);
  const int64_t padded_M = padded(M, 16), padded_N = padded(N, 32), padded_R = padded(R, 4);
  const Tensor x = rows_contiguous(x_MN), q = torch::stable::contiguous(q_NR);
  const Tensor residual = residual_MN ? torch::stable::contiguous(*residual_MN) : q;
  Tensor p_MR = torch::stable::new_empty(q, {M, R}), new_q_NR = torch::stable::new_empty(q, {N, R});
  Tensor left = torch::stable::new_empty(q, {residual_MN ? M : 0, residual_MN ? N : 0});
  if (residual_MN) left = on_huge_pages(left, 4 * M * N);
  std::vector<double> image(padded_R * padded_M), reflect(R * padded_M), beta(R);
  std::vector<float> p_RM(padded_R * padded_M);
  std::vector<float> q_RN(padded_R * padded_N);
  const float* old = static_cast<const float*>(q.const_data_ptr());
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t r = 0; r < R; ++r) q_RN[r * padded_N + n] = old[n * R + r];
  }
  std::vector<CodeBad> bad((M + 3) / 4, CodeBad{-1, 0.f});
  kernel({
      .x = x.const_data_ptr(),
      .residual = residual_MN ? static_cast<const float*>(residual.const_data_ptr()) : nullptr,
      .q = q_RN.data(),
      .image = image.data(),
      .reflect = reflect.data(),
      .beta = beta.data(),
      .p_RM = p_RM.data(),
      .p_MR = static_cast<float*>(p_MR.mutable_data_ptr()),
      .q_NR = static_cast<float*>(new_q_NR.mutable_data_ptr()),
      .left = residual_MN ? static_cast<float*>(left.mutable_data_ptr()) : nullptr,
      .bad = bad.data(),
      .M = M,
      .N = N,
      .R = R,
      .padded_M = padded_M,
      .padded_N = padded_N,
      .padded_R = padded_R,
      .stride_xm = x.stride(0),
      .dtype = dtype,
  });
  for (const CodeBad& b : bad) {
    if (b.element < 0) continue;
    const char* text = std::isnan(b.value) ? "nan" : b.value > 0 ? "inf" : "-inf";
    refuse("low_rank: x_MN + residual_MN must be finite, element (", b.element / N, ", ",
           b.element % N, ") is ", text);
  }
  return {p_MR, new_q_NR, left};
}

}  // namespace gose
