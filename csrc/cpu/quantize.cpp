// quantize, dequantize, dequantize_add_: one pass over the elements, a block at a time in L1.
//
// Compiled without contraction (setup.py): the bytes are part of the contract.
#include "draws.h"
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

typedef int8_t vc __attribute__((vector_size(kLanes)));

constexpr int kMaxBlock = 256;

// The live elements of a tensor in order, as runs.
struct Walk {
  const uint8_t* frozen;
  int64_t P, inner, at;

  // Moves to the next live run; its length, at most `limit`. at < P must have a live element.
  int64_t run(int64_t limit) {
    if (frozen == nullptr) return limit < P - at ? limit : P - at;
    while (frozen[at / inner]) at = (at / inner + 1) * inner;
    int64_t end = at;
    while (end < P && end - at < limit && !frozen[end / inner]) end = (end / inner + 1) * inner;
    return end - at < limit ? end - at : limit;
  }
};

// The smallest scale with qmax * scale >= absmax: products of 24 and 7 bits are exact in float64.
inline float scale_of(float absmax, const CodeFormat& format, void* scale, int64_t block) {
  const double qmax = double((1 << (format.bits - 1)) - 1);
  const float near = float(double(absmax) / qmax);
  float out;
  if (format.half_scale) {
    fp16 half;
    from_float(near, &half);
    half.bits += double(to_float(half)) * qmax < double(absmax);
    out = to_float(half);
    if (out > format.max_scale) from_float(format.max_scale, &half);
    out = to_float(half);
    static_cast<fp16*>(scale)[block] = half;
  } else {
    out = float_of(bits_of(near) + (double(near) * qmax < double(absmax)));
    if (out > format.max_scale) out = format.max_scale;
    static_cast<float*>(scale)[block] = out;
  }
  return out;
}

inline float scale_at(const CodeFormat& format, const void* scale, int64_t block) {
  return format.half_scale ? to_float(static_cast<const fp16*>(scale)[block])
                           : static_cast<const float*>(scale)[block];
}

// x clamped to +-limit; NaN stays.
inline vf clamp(vf x, float limit) {
  x = select(x > limit, splat(limit), x);
  return select(x < -limit, splat(-limit), x);
}

// To the nearest integer, ties to even, for |x| < 2^22; the result is never -0.
inline vf nearest(vf x) { return (x + 12582912.f) - 12582912.f; }

// One block in `y`, padded with zeros: codes to q, what they leave to y if that is wanted.
// saturated: the scale is smaller than the block needs, and codes must be cut.
template <bool kStochastic>
inline void code_block(float scale, float qmax, bool saturated, bool wants_left, int64_t count,
                       const float* u, int8_t* q, float* y) {
  if (scale == 0.f) {
    std::memset(q, 0, count);
    return;
  }
  for (int64_t n = 0; n < count; n += kLanes) {
    const vf value = load(y + n);
    vf ratio = value / scale, code;
    // One more than qmax still rounds to what is clamped, and keeps `nearest` in its range.
    if (saturated) ratio = clamp(ratio, qmax + 1.f);
    if (kStochastic) {
      const vf sum = ratio + load(u + n);
      code = nearest(sum);
      code = code - select(code > sum, splat(1.f), splat(0.f));
    } else {
      code = (vf)((vu)nearest(ratio) | ((vu)ratio & 0x80000000u));  // -0 shows in the residual
    }
    if (saturated) code = clamp(code, qmax);
    if (wants_left) store(y + n, value - code * scale);
    const vc bytes = __builtin_convertvector(__builtin_convertvector(code, vi), vc);
    std::memcpy(q + n, &bytes, sizeof bytes);
  }
}

constexpr int64_t kAhead = 1024;  // elements by which loads are ahead: hardware stops at a page

