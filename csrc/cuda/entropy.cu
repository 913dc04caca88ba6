#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreads = 128;

// What the entropy of a row needs, with z = x - top: sums over all elements but one maximum, so
// that nothing of a nearly one-hot row is cancelled away. n = 0: nothing was offered yet.
struct Moments {
  float top = 0.0f;
  float rest = 0.0f;   // sum of exp(z), without the maximum's own 1
  float sum_z = 0.0f;  // sum of exp(z) * z, at most 0
  int n = 0;           // elements that are not -infinity
};

// One pass: a larger maximum rescales what was summed. x - x is NaN for NaN and infinity.
__device__ inline void add(Moments& m, float x) {
  if (x == -INFINITY) return;
  if (m.n++ == 0) {
    m.top = x;
    m.rest = m.sum_z = x - x;
    return;
  }
  const float z = x - m.top;
  const float power = expf(-fabsf(z));
  if (z > 0.0f) {
    const float total = m.rest + 1.0f;
    m.sum_z = power * (m.sum_z - z * total);
    m.rest = power * total;
    m.top = x;
  } else {
    m.rest += power;
    m.sum_z += power * z;
  }
}

__device__ inline Moments merge(const Moments& a, const Moments& b) {
  if (a.n == 0 || b.n == 0) return a.n == 0 ? b : a;
  const bool first = !(b.top > a.top);
  const Moments& high = first ? a : b;
  const Moments& low = first ? b : a;
  const float z = low.top - high.top, power = expf(z), total = low.rest + 1.0f;
  return {high.top, high.rest + power * total, high.sum_z + power * (low.sum_z + z * total),
          a.n + b.n};
}

// Moments of the row that `width` neighbouring lanes share, in every one of them.
template <typename Float, int kLanes>
__device__ Moments row_moments(const Float* __restrict__ row, int64_t C, int width) {
  Moments m;
  for (int64_t c = int64_t(threadIdx.x) * kLanes; c < C; c += int64_t(width) * kLanes) {
    const auto x = *reinterpret_cast<const Vector<Float, kLanes>*>(row + c);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) add(m, to_float(x.lane[i]));
  }
  for (int apart = width / 2; apart > 0; apart /= 2) {
    Moments other;
    other.top = __shfl_xor_sync(kWholeWarp, m.top, apart);
    other.rest = __shfl_xor_sync(kWholeWarp, m.rest, apart);
    other.sum_z = __shfl_xor_sync(kWholeWarp, m.sum_z, apart);
    other.n = __shfl_xor_sync(kWholeWarp, m.n, apart);
    // The lower lane's part first: both lanes then compute the same bits.
    m = (threadIdx.x & apart) ? merge(other, m) : merge(m, other);
  }
  return m;
}

// blockDim.x lanes walk a row, a power of two up to a warp; threadIdx.y walks rows. Rows past the
// end are read as the last one: every lane takes part in the shuffles.
template <typename Float, int kLanes>
__global__ void __launch_bounds__(kThreads) entropy_kernel(const EntropyParams p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t inside = min(row, p.rows - 1);
  const Float* logits = static_cast<const Float*>(p.logits) + inside * p.C;
  const Moments m = row_moments<Float, kLanes>(logits, p.C, blockDim.x);
  if (row >= p.rows || threadIdx.x != 0) return;
  const float nats = log1pf(m.rest) - m.sum_z / (1.0f + m.rest);
  const float share = m.n > 1 ? nats / logf(float(m.n)) : 0.0f * nats;
  p.out[row] = share < 0.0f ? 0.0f : share > 1.0f ? 1.0f : share;  // NaN stays
}

// The row is read twice: the second time it comes from the cache of the multiprocessor.
template <typename Float, int kLanes>
__global__ void __launch_bounds__(kThreads) entropy_backward_kernel(const EntropyBackwardParams p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t inside = min(row, p.rows - 1);
  const Float* __restrict__ logits = static_cast<const Float*>(p.logits) + inside * p.C;
  const Moments m = row_moments<Float, kLanes>(logits, p.C, blockDim.x);
  if (row >= p.rows) return;
  const float total = 1.0f + m.rest, mean_z = m.sum_z / total;
  // n <= 1: no slope, but NaN stays NaN.
  const float scale = m.n > 1 ? -p.grad[row] / (total * logf(float(m.n))) : 0.0f * m.rest;
  Float* __restrict__ out = static_cast<Float*>(p.grad_logits) + row * p.C;
  for (int64_t c = int64_t(threadIdx.x) * kLanes; c < p.C; c += int64_t(blockDim.x) * kLanes) {
    using Lanes = Vector<Float, kLanes>;
    const Lanes x = *reinterpret_cast<const Lanes*>(logits + c);
    Lanes slopes;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = to_float(x.lane[i]), z = value - m.top;
      const float slope = value == -INFINITY ? 0.0f * m.rest : expf(z) * (z - mean_z) * scale;
      slopes.lane[i] = from_float<Float>(slope);
    }
    *reinterpret_cast<Lanes*>(out + c) = slopes;
  }
}

template <typename Float, int kLanes, typename Params>
cudaError_t launch_rows(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  int width = 1;
  while (width < kWarp && width * kLanes < p.C) width *= 2;
  const int rows = kThreads / width;
  return launch(kernel, ceil_div(p.rows, rows), 1, dim3(width, rows), stream, p);
}

template <typename Float>
cudaError_t entropy_as(const EntropyParams& p, cudaStream_t stream) {
  return fits_vectors<Float>(p.logits, p.C, p.C)
             ? launch_rows<Float, kWidest<Float>>(&entropy_kernel<Float, kWidest<Float>>, p, stream)
             : launch_rows<Float, 1>(&entropy_kernel<Float, 1>, p, stream);
}

template <typename Float>
cudaError_t entropy_backward_as(const EntropyBackwardParams& p, cudaStream_t stream) {
  constexpr int kWide = kWidest<Float>;
  const bool wide =
      fits_vectors<Float>(p.logits, p.C, p.C) && fits_vectors<Float>(p.grad_logits, p.C, p.C);
  return wide ? launch_rows<Float, kWide>(&entropy_backward_kernel<Float, kWide>, p, stream)
              : launch_rows<Float, 1>(&entropy_backward_kernel<Float, 1>, p, stream);
}

}  // namespace

cudaError_t entropy(const EntropyParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;  // an empty grid is a launch error
  switch (p.dtype) {
    case DType::kFloat32: return entropy_as<float>(p, stream);
    case DType::kBFloat16: return entropy_as<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return entropy_as<__half>(p, stream);
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

cudaError_t entropy_backward(const EntropyBackwardParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::kFloat32: return entropy_backward_as<float>(p, stream);
    case DType::kBFloat16: return entropy_backward_as<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return entropy_backward_as<__half>(p, stream);
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

}  // namespace gose::cuda
