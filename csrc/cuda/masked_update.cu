// One pass over the tensors of a list, many tensors a launch. Quads of frozen elements are skipped
// without loading them; in mixed quads frozen elements are stored as they were loaded.
#include <cmath>

#include "cuda/masks.cuh"
#include "philox.h"

namespace gose::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kQuad = 4;   // neighbours of one thread: 16 bytes of a state
constexpr int kSteps = 2;  // quads of one thread
constexpr int64_t kChunk = kThreads * kQuad * kSteps;
constexpr int kBatch = 20;  // tensors of a launch, whose parameters have 4 KB

struct Entry {
  UpdateTensor t;  // end_chunk: blocks of this launch
  PhiloxKey key;
  bool wide;  // quads of neighbours are aligned in every tensor and have one state after another
};

template <class Params>
struct Batch {
  Params p;  // p.list.tensor belongs to the host
  int32_t count;
  float log_beta[2][2];  // log of beta1, beta2 as the sum of two floats
  Entry entry[kBatch];
};

__device__ inline float float_at(const void* data, bool is_double) {
  return is_double ? float(*static_cast<const double*>(data)) : *static_cast<const float*>(data);
}

// lr and grad_scale stay on the device: nothing waits for them.
__device__ inline float lr_of(const UpdateScalars& s) { return float_at(s.lr, s.lr_is_double); }
__device__ inline float scale_of(const UpdateScalars& s) {
  const float scale =
      s.grad_scale == nullptr ? 1.0f : float_at(s.grad_scale, s.grad_scale_is_double);
  return s.maximize ? -scale : scale;
}
// 1 - lr * decay as torch computes it: in the dtype of lr, then rounded to float32.
__device__ inline float keep_of(const UpdateScalars& s) {
  if (s.decay == 0) return 1.0f;
  if (s.lr_is_double) return float(1 - *static_cast<const double*>(s.lr) * s.decay);
  return __fsub_rn(1.0f, __fmul_rn(lr_of(s), float(s.decay)));
}

// 1 - beta^step to two units in the last place, without float64: nothing is cancelled.
__device__ inline float one_minus_power(const float (&log_beta)[2], float step) {
  return -expm1f(fmaf(step, log_beta[0], step * log_beta[1]));
}

struct Bias {  // what a step count does to adam's step
  float rate = 0.0f, grow = 0.0f;
};

template <int kMoments>  // 1 with momentum, 0 without
struct Sgd {
  using Params = MaskedSgdParams;
  static constexpr int kStates = kMoments;
  const Params& p;
  float lr, scale;

  __device__ explicit Sgd(const Batch<Params>& b)
      : p(b.p), lr(lr_of(b.p.list.scalar)), scale(scale_of(b.p.list.scalar)) {}
  __device__ Bias bias(float) const { return {}; }
  __device__ void operator()(const Bias&, float g, float& param, float* state) const {
    g = g * scale;
    if (p.weight_decay != 0.0f) g = g + p.weight_decay * param;
    if constexpr (kMoments == 1) {
      state[0] = p.momentum * state[0] + p.undamped * g;
      g = p.nesterov ? g + p.momentum * state[0] : state[0];
    }
    param = param - lr * g;
  }
};

template <int kMoments>  // 3 with amsgrad, 2 without
struct Adam {
  using Params = MaskedAdamParams;
  static constexpr int kStates = kMoments;
  const Batch<Params>& b;
  float lr, scale, keep;

