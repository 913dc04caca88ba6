// route_backward: what all tokens share, then one pass over them. Closed forms, the choice held
// constant. What is summed over tokens is summed by blocks, then over blocks in order: no atomics.
#include "cuda/route_token.cuh"
#include "cuda/route_totals.cuh"

namespace gose::cuda {
namespace {

constexpr int kLiveWarps = 4;  // of a block
constexpr int kLiveRows = 4;   // read side by side until one offers the expert

__device__ inline bool is_available(const RouteInput& in, int64_t t, int64_t e) {
  return load_float(in.score, in.dtype, t * in.stride_st + e) != -INFINITY;
}

// Importance tells that an expert is live. Without any, it may have been too unlikely for a float:
// then a warp looks at `live_tokens` tokens until one offers it.
__global__ void __launch_bounds__(kLiveWarps* kWarp)
    route_live_kernel(const RouteBackwardDeviceParams p) {
  const RouteInput& in = p.in;
  const int64_t block = blockIdx.x * int64_t(kLiveWarps) + threadIdx.y,
                begin = block * p.live_tokens;
  const int64_t stop = min(in.T, begin + p.live_tokens);
  if (begin >= stop) return;
  for (int64_t e = threadIdx.x; e < in.E; e += kWarp) {
    if (p.importance[e] != 0.0f) continue;
    bool live = false;
    for (int64_t t = begin; t < stop && !live; t += kLiveRows) {
#pragma unroll
      for (int i = 0; i < kLiveRows; ++i) {
        if (t + i < stop) live |= is_available(in, t + i, e);
      }
    }
    p.part_live[block * in.E + e] = live;
  }
}

// Sums over a block's tokens of the probability that noise brings an expert among the chosen.
template <int kWarps, int kE>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_win_kernel(const RouteBackwardDeviceParams p) {
  GOSE_SHARED(float, logit, kWarps* kE);
  GOSE_SHARED(float, key, kWarps* kE);
  GOSE_SHARED(float, win, kWarps* kE);
  const RouteInput& in = p.in;
  const int row = threadIdx.y * kE, E = int(in.E);
  const TokenRows rows = {logit + row, key + row, nullptr};
  for (int e = threadIdx.x; e < E; e += kWarp) win[row + e] = 0.0f;
  const int64_t begin = blockIdx.x * p.tokens, stop = min(in.T, begin + p.tokens);
  for (int64_t t = begin + threadIdx.y; t < stop; t += kWarps) {
    widen(in, t, rows);
    float threshold = -INFINITY;
    Choice mine = lane_best(rows.key, E, threadIdx.x);
    for (int64_t k = 0; k < in.K; ++k) {
      const Choice best = warp_best(mine);
      threshold = best.value;
      if (best.at < E && int(threadIdx.x) == best.at % kWarp) {
        rows.key[best.at] = -INFINITY;
        mine = lane_best(rows.key, E, threadIdx.x);
      }
    }
    for (int e = threadIdx.x; e < E; e += kWarp) {
      win[row + e] += normal_below(margin_of(rows.logit[e], threshold, in.noise_std));
    }
  }
  __syncthreads();
  for (int e = threadIdx.y * kWarp + threadIdx.x; e < E; e += kWarps * kWarp) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += win[w * kE + e];
    p.part_win[blockIdx.x * in.E + e] = total;
  }
}

// Derivative of cv2 by x(e) of a live expert.
__device__ inline double slope_of(const Variation& v, double x, double live_experts) {
  return v.mean == 0 ? 0.0 : 2 * ((x - v.mean) / v.mean - v.cv2) / (live_experts * v.mean);
}

// One block: threadIdx.x walks experts, threadIdx.y parts. Sums of an expert replace the first
// part.
__global__ void __launch_bounds__(kWarp* kFinishRows)
    route_shared_kernel(const RouteBackwardDeviceParams p) {
  GOSE_SHARED(double, win, kFinishRows* kWarp);
  GOSE_SHARED(int, live, kFinishRows* kWarp);
  const int64_t E = p.in.E, parts = ceil_div(p.in.T, p.live_tokens);
  const int64_t blocks = p.part_win != nullptr ? ceil_div(p.in.T, p.tokens) : 0;
  const int at = threadIdx.y * kWarp + threadIdx.x;
  double assigned = 0, live_experts = 0, tokens = 0;
  for (int64_t first = 0; first < E; first += kWarp) {
    const int64_t e = first + threadIdx.x;
    win[at] = 0, live[at] = e < E && p.importance[e] != 0.0f;
    for (int64_t b = threadIdx.y; b < parts && e < E && live[at] == 0; b += kFinishRows) {
      live[at] = p.part_live[b * E + e];
    }
    for (int64_t b = threadIdx.y; b < blocks && e < E; b += kFinishRows) {
      win[at] += double(p.part_win[b * E + e]);
    }
    __syncthreads();
    if (threadIdx.y == 0 && e < E) {
      for (int row = 1; row < kFinishRows; ++row) {
        live[at] |= live[row * kWarp + at];
        win[at] += win[row * kWarp + at];
      }
      p.part_live[e] = uint8_t(live[at]);
      tokens += double(p.importance[e]);  // each token has 1
      if (blocks > 0) p.part_win[e] = float(win[at]);
      assigned += p.load[e];
      live_experts += live[at];
    }
    __syncthreads();
  }
  if (threadIdx.y != 0) return;
  tokens = fmax(floor(warp_sum(tokens) + 0.5), 1.0);
  assigned = fmax(warp_sum(assigned), 1.0);
  live_experts = fmax(warp_sum(live_experts), 1.0);
  const auto is_live = [&](int64_t e) { return p.part_live[e] != 0; };
  const Variation even =
      variation(E, live_experts, [&](int64_t e) { return p.importance[e]; }, is_live);
  const double balance = double(p.grad_loss[0]) * live_experts / assigned / tokens;
  for (int64_t e = threadIdx.x; e < E; e += kWarp) {
    double column = balance * p.load[e];
    if (p.grad_importance != nullptr) column += double(p.grad_importance[e]);
    if (is_live(e)) {
      column += double(p.grad_loss[1]) * slope_of(even, double(p.importance[e]), live_experts);
    }
    p.column[e] = float(column);
  }
  if (blocks > 0) {
    const Variation noisy =
        variation(E, live_experts, [&](int64_t e) { return p.part_win[e]; }, is_live);
    const double scale = double(p.grad_loss[2]) / double(p.in.noise_std);
    for (int64_t e = threadIdx.x; e < E; e += kWarp) {
      const double slope = slope_of(noisy, double(p.part_win[e]), live_experts);
      p.win_slope[e] = is_live(e) ? float(scale * slope) : 0.0f;
    }
  }
  if (threadIdx.x != 0) return;
  p.scalar[0] = float(2 * double(p.grad_loss[3]) / tokens);
  p.scalar[1] = float(double(p.grad_loss[4]) / tokens);
}

// The slots of a token as route left them.
__device__ inline void given_slots(const RouteBackwardDeviceParams& p, const TokenRows& rows,
                                   int64_t t, const Slots& slots) {
  for (int64_t k = threadIdx.x; k < p.in.K; k += kWarp) {
    const int e = p.expert[t * p.in.K + k];
    slots.expert[k] = e;
    slots.a[k] = e < p.in.E ? noisy_logit(p.in, rows, t, e) : -INFINITY;
  }
}

// The upstream gradient of slot k, 0 where it is unused.
__device__ inline float upstream(const RouteBackwardDeviceParams& p, int64_t t, int64_t k) {
  const int64_t n = t * p.in.K + k;
  return p.expert[n] < p.in.E ? p.grad_weight[n] : 0.0f;
}

// The gradient of a, of one token, into the row of keys.
__device__ inline void logit_gradient(const RouteBackwardDeviceParams& p, const TokenRows& rows,
                                      const RowMoments& m, const Slots& slots, int64_t t) {
  const RouteInput& in = p.in;
  const int E = int(in.E);
  RowMoments noisy = m;
  if (in.noise != nullptr) {
    noisy = row_moments(in.E, nullptr, [&](int64_t e) { return noisy_logit(in, rows, t, e); });
  }
  __syncwarp();
  Choice last = {-INFINITY, E};
  if (p.again || p.win_slope != nullptr) {
    int keep = 1;
    for (int i = 0; i < in.num_bands; ++i) keep += m.entropy() > p.band[i];
    last = choose(in, rows, m, t, keep, slots);
  }
  float slots_sum = 0.0f;  // of upstream * weight
  if (p.grad_weight != nullptr) {
    if (!p.again) given_slots(p, rows, t, slots);
    __syncwarp();
    weigh(in, noisy, slots);
    for (int64_t k = threadIdx.x; k < in.K; k += kWarp) slots_sum += upstream(p, t, k) * slots.a[k];
    slots_sum = warp_sum(slots_sum);
  }
  const float inverse_total = m.inverse_total();
  const float* column = p.column != nullptr ? p.column : p.grad_importance;
  float dot = 0.0f;
  for (int e = threadIdx.x; e < E && column != nullptr; e += kWarp) {
    dot += rows.power[e] * column[e];
  }
  dot = warp_sum(dot) * inverse_total;
  float row = p.grad_entropy != nullptr ? p.grad_entropy[t] : 0.0f, z = 0.0f;
  if (p.scalar != nullptr) {
    row += p.scalar[1];
    if (in.entropy == nullptr && !in.sigmoid) z = p.scalar[0] * m.log_total();
  }
  const float entropy = m.n > 1 ? row / logf(float(m.n)) : 0.0f;
  const float mean_z = m.sum_z / (1.0f + m.rest);
  const float noisy_sum = in.sum == RouteSum::kExperts ? slots_sum * noisy.inverse_total() : 0.0f;
  float through = 0.0f;  // the threshold of noisy_load
#pragma unroll 1
  for (int e = threadIdx.x; e < E; e += kWarp) {
    const float a = rows.logit[e];
    float slope = z - dot - entropy * (a - m.shift - mean_z);
    if (column != nullptr) slope += column[e];
    float grad = a == -INFINITY ? 0.0f : rows.power[e] * inverse_total * slope;
    if (noisy_sum != 0.0f) {
      const float power =
          in.noise == nullptr ? rows.power[e] : expf(noisy_logit(in, rows, t, e) - noisy.shift);
      grad -= power * noisy_sum;
    }
    if (p.win_slope != nullptr && last.at < E) {
      const float margin = margin_of(a, last.value, in.noise_std);
      const float part = p.win_slope[e] * expf(-0.5f * margin * margin) * 0.39894228f;
      through += part;
      grad += part;
    }
    rows.key[e] = grad;
  }
  through = warp_sum(through);
  __syncwarp();
  if (threadIdx.x == 0 && last.at < E) rows.key[last.at] -= through;
  __syncwarp();
  if (p.grad_weight == nullptr) return;
  for (int64_t k = threadIdx.x; k < in.K; k += kWarp) {
    if (slots.expert[k] >= E) continue;
    const float shared = in.sum == RouteSum::kChosen ? slots_sum : 0.0f;
    rows.key[slots.expert[k]] += slots.a[k] * (upstream(p, t, k) - shared);
  }
  __syncwarp();
}

__device__ inline void store_float(void* x, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(x)[at] = value; return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(x)[at] = from_float<__nv_bfloat16>(value);
      return;
    case DType::kFloat16: static_cast<__half*>(x)[at] = from_float<__half>(value); return;
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the launcher
  }
}

