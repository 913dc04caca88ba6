// Sums of squares of many tensors in two launches: a block adds up a chunk of a tensor, then a
// block the sums of a tensor's chunks. Frozen vectors are skipped without loading them. Squares of
// float32 are exact in doubles, and every sum has one order.
#include "cuda/masks.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kInFlight = 4;  // vectors of a thread that are loaded before they are added
constexpr int kBatch = 64;    // tensors of a launch, whose parameters have 4 KB

struct Entry {
  const void* grad;
  const void* frozen;
  int64_t numel, inner, end_chunk;
  float threshold;
  MaskKind kind;
  bool wide;  // vectors of neighbours are aligned and share a mask value, or have one each
};

struct Batch {
  double* partial;      // [chunks] of the whole list
  double* out;          // [count]
  int64_t first_chunk;  // of the first entry
  int32_t count;
  Entry entry[kBatch];
};

__device__ inline int64_t first_chunk(const Batch& b, int n) {
  return n == 0 ? b.first_chunk : b.entry[n - 1].end_chunk;
}

// The sum over the block, the same bits in every thread: by warps, then over them in order.
__device__ inline double block_sum(double x) {
  GOSE_SHARED(double, part, kThreads / kWarp);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = part[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) total += part[w];
  return total;
}

// A bit for each of the kLanes elements from i on, a multiple of kLanes.
template <int kLanes>
__device__ unsigned live_lanes(const Entry& e, int64_t i) {
  if (e.kind == MaskKind::kNone || e.inner == 1) return live_elements<kLanes>(e, i);
  const int64_t unit = e.inner == e.numel ? 0 : quotient(i, e.inner);
  return mask_freezes(e, unit) ? 0 : (1u << kLanes) - 1;
}

template <typename Float>
__device__ void add_square(double& total, Float x) {
  const double wide = double(to_float(x));
  total += wide * wide;
}

// What this thread adds up of the whole vectors of elements [begin, end).
template <typename Float>
__device__ double vector_sum(const Entry& e, int64_t begin, int64_t end) {
  constexpr int kLanes = kWidest<Float>, kStep = kThreads * kLanes;
  const Float* const grad = static_cast<const Float*>(e.grad);
  double total = 0;
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kLanes; at < end; at += kInFlight * kStep) {
    Vector<Float, kLanes> x[kInFlight] = {};
    unsigned live[kInFlight];
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int64_t i = at + v * kStep;
      live[v] = i + kLanes <= end ? live_lanes<kLanes>(e, i) : 0;
      if (live[v] != 0) x[v] = *reinterpret_cast<const Vector<Float, kLanes>*>(grad + i);
    }
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (live[v] >> j & 1) add_square(total, x[v].lane[j]);
      }
    }
  }
  return total;
}

template <typename Float>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    square_kernel(const __grid_constant__ Batch b) {
  const int64_t chunk = b.first_chunk + blockIdx.x;
  int n = 0;  // the first entry that ends after this chunk
  for (int last = b.count - 1; n < last;) {
    const int middle = (n + last) / 2;
    if (b.entry[middle].end_chunk > chunk) {
      last = middle;
    } else {
      n = middle + 1;
    }
  }
  const Entry& e = b.entry[n];
  const int64_t begin = (chunk - first_chunk(b, n)) * kUpdateChunk;
  const int64_t end = e.numel - begin < kUpdateChunk ? e.numel : begin + kUpdateChunk;
  double total = 0;
  int64_t rest = begin;
  if (e.wide) {
    total = vector_sum<Float>(e, begin, end);
    rest = end - end % kWidest<Float>;
  }
#pragma unroll 1
  for (int64_t i = rest + threadIdx.x; i < end; i += kThreads) {
    if (mask_freezes(e, quotient(i, e.inner))) continue;
    add_square(total, static_cast<const Float*>(e.grad)[i]);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) b.partial[chunk] = total;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const __grid_constant__ Batch b) {
  const int n = blockIdx.x;
  double total = 0;
  for (int64_t c = first_chunk(b, n) + threadIdx.x; c < b.entry[n].end_chunk; c += kThreads) {
    total += b.partial[c];
  }
  total = block_sum(total);
  if (threadIdx.x == 0) b.out[n] = total;
}

template <typename Float>
Entry entry_of(const UpdateTensor& t) {
  constexpr int kLanes = kWidest<Float>;
  const bool whole = t.inner == 1 ? fits_lanes(t.frozen, t.kind, kLanes)
                                  : t.inner % kLanes == 0 || t.inner >= t.numel;
  const bool wide = whole && aligned(t.grad, kVectorBytes);
  return {t.grad, t.frozen, t.numel, t.inner, t.end_chunk, t.threshold, t.kind, wide};
}

template <typename Float>
cudaError_t sum_as(const MaskedSquareSumParams& p, cudaStream_t stream) {
  Batch b = {};
  b.partial = p.partial;
  for (int64_t first = 0; first < p.list.count; first += kBatch) {
    const int64_t left = p.list.count - first;
    b.count = int32_t(left < kBatch ? left : kBatch);
    b.out = p.out + first;
    for (int n = 0; n < b.count; ++n) b.entry[n] = entry_of<Float>(p.list.tensor[first + n]);
    const int64_t end = b.entry[b.count - 1].end_chunk;
    if (end > b.first_chunk) {
      const cudaError_t error =
          launch(&square_kernel<Float>, end - b.first_chunk, 1, dim3(kThreads), stream, b);
      if (error != cudaSuccess) return error;
    }
    const cudaError_t error = launch(&total_kernel, b.count, 1, dim3(kThreads), stream, b);
    if (error != cudaSuccess) return error;
    b.first_chunk = end;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t masked_square_sum(const MaskedSquareSumParams& p, cudaStream_t stream) {
  switch (p.list.dtype) {
    case DType::kFloat32: return sum_as<float>(p, stream);
    case DType::kBFloat16: return sum_as<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

}  // namespace gose::cuda
