// distill_loss and its gradient, one block per sample: its logits are read from memory once and
// then from cache, for the largest values, the sums of exponentials, the terms with the slopes.
// Sums are of doubles: at a high temperature slopes are differences of nearly equal probabilities,
// and the rounding of a total moves them all.
#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

constexpr int kThreads = 256;                // at most
constexpr int kBlocksPerMultiprocessor = 4;  // 64 registers a thread
constexpr int kMostWarps = kThreads / kWarp;

// log(a / b), precise where the two are close.
__device__ inline float log_ratio(double a, double b) {
  return a >= b ? log1pf(float((a - b) / b)) : -log1pf(float((b - a) / a));
}

// What an outcome of probability p, q = p * exp(-e) of the student, adds to KL and its slope.
struct Outcome {
  float term;        // p * (exp(-e) - 1 + e), q where p = 0
  float difference;  // q - p
};

// Without a branch: ptxas would run out of the registers that hold where a warp meets again.
__device__ inline Outcome outcome(float p, float q, float e) {
  const float f = -e, difference = q - p;
  float series = f * (1.0f / 9.0f) + 1.0f;  // exp(f) - 1 - f = f^2 / 2 * series, by Taylor
#pragma unroll
  for (int n = 8; n >= 3; --n) series = f * (1.0f / float(n)) * series + 1.0f;
  const float rest = f * f * 0.5f * series;
  const bool near = fabsf(f) < 0.5f;
  const float term = near ? p * rest : p * e + difference;
  return {p == 0.0f ? q : term, near && p != 0.0f ? p * (f + rest) : difference};
}

// Reductions over the block, the same bits in every thread: by warps, then over them in order.
struct Block {
  double* part;  // [kMostWarps]

  __device__ double sum(double x) const {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
    share(x);
    double total = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += part[w];
    return total;
  }
  __device__ float highest(float x) const {  // leaves NaN aside
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, apart));
    }
    share(x);
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) x = fmaxf(x, float(part[w]));
    return x;
  }
  __device__ void share(double x) const {
    __syncthreads();  // what was shared before has been read
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
    __syncthreads();
  }
};

// kLanes neighbours of a row in any dtype: accesses of 16 bytes, or less where that is all.
template <typename Float, int kLanes>
__device__ void read_as(const Float* row, float (&out)[kLanes]) {
  constexpr int kOne = kLanes < kWidest<Float> ? kLanes : kWidest<Float>;
#pragma unroll
  for (int first = 0; first < kLanes; first += kOne) {
    const auto x = *reinterpret_cast<const Vector<Float, kOne>*>(row + first);
#pragma unroll
    for (int i = 0; i < kOne; ++i) out[first + i] = to_float(x.lane[i]);
  }
}

template <int kLanes>
__device__ void read(const void* row, DType dtype, int64_t at, float (&out)[kLanes]) {
  switch (dtype) {
    case DType::kFloat32: return read_as(static_cast<const float*>(row) + at, out);
    case DType::kBFloat16: return read_as(static_cast<const __nv_bfloat16*>(row) + at, out);
    case DType::kFloat16: return read_as(static_cast<const __half*>(row) + at, out);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the launcher
  }
}

// One sample: its rows, its factors, its label's row y'[c] = keep * y[c] + spread.
template <typename Float>
struct Sample {
  const DistillParams& p;
  int64_t n, label;
  float ce, kl;  // what multiplies CE and KL; 0 leaves the part out
  float keep, spread;