// From the gradient of a, in the row of keys, to that of what ranks the experts.
__device__ inline void write_gradient(const RouteBackwardDeviceParams& p, const TokenRows& rows,
                                      int64_t t) {
  const RouteInput& in = p.in;
  RowMoments m = {};
  float z = 0.0f;
  const auto score = [&](int64_t e) {
    return load_float(in.score, in.dtype, t * in.stride_st + e);
  };
  if (in.sigmoid && p.scalar != nullptr) {
    m = row_moments(in.E, nullptr, score);
    z = p.scalar[0] * m.log_total() * m.inverse_total();
  }
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < in.E; e += kWarp) {
    float grad = rows.key[e];
    if (in.entropy != nullptr) {
      const float given = in.entropy[t * in.stride_et + e];
      grad *= in.tau > 0.0f ? -1.0f / in.tau : -1.0f / (given + in.floor);
      if (given < 0.0f) grad = 0.0f;
      if (p.part_grad != nullptr) {
        rows.key[e] = grad;
      } else {
        static_cast<float*>(p.grad)[t * in.E + e] = grad;
      }
      continue;
    }
    if (in.sigmoid) {
      const float x = score(e), tail = expf(-fabsf(x));
      grad *= (x < 0.0f ? 1.0f : tail) / (1.0f + tail);  // sigmoid(-x)
      if (p.scalar != nullptr) grad += z * expf(x - m.shift);
    }
    store_float(p.grad, in.dtype, t * in.E + e, grad);
  }
}

