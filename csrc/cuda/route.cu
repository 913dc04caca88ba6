// route: one pass over the tokens, for a capacity one over the experts, then the totals. What is
// summed over tokens is summed by blocks, then over blocks in order: no atomics.
#include "cuda/route_token.cuh"
#include "cuda/route_totals.cuh"

namespace gose::cuda {
namespace {

constexpr int kKeepThreads = 256;

// What a warp tells its block of its token.
struct Told {
  float inverse_total, log_total, threshold, entropy;
  int64_t t;  // -1: no token
};

// blockDim.y warps, a token each; then the threads add up columns of these tokens: one takes a
// column of every kPart-th token.
template <int kWarps, int kE>
__global__ void __launch_bounds__(kWarps* kWarp, kThreadsPerMultiprocessor / (kWarps * kWarp))
    route_kernel(const RouteDeviceParams p) {
  constexpr int kThreads = kWarps * kWarp, kPart = kThreads > kE ? kThreads / kE : 1;
  GOSE_SHARED(float, logit, kWarps* kE);
  GOSE_SHARED(float, key, kWarps* kE);
  GOSE_SHARED(float, power, kWarps* kE);
  GOSE_SHARED(float, slot, kWarps* kE);
  GOSE_SHARED(int, expert, kWarps* kE);
  GOSE_SHARED(float, importance, kPart* kE);
  GOSE_SHARED(float, win, kPart* kE);
  GOSE_SHARED(int, number, kPart* kE);  // twice the slots, plus 1 if available
  GOSE_SHARED(Told, told, kWarps);
  const RouteInput& in = p.in;
  const int row = threadIdx.y * kE, thread = threadIdx.y * kWarp + threadIdx.x;
  const TokenRows rows = {logit + row, key + row, power + row};
  const Slots slots = {slot + row, expert + row};
  const bool count = p.pass != RoutePass::kChoose, choosing = p.pass != RoutePass::kCount;
  for (int at = thread; at < kPart * kE; at += kThreads) {
    importance[at] = win[at] = 0.0f, number[at] = 0;
  }
  float tokens = 0.0f, z_sum = 0.0f, entropy_sum = 0.0f;
  const int64_t begin = blockIdx.x * p.tokens, stop = min(in.T, begin + p.tokens);
  for (int64_t first = begin; first < stop; first += kWarps) {
    const int64_t t = first + threadIdx.y;
    if (t < stop) {
      widen(in, t, rows);
      if (in.policy == RoutePolicy::kGroupLimited) limit_groups(in, rows);
      const RowMoments m = row_moments(in.E, rows.power, [&](int64_t e) { return rows.logit[e]; });
      RowMoments noisy = m;
      if (in.noise != nullptr) {
        noisy = row_moments(in.E, nullptr, [&](int64_t e) { return noisy_logit(in, rows, t, e); });
      }
      const float entropy = m.entropy();
      float last = -INFINITY;
      __syncwarp();
      if (choosing) {
        if (p.log_p != nullptr) {
          for (int64_t e = threadIdx.x; e < in.E; e += kWarp) {
            if (p.log_p[e * in.T + t] == -INFINITY) rows.key[e] = -INFINITY;
          }
          __syncwarp();
        }
        int keep = 1;
        for (int i = 0; i < in.num_bands; ++i) keep += entropy > p.band[i];
        last = choose(in, rows, m, t, keep, slots).value;
        const float first_a = slots.a[0];
        __syncwarp();
        weigh(in, noisy, slots);
        for (int64_t k = threadIdx.x; k < in.K; k += kWarp) {
          p.weight[t * in.K + k] = slots.a[k];
          p.expert[t * in.K + k] = slots.expert[k];
        }
        if (p.first != nullptr && threadIdx.x == 0) p.first[t] = first_a - noisy.log_total();
      }
      if (count && m.n > 0) {
        float z = 0.0f;
        if (in.entropy == nullptr) {
          z = m.log_total();
          if (in.sigmoid) {
            z = row_moments(in.E, nullptr, [&](int64_t e) {
                  return load_float(in.score, in.dtype, t * in.stride_st + e);
                }).log_total();
          }
        }
        tokens += 1.0f;
        z_sum += z * z;
        entropy_sum += entropy;
      }
      if (threadIdx.x == 0) {
        told[threadIdx.y] = {m.n > 0 ? m.inverse_total() : 0.0f, m.log_total(), last, entropy, t};
      }
    } else if (threadIdx.x == 0) {
      told[threadIdx.y].t = -1;
    }
    if (!count) continue;  // the same for the whole block
    __syncthreads();
    if (thread < kWarps && told[thread].t >= 0) p.entropy[told[thread].t] = told[thread].entropy;
#pragma unroll 1
    for (int at = thread; at < kPart * kE; at += kThreads) {
      const int e = at % kE;
      if (e >= in.E) continue;
#pragma unroll 1
      for (int w = at / kE; w < kWarps; w += kPart) {
        const Told& token = told[w];
        if (token.t < 0) break;
        const float a = logit[w * kE + e], chosen = key[w * kE + e];
        importance[at] += power[w * kE + e] * token.inverse_total;
        if (is_taken(chosen)) number[at] += 2;
        if (a != -INFINITY) number[at] |= 1;
        if (p.win != nullptr) {
          win[at] += normal_below(margin_of(a, token.threshold, in.noise_std));
        }
        if (p.level != nullptr) {
          p.level[e * in.T + token.t] = is_taken(chosen) ? int16_t(slot_of(chosen)) : int16_t(0);
        }
        if (p.log_p != nullptr) {
          const float log_p = a - token.log_total;
          p.log_p[e * in.T + token.t] = a == -INFINITY || log_p != log_p ? -INFINITY : log_p;
        }
      }
    }
    __syncthreads();
  }
  if (!count) return;
  for (int e = thread; e < in.E; e += kThreads) {
    float sum = importance[e], wins = win[e];
    int slots_of_e = number[e];  // its lowest bit is a flag
    for (int part = e + kE; part < kPart * kE; part += kE) {
      sum += importance[part], wins += win[part];
      slots_of_e = ((slots_of_e | number[part]) & 1) + (slots_of_e & ~1) + (number[part] & ~1);
    }
    const int64_t at = blockIdx.x * in.E + e;
    p.part_importance[at] = sum;
    p.part_count[at] = int16_t(slots_of_e);
    if (p.win != nullptr) p.win[at] = wins;
  }
  GOSE_SHARED(float, sums, kWarps * 3);
  if (threadIdx.x == 0) {
    sums[threadIdx.y * 3] = tokens;
    sums[threadIdx.y * 3 + 1] = z_sum;
    sums[threadIdx.y * 3 + 2] = entropy_sum;
  }
  __syncthreads();
  if (thread < 3) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[w * 3 + thread];
    p.part_sums[blockIdx.x * 3 + thread] = total;
  }
}

// Below 2^32 in the order of the floats, equal for equal ones, NaN largest.
__device__ inline int64_t ordered(float x) {
  if (x != x) return 0xffffffffll;
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Orders the tokens of an expert, the best largest; 0: no token of it.
__device__ inline int64_t rank_of(const RouteDeviceParams& p, int64_t e, int64_t t) {
  if (p.level == nullptr) {
    const float log_p = p.log_p[e * p.in.T + t];
    return log_p == -INFINITY ? 0 : ordered(log_p);
  }
  const int64_t level = p.level[e * p.in.T + t];
  if (level == 0) return 0;
  const int64_t rank = p.in.K + 1 - level;
  return p.first == nullptr ? rank : (rank << 32) + ordered(p.first[t]);
}

// The sum over a block of kKeepThreads, in every thread.
__device__ inline int block_count(int x, int* part) {
  x = warp_count(x);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kKeepThreads / kWarp; ++w) total += part[w];
  return total;
}

// One block per expert: it keeps the `capacity` tokens of largest rank, ties to the smaller id.
__global__ void __launch_bounds__(kKeepThreads) route_keep_kernel(const RouteDeviceParams p) {
  GOSE_SHARED(int, part, kKeepThreads / kWarp);
  const int64_t e = blockIdx.x, T = p.in.T, capacity = p.in.capacity;
  int64_t nth = 0;  // the capacity-th largest rank, 0 if there are fewer
  for (int bit = int(p.rank_bits) - 1; bit >= 0; --bit) {
    const int64_t higher = nth | (int64_t(1) << bit);
    int found = 0;
    for (int64_t t = threadIdx.x; t < T; t += kKeepThreads) found += rank_of(p, e, t) >= higher;
    if (block_count(found, part) >= capacity) nth = higher;
  }
  int above = 0;
  for (int64_t t = threadIdx.x; t < T; t += kKeepThreads) above += rank_of(p, e, t) > nth;
  int64_t room = capacity - block_count(above, part);  // for tokens of rank nth
  int kept_tokens = 0;
  for (int64_t first = 0; first < T; first += kKeepThreads) {
    const int64_t t = first + threadIdx.x;
    const int64_t rank = t < T ? rank_of(p, e, t) : -1;
    const unsigned ties = __ballot_sync(kWholeWarp, rank == nth);
    const unsigned lower = (1u << (threadIdx.x % kWarp)) - 1;
    int place = __popc(ties & lower), all = 0;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = __popc(ties);
    __syncthreads();
    for (int w = 0; w < kKeepThreads / kWarp; ++w) {
      if (w < int(threadIdx.x) / kWarp) place += part[w];
      all += part[w];
    }
    const bool kept = rank > nth || (rank == nth && place < room);
    room -= all;
    kept_tokens += kept && rank > 0;
    if (rank <= 0 || kept) continue;
    if (p.level == nullptr) {
      p.log_p[e * T + t] = -INFINITY;
    } else {
      const int64_t n = t * p.in.K + p.level[e * T + t] - 1;
      p.expert[n] = int32_t(p.in.E);
      p.weight[n] = 0.0f;
    }
  }
  kept_tokens = block_count(kept_tokens, part);
  if (p.level == nullptr && threadIdx.x == 0) p.load[e] = kept_tokens;
}

// One block adds up what the blocks of route_kernel found: threadIdx.x walks experts, threadIdx.y
// blocks. The sums of an expert replace those of block 0.
__global__ void __launch_bounds__(kWarp* kFinishRows)
    route_finish_kernel(const RouteDeviceParams p) {
  GOSE_SHARED(double, importance, kFinishRows* kWarp);
  GOSE_SHARED(double, win, kFinishRows* kWarp);
  GOSE_SHARED(int, slots, kFinishRows* kWarp);
  GOSE_SHARED(int, live, kFinishRows* kWarp);
  const int64_t E = p.in.E, blocks = ceil_div(p.in.T, p.tokens);
  const int at = threadIdx.y * kWarp + threadIdx.x;
  double shared_sum = 0, assigned = 0, live_experts = 0;
  for (int64_t first = 0; first < E; first += kWarp) {
    const int64_t e = first + threadIdx.x;
    importance[at] = win[at] = 0;
    slots[at] = live[at] = 0;
#pragma unroll 1
    for (int64_t b = threadIdx.y; b < blocks && e < E; b += kFinishRows) {
      const int count = p.part_count[b * E + e];
      importance[at] += double(p.part_importance[b * E + e]);
      slots[at] += count / 2;
      live[at] |= count & 1;
      if (p.win != nullptr) win[at] += double(p.win[b * E + e]);
    }
    __syncthreads();
    if (threadIdx.y == 0 && e < E) {
      for (int row = 1; row < kFinishRows; ++row) {
        importance[at] += importance[row * kWarp + at];
        win[at] += win[row * kWarp + at];
        slots[at] += slots[row * kWarp + at];
        live[at] |= live[row * kWarp + at];
      }
      const bool took = p.log_p != nullptr && blocks > 0;
      const int load = took ? p.load[e] : slots[at];
      p.importance[e] = float(importance[at]);
      p.load[e] = load;
      if (blocks > 0) p.part_count[e] = int16_t(live[at]);
      if (blocks > 0 && p.win != nullptr) p.win[e] = float(win[at]);
      shared_sum += double(load) * importance[at];
      assigned += load;
      live_experts += live[at];
    }
    __syncthreads();
  }
  if (threadIdx.y != 0) return;
  double tokens = 0, z = 0, entropy = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kWarp) {
    tokens += double(p.part_sums[b * 3]);
    z += double(p.part_sums[b * 3 + 1]);
    entropy += double(p.part_sums[b * 3 + 2]);
  }
  tokens = fmax(warp_sum(tokens), 1.0);
  z = warp_sum(z), entropy = warp_sum(entropy);
  shared_sum = warp_sum(shared_sum);
  assigned = fmax(warp_sum(assigned), 1.0);
  live_experts = fmax(warp_sum(live_experts), 1.0);
  __syncwarp();
  const auto is_live = [&](int64_t e) { return blocks > 0 && p.part_count[e] != 0; };
  const double even =
      variation(E, live_experts, [&](int64_t e) { return p.importance[e]; }, is_live).cv2;
  double noisy = 0;
  if (p.win != nullptr && blocks > 0) {
    noisy = variation(E, live_experts, [&](int64_t e) { return p.win[e]; }, is_live).cv2;
  }
  if (threadIdx.x != 0) return;
  p.loss[0] = float(live_experts * (shared_sum / assigned) / tokens);
  p.loss[1] = float(even);
  p.loss[2] = float(noisy);
  p.loss[3] = float(z / tokens);
  p.loss[4] = float(entropy / tokens);
}