  __device__ Sample(const DistillParams& params, int64_t sample) : p(params), n(sample) {
    const float weight = p.weight == nullptr ? 1.0f : p.weight[n];
    const float task = p.task_weight_B == nullptr ? p.task_weight : p.task_weight_B[n];
    ce = weight * task;
    kl = weight * (1.0f - task) * p.kl_scale;
    label = p.soft == nullptr ? p.label[n] : 0;
    keep = 1.0f - p.smoothing;
    spread = p.smoothing / float(p.C);
  }
  template <int kCount>
  __device__ void student(int64_t c, float (&x)[kCount]) const {
    read_as(static_cast<const Float*>(p.student) + n * p.stride_sb + c, x);
  }
  template <int kCount>
  __device__ void teacher(int64_t c, float (&x)[kCount]) const {
    read(p.teacher, p.teacher_dtype, n * p.stride_tb + c, x);
  }
  template <int kCount>
  __device__ void target(int64_t c, float (&y)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = c + i == label ? 1.0f : 0.0f;
    if (p.soft != nullptr) read(p.soft, p.soft_dtype, n * p.stride_lb + c, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = keep * y[i] + spread;
  }
  // Whether CE needs a sum over all classes.
  __device__ bool spreads() const { return p.soft != nullptr || spread != 0.0f; }
};

// CE, and what its slope needs.
struct Task {
  float ce, sum_target, inverse_total;
};

template <int kLanes, typename Float>
__device__ Task task_of(const Sample<Float>& s, const Block& block, float top, double total) {
  const float log_total = log1pf(float(total - 1));
  Task task = {0.0f, s.keep + s.spread * float(s.p.C), float(1 / total)};
  if (!s.spreads()) {
    float at_label[1];
    s.student(s.label, at_label);
    task.ce = s.keep * (log_total - (at_label[0] - top));
    return task;
  }
  double sum_y = 0, sum_yz = 0;
#pragma unroll 1
  for (int64_t c = int64_t(threadIdx.x) * kLanes; c < s.p.C; c += int64_t(blockDim.x) * kLanes) {
    float x[kLanes], y[kLanes];
    s.student(c, x);
    s.target(c, y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      sum_y += double(y[i]);
      if (y[i] != 0.0f) sum_yz += double(y[i] * (x[i] - top));
    }
  }
  task.sum_target = float(block.sum(sum_y));
  task.ce = task.sum_target * log_total - float(block.sum(sum_yz));
  return task;
}

// Slope of CE at a class with exp(student - top) and y'.
__device__ inline float ce_slope(const Task& task, float power, float y) {
  return power * (task.sum_target * task.inverse_total) - y;
}

// Teacher and student over all C classes. Returns the thread's part of KL.
template <typename Float, int kLanes>
__device__ double row_of_all(const Sample<Float>& s, const Block& block, Float* grad, float* ce) {
  const DistillParams& p = s.p;
  const int64_t first = int64_t(threadIdx.x) * kLanes, step = int64_t(blockDim.x) * kLanes;
  const bool with_ce = s.ce != 0.0f, with_kl = s.kl != 0.0f, tempered = p.inverse_tau != 1.0f;
  float top = -INFINITY, top_t = -INFINITY;
#pragma unroll 1
  for (int64_t c = first; c < p.C; c += step) {
    float x[kLanes], y[kLanes] = {};
    s.student(c, x);
    if (with_kl) s.teacher(c, y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) top = fmaxf(top, x[i]), top_t = fmaxf(top_t, y[i]);
  }
  top = block.highest(top);
  top_t = block.highest(top_t);
  double total_1 = 0, total_q = 0, total_p = 0;
#pragma unroll 1
  for (int64_t c = first; c < p.C; c += step) {
    float x[kLanes], y[kLanes] = {};
    s.student(c, x);
    if (with_kl) s.teacher(c, y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float z = x[i] - top;
      if (with_ce || !tempered) total_1 += double(expf(z));
      if (with_kl && tempered) total_q += double(expf(z * p.inverse_tau));
      if (with_kl) total_p += double(expf((y[i] - top_t) * p.inverse_tau));
    }
  }
  total_1 = block.sum(total_1);
  const double sum_q = tempered ? block.sum(total_q) : total_1, sum_p = block.sum(total_p);
  const Task task = with_ce ? task_of<kLanes>(s, block, top, total_1) : Task{};
  *ce = task.ce;
  const float inverse_q = float(1 / sum_q), inverse_p = float(1 / sum_p);
  const float shift = with_kl ? log_ratio(sum_p, sum_q) : 0.0f;
  const float ce_scale = s.ce * p.grad_scale, kl_scale = s.kl * p.inverse_tau * p.grad_scale;
  double kl = 0;
#pragma unroll 1
  for (int64_t c = first; c < p.C && (with_kl || grad != nullptr); c += step) {
    float x[kLanes], y[kLanes] = {}, target[kLanes] = {};
    s.student(c, x);
    if (with_kl) s.teacher(c, y);
    if (with_ce && grad != nullptr) s.target(c, target);
    Vector<Float, kLanes> slopes;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float z = x[i] - top;
      float slope = 0.0f;
      if (with_kl) {
        const float z_t = y[i] - top_t;
        const Outcome at =
            outcome(expf(z_t * p.inverse_tau) * inverse_p, expf(z * p.inverse_tau) * inverse_q,
                    (z_t - z) * p.inverse_tau - shift);
        kl += double(at.term);
        slope = at.difference * kl_scale;
      }
      if (with_ce) slope += ce_slope(task, expf(z), target[i]) * ce_scale;
      slopes.lane[i] = from_float<Float>(slope);
    }
    if (grad != nullptr) *reinterpret_cast<Vector<Float, kLanes>*>(grad + c) = slopes;
  }
  return kl;
}