// A warp per token; for an entropy per module every thread then adds up its columns of them.
template <int kWarps, int kE>
__global__ void __launch_bounds__(kWarps* kWarp, kThreadsPerMultiprocessor / (kWarps * kWarp))
    route_backward_kernel(const RouteBackwardDeviceParams p) {
  constexpr int kThreads = kWarps * kWarp;
  GOSE_SHARED(float, logit, kWarps* kE);
  GOSE_SHARED(float, key, kWarps* kE);
  GOSE_SHARED(float, power, kWarps* kE);
  GOSE_SHARED(float, slot, kWarps* kE);
  GOSE_SHARED(int, expert, kWarps* kE);
  GOSE_SHARED(float, total, kE);
  const RouteInput& in = p.in;
  const int row = threadIdx.y * kE, thread = threadIdx.y * kWarp + threadIdx.x;
  const TokenRows rows = {logit + row, key + row, power + row};
  const Slots slots = {slot + row, expert + row};
  for (int e = thread; e < in.E; e += kThreads) total[e] = 0.0f;
  const int64_t begin = blockIdx.x * p.tokens, stop = min(in.T, begin + p.tokens);
  for (int64_t first = begin; first < stop; first += kWarps) {
    const int64_t t = first + threadIdx.y;
    if (t < stop) {
      widen(in, t, rows);
      if (p.again && in.policy == RoutePolicy::kGroupLimited) limit_groups(in, rows);
      const RowMoments m = row_moments(in.E, rows.power, [&](int64_t e) { return rows.logit[e]; });
      logit_gradient(p, rows, m, slots, t);
      write_gradient(p, rows, t);
    }
    if (p.part_grad == nullptr) continue;  // the same for the whole block
    __syncthreads();
    for (int e = thread; e < in.E; e += kThreads) {
      for (int w = 0; w < kWarps && first + w < stop; ++w) total[e] += key[w * kE + e];
    }
    __syncthreads();
  }
  if (p.part_grad == nullptr) return;
  for (int e = thread; e < in.E; e += kThreads) p.part_grad[blockIdx.x * in.E + e] = total[e];
}