  __device__ explicit Adam(const Batch<Params>& given)
      : b(given),
        lr(lr_of(b.p.list.scalar)),
        scale(scale_of(b.p.list.scalar)),
        keep(keep_of(b.p.list.scalar)) {}
  __device__ Bias bias(float step) const {
    return {lr / one_minus_power(b.log_beta[0], step),
            1.0f / sqrtf(one_minus_power(b.log_beta[1], step))};
  }
  __device__ void operator()(const Bias& bias, float g, float& param, float* state) const {
    const float rest1 = float(1 - b.p.beta1), beta2 = float(b.p.beta2);
    const float rest2 = float(1 - b.p.beta2);
    g = g * scale;
    if (b.p.weight_decay != 0.0f) g = g + b.p.weight_decay * param;
    const float apart = g - state[0];
    // As torch's lerp: exact at both ends.
    state[0] = rest1 < 0.5f ? state[0] + rest1 * apart : g + (rest1 - 1.0f) * apart;
    state[1] = state[1] * beta2 + rest2 * g * g;
    float highest = state[1];
    if constexpr (kMoments == 3) {
      highest = state[2] > highest || state[2] != state[2] ? state[2] : highest;
      state[2] = highest;
    }
    param = param * keep - bias.rate * (state[0] / (sqrtf(highest) * bias.grow + b.p.eps));
  }
};

struct Lion {
  using Params = MaskedLionParams;
  static constexpr int kStates = 1;
  const Params& p;
  float lr, scale, keep;

  __device__ explicit Lion(const Batch<Params>& b)
      : p(b.p),
        lr(lr_of(b.p.list.scalar)),
        scale(scale_of(b.p.list.scalar)),
        keep(keep_of(b.p.list.scalar)) {}
  __device__ Bias bias(float) const { return {}; }
  __device__ void operator()(const Bias&, float g, float& param, float* state) const {
    g = g * scale;
    const float mixed = p.beta1 * state[0] + p.rest1 * g;
    const float sign = mixed > 0.0f ? 1.0f : mixed < 0.0f ? -1.0f : 0.0f;
    param = param * keep - lr * sign;
    state[0] = p.beta2 * state[0] + p.rest2 * g;
  }
};

// Whether a unit must not change: its mask says so, or it has no state.
__device__ inline bool is_frozen(const UpdateTensor& t, int64_t unit) {
  return (t.row != nullptr && t.row[unit] < 0) || mask_freezes(t, unit);
}

// Whether every element has a mask value, and state in its place.
__host__ __device__ inline bool by_element(const UpdateTensor& t) {
  return t.inner == 1 && t.row == nullptr && t.numel > 0;
}

__device__ inline float rounded(float x, unsigned, bool, float) { return x; }
__device__ inline __nv_bfloat16 rounded(float x, unsigned lane, bool drawn, __nv_bfloat16) {
  if (!drawn || x != x) return __float2bfloat16_rn(x);
  return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(x) + lane) >> 16));
}

// kLanes elements from i on, their states from s on; `live` has a bit for each.
template <class Rule, typename Float, int kLanes>
__device__ void update_lanes(const Rule& rule, const Entry& e, int64_t draw_at, int64_t i,
                             int64_t s, unsigned live, Bias bias, bool stochastic) {
  const UpdateTensor& t = e.t;
  auto* param_at = reinterpret_cast<Vector<Float, kLanes>*>(static_cast<Float*>(t.param) + i);
  Vector<Float, kLanes> param = *param_at;
  const auto grad =
      *reinterpret_cast<const Vector<Float, kLanes>*>(static_cast<const Float*>(t.grad) + i);
  Vector<float, kLanes> master = {}, state[Rule::kStates == 0 ? 1 : Rule::kStates];
  if (t.master != nullptr) master = *reinterpret_cast<Vector<float, kLanes>*>(t.master + s);
#pragma unroll
  for (int n = 0; n < Rule::kStates; ++n) {
    state[n] = *reinterpret_cast<Vector<float, kLanes>*>(t.state[n] + s);
  }
  uint32_t draws[2] = {};  // two lanes each
  if (stochastic) {
    const PhiloxBlock block = philox(e.key, uint64_t(draw_at >> 3));
    if constexpr (kLanes == 1) {
      draws[0] = philox_draw(block, int(draw_at & 7));
    } else {  // half a block: quads begin at multiples of four
      draws[0] = draw_at & 4 ? block.word[2] : block.word[0];
      draws[1] = draw_at & 4 ? block.word[3] : block.word[1];
    }
  }
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    if (!(live >> j & 1)) continue;
    if (t.step_by_mask && by_element(t)) bias = rule.bias(t.step[i + j] += 1.0f);
    float value = t.master != nullptr ? master.lane[j] : to_float(param.lane[j]);
    float moment[3] = {};
#pragma unroll
    for (int n = 0; n < Rule::kStates; ++n) moment[n] = state[n].lane[j];
    rule(bias, to_float(grad.lane[j]), value, moment);
#pragma unroll
    for (int n = 0; n < Rule::kStates; ++n) state[n].lane[j] = moment[n];
    master.lane[j] = value;
    param.lane[j] = rounded(value, draws[j / 2] >> (j & 1) * 16 & 0xffffu, stochastic, Float());
  }
  *param_at = param;
  if (t.master != nullptr) *reinterpret_cast<Vector<float, kLanes>*>(t.master + s) = master;