// The J listed classes, and all others as one outcome. Returns the thread's part of KL.
template <typename Float, int kLanes>
__device__ double row_of_listed(const Sample<Float>& s, const Block& block, uint8_t* seen,
                                Float* grad, float* ce) {
  const DistillParams& p = s.p;
  const int64_t first = int64_t(threadIdx.x) * kLanes, step = int64_t(blockDim.x) * kLanes;
  const int64_t* id = p.id + s.n * p.J;
  const float tail = p.tail[s.n];
  const bool with_ce = s.ce != 0.0f, with_kl = s.kl != 0.0f;
  for (int64_t j = threadIdx.x; j < p.J; j += blockDim.x) seen[id[j]] = 1;
  __syncthreads();
  float top = -INFINITY, top_rest = -INFINITY, top_t = -INFINITY;
#pragma unroll 1
  for (int64_t c = first; c < p.C; c += step) {
    float x[kLanes];
    s.student(c, x);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      top = fmaxf(top, x[i]);
      if (seen[c + i] == 0) top_rest = fmaxf(top_rest, x[i]);
    }
  }
  float one[1], other[1];
  for (int64_t j = threadIdx.x; j < p.J; j += blockDim.x) {
    s.teacher(j, one);
    top_t = fmaxf(top_t, one[0]);
  }
  top = block.highest(top);
  top_rest = block.highest(top_rest);
  if (top_rest == -INFINITY) top_rest = 0.0f;
  top_t = block.highest(top_t);
  double total_1 = 0, total_rest = 0, total_q = 0, total_p = 0;
#pragma unroll 1
  for (int64_t c = first; c < p.C; c += step) {
    float x[kLanes];
    s.student(c, x);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      total_1 += double(expf(x[i] - top));
      if (seen[c + i] == 0) total_rest += double(expf((x[i] - top_rest) * p.inverse_tau));
    }
  }
  for (int64_t j = threadIdx.x; j < p.J; j += blockDim.x) {
    s.teacher(j, one);
    s.student(id[j], other);
    total_p += double(expf((one[0] - top_t) * p.inverse_tau));
    total_q += double(expf((other[0] - top) * p.inverse_tau));
  }
  total_1 = block.sum(total_1);
  const double sum_rest = block.sum(total_rest);
  const Task task = with_ce ? task_of<kLanes>(s, block, top, total_1) : Task{};
  *ce = task.ce;
  const float log_rest = (top_rest - top) * p.inverse_tau + logf(float(sum_rest));
  const double sum_q = block.sum(total_q) + double(expf(log_rest));
  const double sum_p = block.sum(total_p) / (1 - double(tail));  // infinite for tail = 1: p = 0
  const float inverse_q = float(1 / sum_q), inverse_p = float(1 / sum_p);
  const float shift = tail < 1.0f ? log_ratio(sum_p, sum_q) : INFINITY;
  const float q_rest = expf(log_rest) * inverse_q;
  const float e =
      q_rest > 1e-30f ? log_ratio(tail, q_rest) : logf(tail) - (log_rest - logf(float(sum_q)));
  const Outcome others = outcome(tail, q_rest, e);
  const float slope_rest =
      sum_rest > 0 ? others.difference / float(sum_rest) : 0.0f * float(sum_rest);
  const float ce_scale = s.ce * p.grad_scale, kl_scale = s.kl * p.inverse_tau * p.grad_scale;
#pragma unroll 1
  for (int64_t c = first; c < p.C && grad != nullptr; c += step) {
    float x[kLanes], target[kLanes] = {};
    s.student(c, x);
    if (with_ce) s.target(c, target);
    Vector<Float, kLanes> slopes;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      float slope = 0.0f;
      if (with_kl && seen[c + i] == 0) {
        slope = expf((x[i] - top_rest) * p.inverse_tau) * slope_rest * kl_scale;
      }
      if (with_ce) slope += ce_slope(task, expf(x[i] - top), target[i]) * ce_scale;
      slopes.lane[i] = from_float<Float>(slope);
    }
    *reinterpret_cast<Vector<Float, kLanes>*>(grad + c) = slopes;
  }
  __syncthreads();  // the slopes of listed classes are written again
  double kl = threadIdx.x == 0 ? double(others.term) : 0.0;
  for (int64_t j = threadIdx.x; j < p.J && with_kl; j += blockDim.x) {
    s.teacher(j, one);
    s.student(id[j], other);
    const float z = other[0] - top, z_t = one[0] - top_t;
    const Outcome at =
        outcome(expf(z_t * p.inverse_tau) * inverse_p, expf(z * p.inverse_tau) * inverse_q,
                (z_t - z) * p.inverse_tau - shift);
    kl += double(at.term);
    if (grad == nullptr) continue;
    float slope = at.difference * kl_scale, target[1];
    if (with_ce) {
      s.target(id[j], target);
      slope += ce_slope(task, expf(z), target[0]) * ce_scale;
    }
    grad[id[j]] = from_float<Float>(slope);
  }
  return with_kl ? kl : 0.0;
}

