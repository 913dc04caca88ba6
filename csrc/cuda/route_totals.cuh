// What route and its backward know of all tokens: sums over experts, by one warp.
#pragma once

#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kFinishRows = 16;  // blocks that are added up side by side

struct Variation {
  double mean, cv2;  // squared coefficient of variation of numbers of the live experts
};

// Of x(e), which is 0 for the others; whether e is one of the `live_experts` says live(e).
template <typename Row, typename Live>
__device__ Variation variation(int64_t E, double live_experts, const Row& x, const Live& live) {
  double total = 0, square = 0;
  for (int64_t e = threadIdx.x; e < E; e += kWarp) total += double(x(e));
  const double mean = warp_sum(total) / live_experts;
  for (int64_t e = threadIdx.x; e < E; e += kWarp) {
    const double apart = live(e) ? double(x(e)) - mean : 0.0;
    square += apart * apart;
  }
  square = warp_sum(square) / live_experts;
  return {mean, mean == 0 ? 0.0 : square / (mean * mean)};
}

}  // namespace
}  // namespace gose::cuda