#pragma unroll
  for (int n = 0; n < Rule::kStates; ++n) {
    *reinterpret_cast<Vector<float, kLanes>*>(t.state[n] + s) = state[n];
  }
}

template <class Rule, typename Float>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ Batch<typename Rule::Params> b) {
  int n = 0;
  while (b.entry[n].t.end_chunk <= blockIdx.x) ++n;
  const Entry& e = b.entry[n];
  const UpdateTensor& t = e.t;
  const int64_t chunk = blockIdx.x - (n == 0 ? 0 : b.entry[n - 1].t.end_chunk);
  const Rule rule(b);
  const bool stochastic = b.p.list.stochastic;
  Bias bias;
  if (t.step != nullptr && !t.step_by_mask) bias = rule.bias(t.step[0]);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int64_t i = chunk * kChunk + int64_t(step * kThreads + threadIdx.x) * kQuad;
    if (i >= t.numel) return;
    const int64_t left = t.numel - i < kQuad ? t.numel - i : kQuad;
    if (e.wide && left == kQuad) {
      unsigned live = 15;
      int64_t s = i;
      if (by_element(t)) {
        live = live_elements<kQuad>(t, i);
      } else {
        const int64_t unit = t.inner == t.numel ? 0 : quotient(i, t.inner);
        if (is_frozen(t, unit)) continue;
        if (t.row != nullptr) s += (t.row[unit] - unit) * t.inner;
        if (t.step_by_mask) bias = rule.bias(t.step[unit]);
      }
      if (live == 0) continue;
      update_lanes<Rule, Float, kQuad>(rule, e, t.start + i, i, s, live, bias, stochastic);
      continue;
    }
#pragma unroll 1
    for (int64_t at = i; at < i + left; ++at) {
      const int64_t unit = quotient(at, t.inner);
      if (is_frozen(t, unit)) continue;
      const int64_t s = t.row == nullptr ? at : at + (t.row[unit] - unit) * t.inner;
      if (t.step_by_mask && !by_element(t)) bias = rule.bias(t.step[unit]);
      update_lanes<Rule, Float, 1>(rule, e, t.start + at, at, s, 1, bias, stochastic);
    }
  }
}

// Counts go up before the update reads them, but for counts of elements, which are a thread's own.
template <class Params>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Batch<Params> b) {
  int n = 0;
  while (b.entry[n].t.end_chunk <= blockIdx.x) ++n;
  const UpdateTensor& t = b.entry[n].t;
  const int64_t chunk = blockIdx.x - (n == 0 ? 0 : b.entry[n - 1].t.end_chunk);
  const int64_t j = chunk * kThreads + threadIdx.x;
  if (j >= (t.step_by_mask ? t.num_steps : 1)) return;
  if (!t.step_by_mask || !is_frozen(t, j)) t.step[j] += 1.0f;
}

