// What kernels share: conversions, 16-byte vectors, warp sums, launches. No torch here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/kernels.h"

namespace gose::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load of one thread
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename Float>
__device__ Float from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// `kLanes` neighbours of one row, moved as one access of their whole size.
template <typename Float, int kLanes>
struct alignas(sizeof(Float) * kLanes) Vector {
  Float lane[kLanes];
};

template <typename Float>
constexpr int kWidest = kVectorBytes / int(sizeof(Float));

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether rows of `width` elements, `stride` elements apart from `base` on, split into 16-byte
// vectors that are all aligned.
template <typename Float>
bool fits_vectors(const void* base, int64_t stride, int64_t width) {
  return aligned(base, kVectorBytes) && stride % kWidest<Float> == 0 && width % kWidest<Float> == 0;
}

// An array in the shared memory of the block, of a size known to the compiler.
#if defined(GOSE_EMULATE)
#define GOSE_SHARED(Type, name, count) \
  Type* name = emulate::shared_array<Type>(__FILE__, __LINE__, count)
#else
#define GOSE_SHARED(Type, name, count) __shared__ Type name[count]
#endif

// The sum over a whole warp, the same bits in every lane and every run.
template <typename Real>
__device__ Real warp_sum(Real x) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
  return x;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The only place that launches. A grid past the limits of CUDA is an error, not a truncated grid.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks_x, int64_t blocks_y, dim3 threads,
                   cudaStream_t stream, const Params& p) {
  if (blocks_x > INT_MAX || blocks_y > USHRT_MAX) return cudaErrorInvalidConfiguration;
  const dim3 blocks(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
#if defined(GOSE_EMULATE)
  (void)stream;
  return emulate::launch(kernel, blocks, threads, p);
#else
  // clang-format off: it takes the brackets of a launch apart here.
  kernel<<<blocks, threads, 0, stream>>>(p);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace gose::cuda