// The gradient of an entropy per module: a column a thread, blocks by threadIdx.y, then in order.
__global__ void __launch_bounds__(kWarp* kFinishRows)
    route_total_kernel(const RouteBackwardDeviceParams p) {
  GOSE_SHARED(double, part, kFinishRows* kWarp);
  const int64_t e = blockIdx.x * int64_t(kWarp) + threadIdx.x, E = p.in.E;
  const int64_t blocks = ceil_div(p.in.T, p.tokens);
  double total = 0;
  for (int64_t b = threadIdx.y; b < blocks && e < E; b += kFinishRows) {
    total += double(p.part_grad[b * E + e]);
  }
  part[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || e >= E) return;
  for (int row = 1; row < kFinishRows; ++row) total += part[row * kWarp + threadIdx.x];
  static_cast<float*>(p.grad)[e] = float(total);
}

template <int kWarps, int kE>
cudaError_t launch_tokens(const RouteBackwardDeviceParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.in.T, p.tokens), parts = ceil_div(p.in.T, p.live_tokens);
  const dim3 threads(kWarp, kWarps);
  cudaError_t error = cudaSuccess;
  if (p.grad_loss != nullptr) {
    error = launch(&route_live_kernel, ceil_div(parts, kLiveWarps), 1, dim3(kWarp, kLiveWarps),
                   stream, p);
    if (error == cudaSuccess && p.part_win != nullptr) {
      error = launch(&route_win_kernel<kWarps, kE>, blocks, 1, threads, stream, p);
    }
    if (error == cudaSuccess) {
      error = launch(&route_shared_kernel, 1, 1, dim3(kWarp, kFinishRows), stream, p);
    }
  }
  if (error != cudaSuccess) return error;
  return launch(&route_backward_kernel<kWarps, kE>, blocks, 1, threads, stream, p);
}

}  // namespace

cudaError_t route_backward(const RouteBackwardDeviceParams& p, cudaStream_t stream) {
  if (p.in.E > kRouteDeviceExperts || p.in.num_bands > kRouteBands) return cudaErrorInvalidValue;
  if (p.in.dtype == DType::kFloat64 || p.in.dtype == DType::kInt32) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (p.in.T > 0) {
    error = p.in.E <= 64    ? launch_tokens<4, 64>(p, stream)
            : p.in.E <= 512 ? launch_tokens<4, 512>(p, stream)
                            : launch_tokens<1, kRouteDeviceExperts>(p, stream);
  }
  if (error != cudaSuccess || p.part_grad == nullptr) return error;
  return launch(&route_total_kernel, ceil_div(p.in.E, kWarp), 1, dim3(kWarp, kFinishRows), stream,
                p);
}

}  // namespace gose::cuda
