// One plain struct per op: pointers, sizes, strides, dtype. All that kernels see: no torch here.
//
// Letters: T tokens, E experts, K experts per token, N = T*K rows, D width, F hidden, C classes,
// M modules, E1 = E+1. Strides count elements; the last dimension is contiguous unless a stride is
// given for it. Outputs are contiguous.
#pragma once

#include <cstdint>

namespace gose {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32 };

struct CombineParams {  // out[t, d] = sum_k weight[t, k] * y[row[t, k], d], k ascending
  const void* y;        // [N, D] dtype
  const float* weight;  // [T, K]
  const int32_t* row;   // [T, K] in [0, N), -1 = unused
  void* out;            // [T, D] dtype, written once
  int64_t T, D, K, stride_yn;
  DType dtype;
};

struct CombineBackwardParams {  // grad_y[row[t,k]] = weight[t,k] * grad[t], grad_weight = grad . y
  const void* grad;             // [T, D] dtype
  const void* y;                // [N, D] dtype
  const float* weight;          // [T, K]
  const int32_t* row;           // [T, K], every row of y in one slot at most
  void* grad_y;                 // [N, D] dtype, zeroed by the caller: unused rows stay 0
  float* grad_weight;           // [T, K], 0 in unused slots
  int64_t T, D, K, stride_gt, stride_yn;
  DType dtype;
};

}  // namespace gose
