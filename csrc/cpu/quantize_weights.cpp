// quantize_weights: expert weights as panels of integers and scales (quantized.h).
//
// The lanes of a vector are columns, so every level finds the same bits.
#include "pack.h"
#include "quantized.h"
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

typedef int8_t vb __attribute__((vector_size(kLanes)));

inline vf magnitude(vf x) { return (vf)((vi)x & INT32_MAX); }
// To the nearest integer, ties to even, of |x| below 2^22.
inline vf nearest(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// No r below this: its inverse times any s must be a float.
constexpr float kSmallest = 0x1p-100f;

// The largest magnitude of a column, NaN or infinite where one of its weights is.
inline vf largest(const float* w, int64_t K) {
  vf most = {}, sum = {};
  for (int64_t k = 0; k < K; ++k) {
    const vf x = load(w + k * kPanel);
    most = max(most, magnitude(x));
    sum += x * 0.f;
  }
  return most + sum;
}

inline void store_r(vf r, Weights weights, int64_t K, int64_t column, char* panel) {
  store(reinterpret_cast<float*>(panel + offset_of_r(weights, K)) + column, r);
}

inline void quantize_int8(const float* w, vf most, int64_t K, int64_t column, char* panel) {
  const vf r = max(most / 127.f, splat(kSmallest));
  store_r(r, Weights::kInt8, K, column, panel);
  for (int64_t k = 0; k < K; ++k) {
    const vb q =
        __builtin_convertvector(__builtin_convertvector(nearest(load(w + k * kPanel) / r), vi), vb);
    std::memcpy(panel + k * kPanel + column, &q, sizeof q);
  }
}

// The level nearest to u; of two as near, the lower one. Its number goes to `q`.
inline vf nearest_level(vf u, vi* q) {
  vf level = splat(float(kLevels[0]));
  vi above = {};
#pragma GCC unroll 16
  for (int i = 1; i < 16; ++i) {
    const vi over = u > 0.5f * float(kLevels[i - 1] + kLevels[i]);
    level += (vf)(over & (vi)splat(float(kLevels[i] - kLevels[i - 1])));
    above -= over;
  }
  *q = above;
  return level;
}

inline vf value_of(vi code) {
  return (vf)((((code & 0x7f) + kScaleBias) << kScaleShift) | ((code & 0x80) << 24));
}

// The code of the s with the least squared error on a block, of weights divided by r.
inline vi best_code(const vf (&t)[kScaleSteps], vf largest_t) {
  const vi base = ((vi)(largest_t / kLargestLevel) >> kScaleShift) - kScaleBias;
  vi best = {};
  vf least_error = splat(kInfinity);
  // Larger than needed for the largest weight or smaller, down to where that is cut off; either
  // sign, for the levels reach farther below 0 than above.
  for (int32_t candidate = 0; candidate < 12; ++candidate) {
    vi code = base + (candidate / 2 - 2);
    code = code < 8 ? vi{} + 8 : code > 126 ? vi{} + 126 : code;
    code |= candidate % 2 == 0 ? 0 : 0x80;
    const vf s = value_of(code), inverse = 1.f / s;
    vf error = {};
    for (int64_t i = 0; i < kScaleSteps; ++i) {
      vi q;
      const vf miss = nearest_level(t[i] * inverse, &q) * s - t[i];
      error += miss * miss;
    }
    const vi better = error < least_error;
    best = better ? code : best;
    least_error = better ? error : least_error;
  }
  return best;
}

inline void quantize_int4(const float* w, vf most, int64_t K, int64_t column, char* panel) {
  // The s of the largest weight is about 2^8, of at most 448.
  const vf r = max(most / (256.f * kLargestLevel), splat(kSmallest));
  store_r(r, Weights::kInt4, K, column, panel);
  for (int64_t first = 0; first < K; first += kScaleSteps) {
    vf t[kScaleSteps], largest_t = {};
    for (int64_t i = 0; i < kScaleSteps; ++i) {
      t[i] = load(w + (first + i) * kPanel) / r;
      largest_t = max(largest_t, magnitude(t[i]));
    }
    const vi code = best_code(t, largest_t);
    const vb bytes = __builtin_convertvector(code, vb);
    std::memcpy(panel + offset_of_s(first) + column, &bytes, sizeof bytes);
    const vf inverse = 1.f / value_of(code);
    for (int64_t i = 0; i < kScaleSteps; i += kWordSteps) {
      vu word = {};
      for (int64_t j = 0; j < kWordSteps; ++j) {
        vi q;
        nearest_level(t[i + j] * inverse, &q);
        word |= (vu)q << shift_of(j);
      }
      std::memcpy(panel + offset_of_word(first + i) + 4 * column, &word, sizeof word);
    }
  }
}

// The float32 weights of a panel, [K][32]. False if one is not finite.
inline bool quantize_panel(const float* w, Weights weights, int64_t K, char* panel) {
  bool finite = true;
  for (int64_t column = 0; column < kPanel; column += kLanes) {
    const vf most = largest(w + column, K);
    for (int i = 0; i < kLanes; ++i) finite &= most[i] < kInfinity;
    if (weights == Weights::kInt8) {
      quantize_int8(w + column, most, K, column, panel);
    } else {
      quantize_int4(w + column, most, K, column, panel);
    }
  }
  return finite;
}

// Plain panels to float32, [K][32].
template <class Storage>
inline void to_floats(const Storage* from, int64_t K, float* to) {
  constexpr bool kPaired = sizeof(Storage) == 2 && requires { Storage::is_bf16; };
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t at = kPaired ? (k / 2 * kPanel + c) * 2 + k % 2 : k * kPanel + c;
      to[k * kPanel + c] = to_float(from[at]);
    }
  }
}

inline void to_floats(DType dtype, const char* from, int64_t K, float* to) {
  switch (dtype) {
    case DType::kFloat32: return to_floats(reinterpret_cast<const float*>(from), K, to);
    case DType::kBFloat16: return to_floats(reinterpret_cast<const bf16*>(from), K, to);
    case DType::kFloat16: return to_floats(reinterpret_cast<const fp16*>(from), K, to);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace

void quantize_weights(const QuantizeWeightsParams& p, const Parallel& threads) {
  const int64_t K = (p.pack.K + kAlignK - 1) / kAlignK * kAlignK, panels = panels_of(p.pack);
  const int64_t bytes = bytes_of_panel(p.weights, K, 0), items = p.pack.E * panels;
  const int64_t pieces = p.threads < items ? p.threads : items;
  int64_t next = 0;
  parallel_for(threads, pieces, 1, [&](int64_t thread, int64_t) {
    char* plain = p.scratch + thread * 8 * K * kPanel;
    float* w = reinterpret_cast<float*>(plain + 4 * K * kPanel);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      const int64_t e = item / panels, panel = item % panels;
      pack_run(p.pack, e, panel, 1, plain);
      to_floats(p.pack.dtype, plain, K, w);
      char* to = p.pack.packed + e * p.pack.stride_packed + panel * bytes;
      if (!quantize_panel(w, p.weights, K, to)) {
        __atomic_store_n(p.infinite + e, uint8_t(1), __ATOMIC_RELAXED);
      }
    }
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
