// What route and its backward know of all tokens: sums over experts, by one warp.
#pragma once

#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kFinishRows = 16;  // blocks that are added up side by side

// The sum over a warp, of doubles.
__device__ inline double warp_total(double x) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
  return x;
}

struct Variation {
  double mean, cv2;  // squared coefficient of variation of numbers of the live experts
};

// Of x(e), which is 0 for the others; whether e is one of the `live_experts` says live(e).
template <typename Row, typename Live>
__device__ Variation variation(int64_t E, double live_experts, const Row& x, const Live& live) {
  double total = 0, square = 0;
  for (int64_t e = threadIdx.x; e < E; e += kWarp) total += double(x(e));
  const double mean = warp_total(total) / live_experts;
  for (int64_t e = threadIdx.x; e < E; e += kWarp) {
    const double apart = live(e) ? double(x(e)) - mean : 0.0;
    square += apart * apart;
  }
  square = warp_total(square) / live_experts;
  return {mean, mean == 0 ? 0.0 : square / (mean * mean)};
}

}  // namespace
}  // namespace gose::cuda
