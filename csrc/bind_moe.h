// A whole layer: scores, routing and experts in one call.
#pragma once

#include <cstring>
#include <optional>

#include "bind_mlp.h"
#include "bind_route.h"

namespace gose {

// What a layer ranks its experts by.
struct MoeScores {
  std::optional<Tensor> packed_router_1B, logits_TE;  // at most one; without, zeros
};

// x . router^T: a grouped GEMM of one group, its sums kept in float32.
inline void run_router(const MlpCall& call, const Tensor& packed_router, void* score,
                       int64_t num_threads, const cpu::Parallel& threads) {
  check_dim("moe", "packed_router", packed_router, 2);
  const bool own = packed_router.size(1) == panel_bytes(call.E, call.D, false, call.dtype);
  const DType dtype_w = own ? call.dtype : DType::kFloat32;
  check_packed("moe", packed_router, 1, panel_bytes(call.E, call.D, false, dtype_w));
  const int32_t offset[2] = {0, int32_t(call.T)};
  GroupedGemmParams params = {
      .x = call.x.const_data_ptr(),
      .offset = offset,
      .w = static_cast<const char*>(packed_router.const_data_ptr()),
      .raw = {},
      .bias = {nullptr, 0, 0},
      .y = score,
      .scratch = nullptr,
      .scratch_bytes = nullptr,
      .N = call.T,
      .E = 1,
      .D = call.D,
      .F = call.E,
      .stride_xn = call.x.stride(0),
      .stride_packed = packed_router.stride(0),
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .dtype = call.dtype,
      .dtype_w = dtype_w,
      .dtype_y = DType::kFloat32,
  };
  run_with_scratch(cpu::kernels().grouped_gemm, params, threads);
}

inline Tensor scores_of(const MlpCall& call, const MoeScores& given, int64_t num_threads,
                        const cpu::Parallel& threads) {
  const int64_t T = call.T, E = call.E;
  if (given.logits_TE) {
    const Tensor& logits = *given.logits_TE;
    if (logits.dim() != 2 || logits.size(0) != T || logits.size(1) != E || !is_floating(logits)) {
      refuse("moe: logits_TE must be floating point of shape (", T, ", ", E, "), got ",
             dtype_name(logits.scalar_type()), " of shape ", shape_of(logits));
    }
    const bool wide = logits.scalar_type() == ScalarType::Double;
    return wide ? torch::stable::to(logits, ScalarType::Float) : logits;
  }
  NewTensor score({T, E}, ScalarType::Float);
  if (given.packed_router_1B) {
    run_router(call, *given.packed_router_1B, score.data(), num_threads, threads);
  } else if (T * E > 0) {
    std::memset(score.data(), 0, T * E * sizeof(float));
  }
  return score.tensor();
}

}  // namespace gose
