// One token of route, one warp: its logits and keys in shared rows, the choice, the weights.
// Forward and backward share it. Legend and formulas: gose_kernels/ops/route.py.
#pragma once

#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreadsPerMultiprocessor = 1024;  // 64 registers a thread

__device__ inline float load_float(const void* x, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(x)[at];
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(x)[at]);
    case DType::kFloat16: return to_float(static_cast<const __half*>(x)[at]);
    case DType::kFloat64:
    case DType::kInt32: return 0.0f;  // refused by the launcher
  }
  return 0.0f;
}

__device__ inline float warp_max(float x) {  // leaves NaN aside
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, apart));
  }
  return x;
}

__device__ inline int warp_count(int x) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
  return x;
}

// Sums over exp(z), z = x - shift, as in entropy.cu: `rest` leaves one maximum out.
struct RowMoments {
  float shift, rest, sum_z;
  int n;  // elements that are not -infinity

  __device__ float inverse_total() const { return 1.0f / (1.0f + rest); }
  __device__ float log_total() const { return shift + log1pf(rest); }
  __device__ float entropy() const {
    const float nats = log1pf(rest) - sum_z / (1.0f + rest);
    const float share = n > 1 ? nats / logf(float(n)) : 0.0f * nats;
    return share < 0.0f ? 0.0f : share > 1.0f ? 1.0f : share;  // NaN stays
  }
};

// Of x(e) for the row's experts; exp(z) goes to `power` unless that is nullptr.
template <typename Row>
__device__ RowMoments row_moments(int64_t E, float* power, const Row& x) {
  float top = -INFINITY;
  int n = 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < E; e += kWarp) {
    const float value = x(e);
    top = fmaxf(top, value);
    n += value != -INFINITY;
  }
  top = warp_max(top);
  RowMoments m = {top == -INFINITY ? 0.0f : top, 0.0f, 0.0f, warp_count(n)};
  int tops = 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < E; e += kWarp) {
    const float value = x(e), z = value - m.shift, exp_z = expf(z);
    tops += z == 0.0f;
    m.rest += z == 0.0f ? 0.0f : exp_z;
    m.sum_z += value == -INFINITY ? 0.0f : exp_z * z;
    if (power != nullptr) power[e] = exp_z;
  }
  m.rest = warp_sum(m.rest) + float(top == -INFINITY ? 0 : warp_count(tops) - 1);
  m.sum_z = warp_sum(m.sum_z);
  return m;
}

// A key that was taken for a slot: NaN, which no key is, with the slot in its low bits.
__device__ inline float taken_key(int64_t k) { return __uint_as_float(0x7fc00000u + unsigned(k)); }
__device__ inline bool is_taken(float key) { return key != key; }
__device__ inline int slot_of(float key) { return int(__float_as_uint(key) & 0xffffu); }

struct Choice {
  float value;
  int at;
};

__device__ inline Choice better(const Choice& a, const Choice& b) {
  return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

// The largest of every 32nd key from `lane` on, ties to the smaller place, `count` if all
// -infinity.
__device__ inline Choice lane_best(const float* key, int count, int lane) {
  Choice best = {-INFINITY, count};
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) {
    if (key[i] > best.value) best = {key[i], i};
  }
  return best;
}

// The same of all lanes' bests, in every lane.
__device__ inline Choice warp_best(Choice best) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Choice other = {__shfl_xor_sync(kWholeWarp, best.value, apart),
                          __shfl_xor_sync(kWholeWarp, best.at, apart)};
    best = better(best, other);
  }
  return best;
}

// What a warp knows of its token.
struct TokenRows {
  float* logit;  // [E] a
  float* key;    // [E]
  float* power;  // [E] exp(a - shift); scores of groups before
};

// a and key of token t.
__device__ inline void widen(const RouteInput& p, int64_t t, const TokenRows& rows) {
  const float* entropy = p.entropy != nullptr ? p.entropy + t * p.stride_et : nullptr;
  const float* noise = p.noise != nullptr ? p.noise + t * p.stride_nt : nullptr;
  const bool by_sigmoid = p.bias != nullptr || p.policy == RoutePolicy::kGroupLimited;
#pragma unroll 1
  for (int e = threadIdx.x; e < p.E; e += kWarp) {
    const float x = load_float(p.score, p.dtype, t * p.stride_st + e);
    float a = x, key = x;
    if (entropy != nullptr) {
      const float H = entropy[e] < 0.0f ? 0.0f : entropy[e];
      a = p.tau > 0.0f ? -H / p.tau : -logf(H + p.floor);
      key = -H;
    } else if (p.sigmoid) {
      const float tail = expf(-fabsf(x));
      a = (x > 0.0f ? 0.0f : x) - log1pf(tail);
      if (by_sigmoid) key = (x < 0.0f ? tail : 1.0f) / (1.0f + tail);
      if (p.bias != nullptr) key += p.bias[e];
    } else if (noise != nullptr) {
      key = x + noise[e];
    }
    const bool gone = x == -INFINITY;
    rows.logit[e] = gone ? -INFINITY : a;
    rows.key[e] = gone || key != key ? -INFINITY : key;
  }
  __syncwarp();
}

