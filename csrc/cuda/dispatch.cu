#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kWarps = 4;  // of a block; each has a chunk of its own
constexpr int kScanThreads = 256;
constexpr int kAhead = 8;  // loads in flight of the scan

// Counts the slots of every expert in a chunk. Slots of one expert in a warp are counted by the
// first of their lanes: no atomics, whose order placement could not repeat.
__global__ void __launch_bounds__(kWarps* kWarp) dispatch_count_kernel(const DispatchParams p) {
  const int64_t N = p.T * p.K, E1 = p.E + 1;
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk * p.chunk >= N) return;  // the whole warp
  int32_t* count = p.scratch + chunk * E1;
  for (int64_t e = threadIdx.x; e < E1; e += kWarp) count[e] = 0;
  __syncwarp();
  for (int64_t first = chunk * p.chunk; first < min(N, (chunk + 1) * p.chunk); first += kWarp) {
    const int64_t n = first + threadIdx.x;
    const int e = n < N ? p.expert[n] : int(p.E);
    const unsigned peers = __match_any_sync(kWholeWarp, e);
    if (e < p.E && threadIdx.x == unsigned(__ffs(int(peers)) - 1)) count[e] += __popc(peers);
    __syncwarp();
  }
}

// One block: chunks' counts become the slots of the expert before the chunk, offset its first row.
__global__ void __launch_bounds__(kScanThreads) dispatch_scan_kernel(const DispatchParams p) {
  const int64_t E1 = p.E + 1, chunks = (p.T * p.K + p.chunk - 1) / p.chunk;
  if (threadIdx.x == 0) p.offset[0] = 0;
  for (int64_t e = threadIdx.x; e < p.E; e += kScanThreads) {
    int32_t before = 0;
    for (int64_t c = 0; c < chunks; c += kAhead) {
      int32_t count[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) count[i] = c + i < chunks ? p.scratch[(c + i) * E1 + e] : 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (c + i < chunks) p.scratch[(c + i) * E1 + e] = before;
        before += count[i];
      }
    }
    p.offset[e + 1] = before;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  int32_t carry = 0;
  for (int64_t first = 0; first < p.E; first += kWarp) {
    const int64_t e = first + threadIdx.x;
    int32_t total = e < p.E ? p.offset[e + 1] : 0;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int32_t left = __shfl_up_sync(kWholeWarp, total, by);
      if (int(threadIdx.x) >= by) total += left;
    }
    total += carry;
    if (e < p.E) p.offset[e + 1] = total;
    carry = __shfl_sync(kWholeWarp, total, kWarp - 1);
  }
}

// Rows in order of slots: the rank of a slot is that among the slots of its expert in this warp.
__global__ void __launch_bounds__(kWarps* kWarp) dispatch_place_kernel(const DispatchParams p) {
  const int64_t N = p.T * p.K;
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk * p.chunk >= N) return;
  int32_t* next = p.scratch + chunk * (p.E + 1);
  const int32_t used = p.offset[p.E];
  const unsigned lower = (1u << threadIdx.x) - 1;
  // Not unrolled: ptxas would run out of the registers that hold where a warp meets again.
#pragma unroll 1
  for (int64_t first = chunk * p.chunk; first < min(N, (chunk + 1) * p.chunk); first += kWarp) {
    const int64_t n = first + threadIdx.x;
    const int e = n < N ? p.expert[n] : int(p.E);
    const unsigned peers = __match_any_sync(kWholeWarp, e);
    int32_t row = -1;
    if (e < p.E) {
      row = p.offset[e] + next[e] + __popc(peers & lower);
      p.token[row] = int32_t(uint32_t(n) / uint32_t(p.K));  // N < 2^31
    }
    if (n < N) p.row[n] = row;
    if (n < N && n >= used) p.token[n] = -1;
    __syncwarp();
    if (e < p.E && threadIdx.x == unsigned(__ffs(int(peers)) - 1)) next[e] += __popc(peers);
    __syncwarp();
  }
}

}  // namespace

cudaError_t dispatch(const DispatchParams& p, cudaStream_t stream) {
  const int64_t chunks = ceil_div(p.T * p.K, p.chunk);
  const int64_t blocks = ceil_div(chunks, kWarps);
  const dim3 threads(kWarp, kWarps);
  cudaError_t error = cudaSuccess;
  if (blocks > 0) error = launch(&dispatch_count_kernel, blocks, 1, threads, stream, p);
  if (error == cudaSuccess) {
    error = launch(&dispatch_scan_kernel, 1, 1, dim3(kScanThreads), stream, p);
  }
  if (error == cudaSuccess && blocks > 0) {
    error = launch(&dispatch_place_kernel, blocks, 1, threads, stream, p);
  }
  return error;
}

}  // namespace gose::cuda