template <class Float>
void quantize_units(const QuantizeParams& p, int64_t begin, int64_t end) {
  const Float* x = static_cast<const Float*>(p.x);
  const int64_t block = p.format.block;
  const float qmax = float((1 << (p.format.bits - 1)) - 1);
  Draws draws = {};
  draws.key = philox_key(p.seed, p.step);
  draws.first = -1;
  float y[kMaxBlock], u[kMaxBlock] = {};
  int8_t q[kMaxBlock];
  int64_t place[kMaxBlock + 1], length[kMaxBlock];  // the runs of a block
  const bool by_element = p.frozen != nullptr && p.inner == 1;
  if (by_element) {
    for (int64_t n = 0; n < kMaxBlock; ++n) length[n] = 1;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    p.bad[unit] = {-1, 0.f};
    Walk walk = {p.frozen, p.P, p.inner, p.start != nullptr ? p.start[unit] : unit * kCodeUnit};
    const int64_t stop = (unit + 1) * kCodeUnit < p.L ? (unit + 1) * kCodeUnit : p.L;
    int64_t index = unit * (kCodeUnit / block);  // of the block
    for (int64_t l = unit * kCodeUnit; l < stop; l += block, ++index) {
      const int64_t count = stop - l < block ? stop - l : block;
      if (by_element) {
        for (int64_t n = 0; n < count; ++walk.at) {  // without a branch on the mask
          place[n] = walk.at;
          n += p.frozen[walk.at] == 0;
        }
        for (int64_t n = 0; n < count; ++n) {
          const float value = to_float(x[place[n]]);
          y[n] = p.residual == nullptr ? value : value + p.residual[place[n]];
          if (p.stochastic) draws.to(place[n], 1, u + n);
        }
      }
      int runs = 0;
      for (int64_t n = by_element ? count : 0; n < count; ++runs) {
        const int64_t size = walk.run(count - n);
        place[runs] = walk.at;
        length[runs] = size;
        const Float* from = x + walk.at;
        const float* residual = p.residual == nullptr ? nullptr : p.residual + walk.at;
        if (walk.at + kAhead + size <= p.P) {
          for (int64_t at = kAhead; at < kAhead + size; at += 64 / int64_t(sizeof(Float))) {
            __builtin_prefetch(from + at);
          }
          if (residual != nullptr) {
            for (int64_t at = kAhead; at < kAhead + size; at += 16)
              __builtin_prefetch(residual + at);
          }
        }
        int64_t j = 0;
        for (; j + kLanes <= size; j += kLanes) {
          const vf value = load(from + j);
          store(y + n + j, residual == nullptr ? value : value + load(residual + j));
        }
        for (; j < size; ++j) {
          const float value = to_float(from[j]);
          y[n + j] = residual == nullptr ? value : value + residual[j];
        }
        if (p.stochastic) draws.to(walk.at, size, u + n);
        walk.at += size;
        n += size;
      }
      for (int64_t n = count; n < block; ++n) y[n] = u[n] = 0.f;
      // Bits of |y| have its order, and those of infinity and NaN are above all. y is padded to a
      // whole block, which is a multiple of four vectors.
      vi highest[4] = {};
      for (int64_t n = 0; n < block; n += 4 * kLanes) {
        for (int v = 0; v < 4; ++v) {
          highest[v] = max((vi)load(y + n + v * kLanes) & 0x7fffffff, highest[v]);
        }
      }
      const int32_t top =
          highest_lane(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
      if (top >= 0x7f800000) {
        if (p.bad[unit].element >= 0) continue;
        int64_t n = 0;
        while ((bits_of(y[n]) & 0x7fffffffu) < 0x7f800000u) ++n;
        p.bad[unit].value = y[n];
        int run = 0;
        while (n >= length[run]) n -= length[run++];
        p.bad[unit].element = place[run] + n;
        continue;
      }
      const float absmax = float_of(uint32_t(top));
      const float scale = scale_of(absmax, p.format, p.scale, index);
      const bool saturated = double(scale) * double(qmax) < double(absmax);
      (p.stochastic ? code_block<true> : code_block<false>)(scale, qmax, saturated,
                                                            p.left != nullptr, count, u, q, y);
      if (p.format.bits == 8) {
        std::memcpy(p.code + l, q, count);
      } else {
        if (count % 2 == 1) q[count] = 0;
        for (int64_t n = 0; n < (count + 1) / 2; ++n) {
          p.code[l / 2 + n] = uint8_t((q[2 * n] & 15) | (q[2 * n + 1] << 4));
        }
      }
      if (p.left == nullptr) continue;
      if (by_element) {
        for (int64_t n = 0; n < count; ++n) p.left[place[n]] = y[n];
        continue;
      }
      for (int64_t n = 0, run = 0; n < count; n += length[run++]) {
        std::memcpy(p.left + place[run], y + n, length[run] * sizeof(float));
      }
    }
  }
}

// Codes as floats.
inline void decode(const DequantizeParams& p, int64_t l, int64_t count, float* value) {
  if (p.format.bits == 8) {
    const int8_t* code = reinterpret_cast<const int8_t*>(p.code) + l;
    for (int64_t n = 0; n < count; ++n) value[n] = float(code[n]);
    return;
  }
  for (int64_t n = 0; n < count; n += 2) {
    const int32_t byte = p.code[(l + n) / 2];
    value[n] = float(((byte & 15) ^ 8) - 8);
    value[n + 1] = float(((byte >> 4) ^ 8) - 8);
  }
}

void dequantize_units(const DequantizeParams& p, int64_t begin, int64_t end) {
  const int64_t block = p.format.block;
  float value[kMaxBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    Walk walk = {p.frozen, p.P, p.inner, p.start != nullptr ? p.start[unit] : unit * kCodeUnit};
    const int64_t stop = (unit + 1) * kCodeUnit < p.L ? (unit + 1) * kCodeUnit : p.L;
    int64_t index = unit * (kCodeUnit / block);  // of the block
    for (int64_t l = unit * kCodeUnit; l < stop; l += block, ++index) {
      const int64_t count = stop - l < block ? stop - l : block;
      const float scale = scale_at(p.format, p.scale, index);
      decode(p, l, count, value);
      if (p.frozen != nullptr && p.inner == 1) {
        int64_t place[kMaxBlock + 1];
        for (int64_t n = 0; n < count; ++walk.at) {
          place[n] = walk.at;
          n += p.frozen[walk.at] == 0;
        }
        for (int64_t n = 0; n < count; ++n) {
          float& out = p.out[place[n]];
          out = p.add ? out + value[n] * scale * p.weight : value[n] * scale;
        }
        continue;
      }
      for (int64_t n = 0; n < count;) {
        const int64_t size = walk.run(count - n);
        float* out = p.out + walk.at;
        const float* from = value + n;
        if (p.add) {
          const float weight = p.weight;
          if (walk.at + kAhead + size <= p.P) {
            for (int64_t j = kAhead; j < kAhead + size; j += 16) __builtin_prefetch(out + j, 1);
          }
          for (int64_t j = 0; j < size; ++j) out[j] = out[j] + from[j] * scale * weight;
        } else {
          for (int64_t j = 0; j < size; ++j) out[j] = from[j] * scale;
        }
        walk.at += size;
        n += size;
      }
    }
  }
}

inline int64_t units_of(int64_t L) { return (L + kCodeUnit - 1) / kCodeUnit; }

constexpr int64_t kGroup = 256;  // mask values that are counted together

}  // namespace