// a with noise.
__device__ inline float noisy_logit(const RouteInput& p, const TokenRows& rows, int64_t t,
                                    int64_t e) {
  return p.noise == nullptr ? rows.logit[e] : rows.logit[e] + p.noise[t * p.stride_nt + e];
}

// Leaves the keys of the best groups, -infinity in the others.
__device__ inline void limit_groups(const RouteInput& p, const TokenRows& rows) {
  const int size = int(p.E / p.num_groups), groups = int(p.num_groups);
  float* score = rows.power;
#pragma unroll 1
  for (int g = 0; g < groups; ++g) {
    float best = -INFINITY, next = -INFINITY;  // the two largest of this lane
#pragma unroll 1
    for (int i = threadIdx.x; i < size; i += kWarp) {
      const float key = rows.key[g * size + i];
      next = key > best ? best : key > next ? key : next;
      best = key > best ? key : best;
    }
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      const float other = __shfl_xor_sync(kWholeWarp, best, apart);
      const float after = __shfl_xor_sync(kWholeWarp, next, apart);
      next = fmaxf(fminf(best, other), fmaxf(next, after));
      best = fmaxf(best, other);
    }
    if (threadIdx.x == 0) score[g] = p.sigmoid && next != -INFINITY ? best + next : best;
  }
  __syncwarp();
#pragma unroll 1
  for (int64_t i = 0; i < p.top_groups; ++i) {
    const Choice best = warp_best(lane_best(score, groups, threadIdx.x));
    __syncwarp();
    if (best.at < groups && threadIdx.x == 0) score[best.at] = taken_key(0);
    __syncwarp();
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < p.E; e += kWarp) {
    if (!is_taken(score[e / size])) rows.key[e] = -INFINITY;
  }
  __syncwarp();
}

// Slots of a warp's token.
struct Slots {
  float* a;     // [K] a of the expert with its noise, -infinity if unused; then the weight
  int* expert;  // [K], E = unused
};

// The experts of a widened token before any capacity drop; taken keys remember their slots. Returns
// the K-th choice before adaptive k. `keep`: slots that bands leave.
__device__ inline Choice choose(const RouteInput& p, const TokenRows& rows, const RowMoments& m,
                                int64_t t, int keep, const Slots& slots) {
  const int E = int(p.E);
  const float inverse_total = m.inverse_total();
  Choice mine = lane_best(rows.key, E, threadIdx.x);
  Choice last = {-INFINITY, E};
  float before = 0.0f;
#pragma unroll 1
  for (int k = 0; k < p.K; ++k) {
    const Choice best = warp_best(mine);
    last = best;
    bool used = best.at < E;
    if (used && p.adaptive == RouteAdaptive::kMass) {
      used = !(before >= p.mass);
      before += rows.power[best.at] * inverse_total;
    } else if (used && p.adaptive == RouteAdaptive::kBands) {
      used = k < keep;
    }
    if (int(threadIdx.x) == (best.at < E ? best.at : k) % kWarp) {
      slots.expert[k] = used ? best.at : E;
      slots.a[k] = used ? noisy_logit(p, rows, t, best.at) : -INFINITY;
      if (best.at < E) {
        rows.key[best.at] = used ? taken_key(k + 1) : -INFINITY;
        mine = lane_best(rows.key, E, threadIdx.x);
      }
    }
  }
  __syncwarp();
  return last;
}

// Weights in the place of a; `noisy` are the moments of a + noise.
__device__ inline void weigh(const RouteInput& p, const RowMoments& noisy, const Slots& slots) {
  float top = -INFINITY, total = 0.0f;
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < p.K; k += kWarp) top = fmaxf(top, slots.a[k]);
  top = warp_max(top);
  const bool chosen = p.sum == RouteSum::kChosen;
  float shift = chosen && top != -INFINITY ? top : 0.0f;
  if (p.sum == RouteSum::kExperts) shift = noisy.shift;
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < p.K; k += kWarp) {
    slots.a[k] = expf(slots.a[k] - shift);
    total += slots.a[k];
  }
  total = warp_sum(total);
  float scale = 1.0f;
  if (p.sum == RouteSum::kExperts) scale = noisy.inverse_total();
  if (chosen) scale = total == 0.0f ? 0.0f : 1.0f / total;  // no expert at all
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < p.K; k += kWarp) {
    slots.a[k] = slots.expert[k] < p.E ? slots.a[k] * scale : 0.0f;
  }
}

// Probability that a standard normal number is below x, to 1.2e-7 of itself on the lower side
// [Numerical Recipes, erfcc].
__device__ inline float normal_below(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float y = t * 0.17087277f - 0.82215223f;
  y = y * t + 1.48851587f;
  y = y * t - 1.13520398f;
  y = y * t + 0.27886807f;
  y = y * t - 0.18628806f;
  y = y * t + 0.09678418f;
  y = y * t + 0.37409196f;
  y = y * t + 1.00002368f;
  y = y * t - 1.26551223f;
  const float tail = 0.5f * t * expf(y - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

// (score - threshold) / noise_std; infinite where there is no K-th expert: all of them win.
__device__ inline float margin_of(float a, float threshold, float noise_std) {
  if (a == -INFINITY) return -INFINITY;
  return threshold == -INFINITY ? INFINITY : (a - threshold) / noise_std;
}

}  // namespace
}  // namespace gose::cuda