template <int kWarps, int kE>
cudaError_t launch_tokens(const RouteDeviceParams& p, cudaStream_t stream) {
  return launch(&route_kernel<kWarps, kE>, ceil_div(p.in.T, p.tokens), 1, dim3(kWarp, kWarps),
                stream, p);
}

cudaError_t tokens_pass(RouteDeviceParams p, RoutePass pass, cudaStream_t stream) {
  p.pass = pass;
  // As many warps as make blocks of 16, 32 and 64 tokens equally quick.
  if (p.in.E <= 64 && p.tokens < 32) return launch_tokens<4, 64>(p, stream);
  if (p.in.E <= 64 && p.tokens < 64) return launch_tokens<8, 64>(p, stream);
  if (p.in.E <= 64) return launch_tokens<16, 64>(p, stream);
  if (p.in.E <= 128 && p.tokens >= 64) return launch_tokens<16, 128>(p, stream);
  if (p.in.E <= 128 && p.tokens >= 32) return launch_tokens<8, 128>(p, stream);
  if (p.in.E <= 512) return launch_tokens<4, 512>(p, stream);
  return launch_tokens<1, kRouteDeviceExperts>(p, stream);
}

}  // namespace

cudaError_t route(const RouteDeviceParams& p, cudaStream_t stream) {
  if (p.in.E > kRouteDeviceExperts || p.in.num_bands > kRouteBands) return cudaErrorInvalidValue;
  if (p.in.dtype == DType::kFloat64 || p.in.dtype == DType::kInt32) return cudaErrorInvalidValue;
  const bool takes = p.in.policy == RoutePolicy::kExpertChoice;
  cudaError_t error = cudaSuccess;
  if (p.in.T > 0) {
    error = tokens_pass(p, takes ? RoutePass::kCount : RoutePass::kAll, stream);
    if (error == cudaSuccess && p.in.capacity > 0) {
      error = launch(&route_keep_kernel, p.in.E, 1, dim3(kKeepThreads), stream, p);
    }
    if (error == cudaSuccess && takes) error = tokens_pass(p, RoutePass::kChoose, stream);
  }
  if (error != cudaSuccess) return error;
  return launch(&route_finish_kernel, 1, 1, dim3(kWarp, kFinishRows), stream, p);
}

}  // namespace gose::cuda