void find_live(const LiveParams& p, const Parallel&) {
  int64_t live = 0, rows = p.inner == 0 ? 0 : p.P / p.inner;
  for (int64_t j = 0; j < rows; ++j) {
    if (p.inner == 1 && j + kGroup <= rows) {  // skip what holds no start of a unit
      int32_t count = 0;
      for (int64_t k = 0; k < kGroup; ++k) count += p.frozen[j + k] == 0;
      if (units_of(live) * kCodeUnit >= live + count) {
        live += count;
        j += kGroup - 1;
        continue;
      }
    }
    if (p.frozen[j]) continue;
    if (p.start != nullptr) {
      for (int64_t u = units_of(live); u * kCodeUnit < live + p.inner; ++u) {
        p.start[u] = j * p.inner + (u * kCodeUnit - live);
      }
    }
    live += p.inner;
  }
  *p.num_live = live;
}

void quantize(const QuantizeParams& p, const Parallel& threads) {
  parallel_for(threads, units_of(p.L), 4, [&p](int64_t begin, int64_t end) {
    switch (p.dtype) {
      case DType::kFloat32: return quantize_units<float>(p, begin, end);
      case DType::kBFloat16: return quantize_units<bf16>(p, begin, end);
      case DType::kFloat16: return quantize_units<fp16>(p, begin, end);
      case DType::kFloat64:
      case DType::kInt32: return;  // refused by the binding
    }
  });
}

void dequantize(const DequantizeParams& p, const Parallel& threads) {
  parallel_for(threads, units_of(p.L), 4,
               [&p](int64_t begin, int64_t end) { dequantize_units(p, begin, end); });
}

}  // namespace gose::cpu::GOSE_LEVEL
