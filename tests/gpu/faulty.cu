// Kernels with one mistake each: what the emulator must find.
#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreads = 64;

// Mistake 1: no barrier between writing and reading the neighbour's word.
__global__ void no_barrier(const EntropyParams p) {
  GOSE_SHARED(float, value, kThreads);
  value[threadIdx.x] = float(threadIdx.x);
  if (p.C == 0) __syncthreads();
  p.out[threadIdx.x] = value[threadIdx.x ^ 1];
}

// Mistake 2: a barrier that only some threads reach.
__global__ void some_threads(const EntropyParams p) {
  if (threadIdx.x < 40) __syncthreads();
  p.out[threadIdx.x] = 0.0f;
}

// Mistake 3: two barriers that look like one.
__global__ void two_places(const EntropyParams p) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[threadIdx.x] = 0.0f;
}

// Mistake 4: a shuffle that half of the warp does not take part in.
__global__ void absent_lanes(const EntropyParams p) {
  float x = 1.0f;
  if (threadIdx.x % 32 < 16) {
    x = __shfl_xor_sync(kWholeWarp, x, 1);
  } else {
    __syncwarp();
  }
  p.out[threadIdx.x] = x;
}

// Mistake 5: one word past the array.
__global__ void past_the_end(const EntropyParams p) {
  GOSE_SHARED(float, value, kThreads);
  value[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  p.out[threadIdx.x] = value[threadIdx.x];
}

}  // namespace

// p.rows chooses the mistake.
cudaError_t entropy(const EntropyParams& p, cudaStream_t stream) {
  void (*kernels[])(EntropyParams) = {&no_barrier, &some_threads, &two_places, &absent_lanes,
                                      &past_the_end};
  return launch(kernels[p.rows], 1, 1, dim3(kThreads), stream, p);
}

}  // namespace gose::cuda
