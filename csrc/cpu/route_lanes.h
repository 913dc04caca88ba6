// Softmax top-k of kLanes tokens at once, a token a lane: no reduction crosses lanes, one log
// serves all tokens, and the K best are kept by insertion without a branch.
#pragma once

#include "route_token.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr int64_t kLanesMaxE = 256;  // bounds the stack: 2 * 16 KB with 16 lanes
constexpr int64_t kLanesMaxK = 8;    // insertion costs E * K: more is cheaper a token at a time

inline bool lanes_take(const RouteInput& p) {
  return p.policy == RoutePolicy::kSoftmax && p.noise == nullptr && p.noise_std == 0.f &&
         p.adaptive == RouteAdaptive::kNone && !(p.capacity > 0 && p.priority) &&
         p.E <= kLanesMaxE && p.K <= kLanesMaxK;
}

// Lanes of two vectors: from[l] < kLanes is a's, else b's.
inline vf lanes_of(vf a, vf b, vi from) {
#if defined(__clang__)
  vf y;
  for (int i = 0; i < kLanes; ++i) y[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return y;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Swaps rows and lanes of a square of vectors.
inline void transpose(vf* rows) {
  const vi ids = lane_ids();
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const vi upper = (ids & half) != 0;
    const vi from_low = upper ? (ids ^ half) + kLanes : ids;
    const vi from_high = upper ? ids + kLanes : ids ^ half;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & half) != 0) continue;
      const vf a = rows[i], b = rows[i + half];
      rows[i] = lanes_of(a, b, from_low);
      rows[i + half] = lanes_of(a, b, from_high);
    }
  }
}

// The K largest so far of every lane, best first; experts come by ascending id, so ties keep order.
template <int K>
struct Best {
  vf value[K];
  vi id[K];

  void insert(vf x, vi e) {
    vi above[K];  // above[k] implies above[k + 1]; never for -infinity and NaN
    for (int k = 0; k < K; ++k) above[k] = x > value[k];
    for (int k = K - 1; k > 0; --k) {
      value[k] = above[k] ? (above[k - 1] ? value[k - 1] : x) : value[k];
      id[k] = above[k] ? (above[k - 1] ? id[k - 1] : e) : id[k];
    }
    value[0] = above[0] ? x : value[0];
    id[0] = above[0] ? e : id[0];
  }
};

// Moments of kLanes rows; see Moments.
struct LaneMoments {
  vf shift, rest, sum_z, n;

  vf inverse_total() const { return 1.f / (1.f + rest); }
  vf log_total() const { return shift + log_rest(); }
  vf log_rest() const { return log1p(rest); }
  vf entropy() const {
    const vf nats = log_rest() - sum_z / (1.f + rest);
    const vf several = select(n > 1.f, log(n), splat(1.f));
    vf share = select(n > 1.f, nats / several, nats * 0.f);
    share = select(share < 0.f, splat(0.f), share);
    return select(share > 1.f, splat(1.f), share);
  }
};

struct LaneSums {
  vf importance[kLanesMaxE];  // of every expert, over the groups of tokens
  bool all_live;              // no score was -infinity so far
};

// Scores of tokens [t, t + kLanes) into x[e].
template <class Float>
void load_lanes(const RouteInput& p, int64_t t, vf* x) {
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  for (int64_t e = 0; e < p.E; e += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const Float* row = score + i * p.stride_st + e;
      x[e + i] = e + kLanes <= p.E ? load(row) : load_some(row, p.E - e, -kInfinity);
    }
    transpose(x + e);
  }
}

// e^z for z in [-87, 0], see exp: without the ranges beyond.
inline vf exp_below(vf z) {
  const vf magic = splat(12582912.f);
  const vf shifted = z * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  vf y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  // y is in (0.7, 1.42) and n at least -126: the result is normal, or a hair's breadth below.
  return select(z < -86.6f, splat(0.f), (vf)((vi)y + ((vi)shifted << 23)));
}

