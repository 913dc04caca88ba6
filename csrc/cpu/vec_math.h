// exp, log and lane reductions on vectors, without libm: one polynomial for every level, so levels
// differ by rounding alone. Errors are below 1.5 ulp (tests/kernels/test_entropy.py sees them).
#pragma once

#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff();

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf max(vf a, vf b) { return select(a > b, a, b); }

// Inlined where GCC would call it: a call spills every vector register.
// e^x; 0 below -86.6 (the result would be under 2.5e-38), infinity above 88.72, NaN for NaN.
[[gnu::always_inline]] inline vf exp(vf x) {
  const vf inside = max(select(x > 88.72f, splat(88.72f), x), splat(-86.6f));
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = inside * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  vf y = splat(1.9875691500e-4f);                                  // Cephes expf on [-ln2/2, ln2/2]
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const vi exponent = (vi)shifted - (vi)magic + 126;  // of 2^(n - 1): n reaches 128
  y = y * (vf)(exponent << 23) * 2.f;
  y = select(x < -86.6f, splat(0.f), y);
  y = select(x > 88.72f, splat(kInfinity), y);
  return select(x != x, x, y);
}

// Natural logarithm; -infinity at 0, NaN below.
inline vf log(vf x) {
  const vi tiny = x < 1.17549435e-38f;  // subnormal: scaled into the normal range
  const vf scaled = select(tiny, x * 0x1p23f, x);
  const vi bits = (vi)scaled;
  // Mantissa in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), take the exponent of the
  // rest.
  const vi exponent = (bits - 0x3f3504f3) >> 23;
  const vf m = (vf)(bits - (exponent << 23)) - 1.f;
  const vf e = __builtin_convertvector(exponent, vf) - select(tiny, splat(23.f), splat(0.f));
  const vf z = m * m;
  vf y = splat(7.0376836292e-2f);  // Cephes logf
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
  vf out = (m + y) + e * 0.693359375f;
  out = select(x == 0.f, splat(-kInfinity), out);
  out = select(x < 0.f, splat(__builtin_nanf("")), out);
  return select((x == kInfinity) | (x != x), x, out);
}

inline float log(float x) { return log(splat(x))[0]; }

// log(1 + x) for x >= 0, precise where x is tiny: log(u) of the rounded u = 1 + x, and its
// rounding.
inline float log1p(float x) {
  const float u = 1.f + x;
  return u == kInfinity || u != u ? u : log(u) + (x - (u - 1.f)) / u;
}

// The lanes of x in the order of `from`.
template <class Vector>
inline Vector lanes(Vector x, vi from) {
#if defined(__clang__)
  Vector y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[from[i]];
  return y;
#else
  return __builtin_shuffle(x, from);
#endif
}

inline vi lane_ids() {
  vi ids;
  for (int i = 0; i < kLanes; ++i) ids[i] = i;
  return ids;
}

// The largest lane, NaN left aside.
inline float highest_lane(vf x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x = max(x, lanes(x, lane_ids() ^ half));
  return x[0];
}

inline int32_t lowest_lane(vi x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const vi other = lanes(x, lane_ids() ^ half);
    const vi less = other < x;
    x = (less & other) | (~less & x);
  }
  return x[0];
}

inline vi max(vi a, vi b) { return a > b ? a : b; }

inline int32_t highest_lane(vi x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x = max(x, lanes(x, lane_ids() ^ half));
  return x[0];
}

inline int32_t sum(vi x) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// The first `count` < kLanes elements, `fill` in the other lanes.
template <class Float>
inline vf load_some(const Float* p, int64_t count, float fill) {
  Float part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(Float));
  return select(lane_ids() < int32_t(count), load(part), splat(fill));
}

template <class Float>
inline void store_some(Float* p, int64_t count, vf x) {
  Float part[kLanes];
  store(part, x);
  std::memcpy(p, part, count * sizeof(Float));
}

#if defined(__AVX512F__)
// The masked instruction instead of a call of memcpy: rows are often shorter than a few vectors.
inline vf load_some(const float* p, int64_t count, float fill) {
  return (vf)_mm512_mask_loadu_ps((__m512)splat(fill), __mmask16((1u << count) - 1), p);
}
inline void store_some(float* p, int64_t count, vf x) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
}
#endif

// body(c, x) for the vectors of a row of C elements; lanes past the end hold `fill`.
template <class Float, class Body>
inline void for_row(const Float* row, int64_t C, float fill, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) body(c, load(row + c));
  if (c < C) body(c, load_some(row + c, C - c, fill));
}

template <class Float>
inline void store_row(Float* row, int64_t C, int64_t c, vf x) {
  if (c + kLanes <= C) {
    store(row + c, x);
  } else {
    store_some(row + c, C - c, x);
  }
}

// What softmax and entropy of a row need, with z = x - shift and shift the largest x (0 without
// one).
struct Moments {
  float shift;
  float rest;   // sum of exp(z) over all but one maximum: total - 1 without its cancellation
  float sum_z;  // sum of exp(z) * z, at most 0
  int32_t n;    // elements that are not -infinity

  float inverse_total() const { return 1.f / (1.f + rest); }
  float mean_z() const { return sum_z / (1.f + rest); }
  float log_n() const { return n > 1 ? log(float(n)) : 0.f; }
  float log_total() const { return shift + log1p(rest); }
  // In [0, 1]: 0 for one class, NaN where the row has NaN or +infinity.
  float entropy() const {
    const float nats = log1p(rest) - mean_z();
    const float share = n > 1 ? nats / log(float(n)) : 0.f * nats;
    return share < 0.f ? 0.f : share > 1.f ? 1.f : share;
  }
};

// Moments of a row; exp(z) goes to `power` (room for whole vectors) unless that is null.
template <class Float>
inline Moments moments(const Float* row, int64_t C, float* power) {
  vf highest = splat(-kInfinity);
  vi offered = {};
  for_row(row, C, -kInfinity, [&](int64_t, vf x) {
    highest = max(x, highest);  // false for NaN, which then shows in the sums
    offered -= x != -kInfinity;
  });
  const float top = highest_lane(highest);
  Moments m = {top == -kInfinity ? 0.f : top, 0.f, 0.f, sum(offered)};
  vf rest = {}, sum_z = {};
  vi tops = {};
  for_row(row, C, -kInfinity, [&](int64_t c, vf x) {
    const vf z = x - m.shift;
    const vf e = exp(z);
    const vi is_top = z == 0.f;
    tops -= is_top;
    rest += select(is_top, splat(0.f), e);
    sum_z += select(x == -kInfinity, splat(0.f), e * z);
    if (power != nullptr) store(power + c, e);
  });
  m.rest = sum(rest) + float(m.n == 0 || top == -kInfinity ? 0 : sum(tops) - 1);
  m.sum_z = sum(sum_z);
  return m;
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