template <typename Float, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    distill_loss_kernel(const DistillDeviceParams p) {
  GOSE_SHARED(double, part, kMostWarps);
  const Block block = {part};
  const Sample<Float> s(p.in, blockIdx.x);
  Float* grad = p.in.grad == nullptr ? nullptr : static_cast<Float*>(p.in.grad) + s.n * p.in.C;
  float ce = 0.0f;
  double kl = 0;
  if (p.in.id == nullptr) {
    kl = row_of_all<Float, kLanes>(s, block, grad, &ce);
  } else {
    kl = row_of_listed<Float, kLanes>(s, block, p.seen + s.n * p.in.C, grad, &ce);
  }
  kl = block.sum(kl);
  if (threadIdx.x != 0) return;
  float term = s.ce != 0.0f ? s.ce * ce : 0.0f;
  if (s.kl != 0.0f) term += s.kl * float(kl);
  p.in.term[s.n] = term;
}

// One block: the mean of the terms.
__global__ void __launch_bounds__(kThreads) distill_mean_kernel(const DistillDeviceParams p) {
  GOSE_SHARED(double, part, kMostWarps);
  double total = 0;
  for (int64_t n = threadIdx.x; n < p.in.B; n += kThreads) total += double(p.in.term[n]);
  total = Block{part}.sum(total);
  if (threadIdx.x == 0) p.loss[0] = float(total / double(max(p.in.B, int64_t(1))));
}

bool aligned(const void* base, DType dtype, int64_t stride, int64_t C) {
  switch (dtype) {
    case DType::kFloat32: return fits_vectors<float>(base, stride, C);
    case DType::kBFloat16: return fits_vectors<__nv_bfloat16>(base, stride, C);
    case DType::kFloat16: return fits_vectors<__half>(base, stride, C);
    case DType::kFloat64:
    case DType::kInt32: return false;
  }
  return false;
}

template <typename Float, int kLanes>
cudaError_t launch_rows(const DistillDeviceParams& p, cudaStream_t stream) {
  int threads = kWarp;
  while (threads < kThreads && int64_t(threads) * kLanes < p.in.C) threads *= 2;
  return launch(&distill_loss_kernel<Float, kLanes>, p.in.B, 1, dim3(threads), stream, p);
}

template <typename Float>
cudaError_t distill_as(const DistillDeviceParams& p, cudaStream_t stream) {
  const DistillParams& in = p.in;
  constexpr int kWide = kWidest<Float>;
  const bool wide =
      in.C % kWide == 0 && aligned(in.student, in.dtype, in.stride_sb, in.C) &&
      (in.id != nullptr || aligned(in.teacher, in.teacher_dtype, in.stride_tb, in.C)) &&
      (in.soft == nullptr || aligned(in.soft, in.soft_dtype, in.stride_lb, in.C)) &&
      (in.grad == nullptr || aligned(in.grad, in.dtype, in.C, in.C));
  return wide ? launch_rows<Float, kWide>(p, stream) : launch_rows<Float, 1>(p, stream);
}

bool is_readable(DType dtype) { return dtype != DType::kFloat64 && dtype != DType::kInt32; }

}  // namespace

cudaError_t distill_loss(const DistillDeviceParams& p, cudaStream_t stream) {
  const DistillParams& in = p.in;
  if (!is_readable(in.teacher_dtype) || !is_readable(in.soft_dtype)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (in.B > 0) {
    switch (in.dtype) {
      case DType::kFloat32: error = distill_as<float>(p, stream); break;
      case DType::kBFloat16: error = distill_as<__nv_bfloat16>(p, stream); break;
      case DType::kFloat16: error = distill_as<__half>(p, stream); break;
      case DType::kFloat64:
      case DType::kInt32: return cudaErrorInvalidValue;
    }
  }
  if (error != cudaSuccess || p.loss == nullptr) return error;
  return launch(&distill_mean_kernel, 1, 1, dim3(kThreads), stream, p);
}

}  // namespace gose::cuda
