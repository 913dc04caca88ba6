#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreads = 128;
// 64 registers a thread. Left alone, ptxas aims at 40 on sm_100a and spills.
constexpr int kBlocksPerMultiprocessor = 8;

// One thread per token and kLanes columns: threadIdx.x walks columns, threadIdx.y tokens. Reads K
// rows, writes one: memory bound, no row is shared between tokens, so no shared memory.
template <typename Float, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(const CombineParams p) {
  using Lanes = Vector<Float, kLanes>;
  const int64_t t = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t d = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kLanes;
  if (t >= p.T || d >= p.D) return;
  const Float* __restrict__ y = static_cast<const Float*>(p.y) + d;
  const float* __restrict__ weight = p.weight + t * p.K;
  const int32_t* __restrict__ row = p.row + t * p.K;
  float sum[kLanes] = {};
#pragma unroll 4
  for (int64_t k = 0; k < p.K; ++k) {
    const int64_t n = row[k];
    if (n < 0) continue;
    const Lanes values = *reinterpret_cast<const Lanes*>(y + n * p.stride_yn);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum[i] += weight[k] * to_float(values.lane[i]);
  }
  Lanes out;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) out.lane[i] = from_float<Float>(sum[i]);
  *reinterpret_cast<Lanes*>(static_cast<Float*>(p.out) + t * p.D + d) = out;
}

// One warp per slot: it alone reads and writes that row, and sums grad . y in a fixed order.
template <typename Float, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_backward_kernel(const CombineBackwardParams p) {
  using Lanes = Vector<Float, kLanes>;
  const int64_t slot = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (slot >= p.T * p.K) return;
  const int64_t n = p.row[slot];
  if (n < 0) {
    if (threadIdx.x == 0) p.grad_weight[slot] = 0.0f;
    return;
  }
  const Float* __restrict__ grad = static_cast<const Float*>(p.grad) + slot / p.K * p.stride_gt;
  const Float* __restrict__ y = static_cast<const Float*>(p.y) + n * p.stride_yn;
  Float* __restrict__ grad_y = static_cast<Float*>(p.grad_y) + n * p.D;
  const float weight = p.weight[slot];
  float sum = 0.0f;
  for (int64_t d = int64_t(threadIdx.x) * kLanes; d < p.D; d += kWarp * kLanes) {
    const Lanes grads = *reinterpret_cast<const Lanes*>(grad + d);
    const Lanes values = *reinterpret_cast<const Lanes*>(y + d);
    Lanes out;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float g = to_float(grads.lane[i]);
      sum += g * to_float(values.lane[i]);
      out.lane[i] = from_float<Float>(weight * g);
    }
    *reinterpret_cast<Lanes*>(grad_y + d) = out;
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.grad_weight[slot] = sum;
}

template <typename Float, int kLanes>
cudaError_t launch_combine(const CombineParams& p, cudaStream_t stream) {
  // Narrow rows share a block, so that it has kThreads threads at any width.
  const int64_t vectors = p.D / kLanes;
  int columns = 1;
  while (columns < kThreads && columns < vectors) columns *= 2;
  const int tokens = kThreads / columns;
  return launch(&combine_kernel<Float, kLanes>, ceil_div(p.T, tokens), ceil_div(vectors, columns),
                dim3(columns, tokens), stream, p);
}

template <typename Float>
cudaError_t combine_as(const CombineParams& p, cudaStream_t stream) {
  const bool wide =
      fits_vectors<Float>(p.y, p.stride_yn, p.D) && fits_vectors<Float>(p.out, p.D, p.D);
  return wide ? launch_combine<Float, kWidest<Float>>(p, stream)
              : launch_combine<Float, 1>(p, stream);
}

template <typename Float>
cudaError_t combine_backward_as(const CombineBackwardParams& p, cudaStream_t stream) {
  const bool wide = fits_vectors<Float>(p.y, p.stride_yn, p.D) &&
                    fits_vectors<Float>(p.grad, p.stride_gt, p.D) &&
                    fits_vectors<Float>(p.grad_y, p.D, p.D);
  constexpr int kSlots = kThreads / kWarp;
  return launch(
      wide ? &combine_backward_kernel<Float, kWidest<Float>> : &combine_backward_kernel<Float, 1>,
      ceil_div(p.T * p.K, kSlots), 1, dim3(kWarp, kSlots), stream, p);
}

}  // namespace

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.D == 0) return cudaSuccess;  // an empty grid is a launch error
  switch (p.dtype) {
    case DType::kFloat32: return combine_as<float>(p, stream);
    case DType::kBFloat16: return combine_as<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return combine_as<__half>(p, stream);
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

cudaError_t combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.K == 0) return cudaSuccess;  // D = 0 still writes grad_weight
  switch (p.dtype) {
    case DType::kFloat32: return combine_backward_as<float>(p, stream);
    case DType::kBFloat16: return combine_backward_as<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return combine_backward_as<__half>(p, stream);
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

}  // namespace gose::cuda