bool is_wide(const UpdateTensor& t, int item_bytes, bool stochastic) {
  if (stochastic && t.start % kQuad != 0) return false;
  bool wide = aligned(t.param, kQuad * item_bytes) && aligned(t.grad, kQuad * item_bytes) &&
              aligned(t.master, kVectorBytes);
  for (const float* state : t.state) wide = wide && aligned(state, kVectorBytes);
  if (by_element(t)) return wide && fits_lanes(t.frozen, t.kind, kQuad);
  return wide && (t.inner % kQuad == 0 || (t.inner == t.numel && t.row == nullptr));
}

template <class Params>
cudaError_t launch_batch(void (*kernel)(Batch<Params>), Batch<Params>& b, cudaStream_t stream) {
  const int64_t blocks = b.count == 0 ? 0 : b.entry[b.count - 1].t.end_chunk;
  return blocks == 0 ? cudaSuccess : launch(kernel, blocks, 1, dim3(kThreads), stream, b);
}

template <class Rule, typename Float>
cudaError_t update_as(const typename Rule::Params& p, Batch<typename Rule::Params>& b,
                      cudaStream_t stream) {
  using Params = typename Rule::Params;
  b.p = p;
  for (int64_t first = 0; first < p.list.count; first += kBatch) {
    const int64_t left = p.list.count - first;
    b.count = int32_t(left < kBatch ? left : kBatch);
    int64_t chunks = 0;
    if (p.list.tensor[first].step != nullptr) {
      for (int n = 0; n < b.count; ++n) {
        UpdateTensor& t = b.entry[n].t = p.list.tensor[first + n];
        const int64_t counts = !t.step_by_mask ? 1 : by_element(t) ? 0 : t.num_steps;
        t.end_chunk = chunks += ceil_div(counts, kThreads);
      }
      const cudaError_t error = launch_batch(&count_kernel<Params>, b, stream);
      if (error != cudaSuccess) return error;
    }
    chunks = 0;
    for (int n = 0; n < b.count; ++n) {
      Entry& e = b.entry[n];
      e.t = p.list.tensor[first + n];
      e.t.end_chunk = chunks += ceil_div(e.t.numel, kChunk);
      e.key = philox_key(e.t.seed, p.list.draw);
      e.wide = is_wide(e.t, sizeof(Float), p.list.stochastic);
    }
    const cudaError_t error = launch_batch(&update_kernel<Rule, Float>, b, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class Rule>
cudaError_t update(const typename Rule::Params& p, Batch<typename Rule::Params>& b,
                   cudaStream_t stream) {
  switch (p.list.dtype) {
    case DType::kFloat32: return update_as<Rule, float>(p, b, stream);
    case DType::kBFloat16: return update_as<Rule, __nv_bfloat16>(p, b, stream);
    case DType::kFloat16:
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

void set_log(double beta, float (&log_beta)[2]) {
  const double exact = std::log(beta);
  log_beta[0] = float(exact);
  log_beta[1] = beta > 0 ? float(exact - double(log_beta[0])) : 0.0f;  // log 0 is one float
}

}  // namespace

cudaError_t masked_sgd(const MaskedSgdParams& p, cudaStream_t stream) {
  Batch<MaskedSgdParams> b = {};
  return p.momentum != 0.0f ? update<Sgd<1>>(p, b, stream) : update<Sgd<0>>(p, b, stream);
}

cudaError_t masked_adam(const MaskedAdamParams& p, cudaStream_t stream) {
  Batch<MaskedAdamParams> b = {};
  set_log(p.beta1, b.log_beta[0]);
  set_log(p.beta2, b.log_beta[1]);
  return p.amsgrad ? update<Adam<3>>(p, b, stream) : update<Adam<2>>(p, b, stream);
}

cudaError_t masked_lion(const MaskedLionParams& p, cudaStream_t stream) {
  Batch<MaskedLionParams> b = {};
  return update<Lion>(p, b, stream);
}

}  // namespace gose::cuda