// exp(x - max) over x, added up in four parts: a long sum rounds less, and waits less.
inline LaneMoments lane_moments(vf* x, int64_t E, vf top, vf n) {
  constexpr int kParts = 4;
  LaneMoments m = {select(top == -kInfinity, splat(0.f), top), {}, {}, n};
  vf tops = {}, rest[kParts] = {}, sum_z[kParts] = {};
  for (int64_t e = 0; e < E; e += kParts) {  // x is padded with -infinity
    for (int i = 0; i < kParts; ++i) {
      const vf below = x[e + i] - m.shift;
      const vf z = select(below < -87.f, splat(-87.f), below);  // power is 0; NaN stays
      const vf power = exp_below(z);
      const vi is_top = z == 0.f;
      tops += select(is_top, splat(1.f), splat(0.f));
      rest[i] += select(is_top, splat(0.f), power);
      sum_z[i] += power * z;
      x[e + i] = power;
    }
  }
  m.rest = (rest[0] + rest[1]) + (rest[2] + rest[3]);
  m.sum_z = (sum_z[0] + sum_z[1]) + (sum_z[2] + sum_z[3]);
  m.rest += select((n == 0.f) | (top == -kInfinity), splat(0.f), tops - 1.f);
  m.rest += m.sum_z * 0.f;  // NaN and infinity show in sum_z, whatever exp_below made of them
  return m;
}

template <int K>
void write_lanes(const RouteParams& p, int64_t t, const Best<K>& best, const LaneMoments& m,
                 int32_t* load) {
  const int32_t none = int32_t(p.in.E);
  vf weight[K];
  vf total = {};
  for (int k = 0; k < int(p.in.K); ++k) {
    weight[k] = exp(best.value[k] - m.shift);  // 0 in an unused slot
    total += weight[k];
  }
  const vf inverse = p.in.sum == RouteSum::kExperts ? m.inverse_total()
                                                    : select(total > 0.f, 1.f / total, splat(0.f));
  for (int k = 0; k < int(p.in.K); ++k) {
    const vf w = select((vi)(best.id[k] == none), splat(0.f), weight[k] * inverse);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t n = (t + i) * p.in.K + k;
      const int32_t e = best.id[k][i];
      p.weight[n] = w[i];
      p.expert[n] = e;
      if (e != none) ++load[e];
    }
  }
}

// Tokens [t, t + kLanes).
template <class Float, int K>
void route_lanes(const RouteParams& p, int64_t t, const Block& b, LaneSums& sums) {
  const int64_t E = p.in.E;
  vf x[kLanesMaxE];
  load_lanes<Float>(p.in, t, x);
  Best<K> best;
  for (int k = 0; k < K; ++k) best.value[k] = splat(-kInfinity), best.id[k] = vi{} + int32_t(E);
  vf n = {};
  for (int64_t e = 0; e < E; ++e) {
    best.insert(x[e], vi{} + int32_t(e));
    n += select(x[e] == -kInfinity, splat(0.f), splat(1.f));
  }
  bool all_live = true;
  for (int i = 0; i < kLanes; ++i) all_live &= n[i] == float(E);
  for (int64_t e = 0; e < E && !all_live; ++e) {
    for (int i = 0; i < kLanes; ++i) b.live[e] |= x[e][i] != -kInfinity;
  }
  if (all_live) sums.all_live = true;
  const LaneMoments m = lane_moments(x, E, best.value[0], n);
  const vf inverse = select(n == 0.f, splat(0.f), m.inverse_total());
  for (int64_t e = 0; e < E; ++e) sums.importance[e] += x[e] * inverse;
  write_lanes(p, t, best, m, b.load);
  const vf entropy = m.entropy(), z = m.log_total();
  store(p.entropy + t, entropy);
  for (int i = 0; i < kLanes; ++i) {
    if (n[i] == 0.f) continue;
    b.sums[0] += 1;
    b.sums[1] += double(z[i]) * double(z[i]);
    b.sums[2] += double(entropy[i]);
  }
}

// Tokens from t on, by whole groups. Returns the first token that is left.
template <class Float, int K>
int64_t route_groups(const RouteParams& p, int64_t t, int64_t stop, const Block& b) {
  LaneSums sums;
  const int64_t E = p.in.E, width = padded(E);
  for (int64_t e = 0; e < width; ++e) sums.importance[e] = vf{};
  sums.all_live = false;
  for (; t + kLanes <= stop; t += kLanes) route_lanes<Float, K>(p, t, b, sums);
  for (int64_t e = 0; e < width; e += kLanes) {
    transpose(sums.importance + e);
    vf total = {};
    for (int i = 0; i < kLanes; ++i) total += sums.importance[e + i];
    store(b.importance + e, load(b.importance + e) + total);
  }
  for (int64_t e = 0; e < E && sums.all_live; ++e) b.live[e] = 1;
  return t;
}

template <class Float>
int64_t route_by_lanes(const RouteParams& p, int64_t t, int64_t stop, const Block& b) {
  if (t + kLanes > stop || !lanes_take(p.in)) return t;
  if (p.in.K <= 2) return route_groups<Float, 2>(p, t, stop, b);
  if (p.in.K <= 4) return route_groups<Float, 4>(p, t, stop, b);
  return route_groups<Float, 8>(p, t, stop, b);
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
