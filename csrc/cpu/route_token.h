// One token of route: its logits and keys in scratch rows, the choice, the weights. Forward and
// backward share it. Legend and formulas: gose_kernels/ops/route.py.
#pragma once

#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

inline int64_t padded(int64_t E) { return (E + 15) / 16 * 16; }
inline int64_t blocks_of(int64_t T) { return (T + kRouteBlock - 1) / kRouteBlock; }

// Blocks that are worth a thread: about 5 us at 10 ns a token and 0.9 ns a score.
inline int64_t grain_of_blocks(int64_t E) { return 1 + 86 / (E + 11); }

// One block's part of the scratch. Every row is padded to whole vectors.
struct Block {
  float* logit;        // a of the token at hand, -infinity in the padding
  float* key;          // likewise
  float* power;        // exp(a - max)
  float* importance;   // sums over the block, or of the gradient of entropy_E
  float* noisy;        // score + noise, -infinity in the padding
  float* noisy_power;  // exp(noisy - max)
  float* win;          // noisy_load: sums over the block
  float* slot;         // weights of the chosen before any drop; scores of the groups
  int32_t* load;
  int32_t* live;    // 1 = available to a token of the block
  int32_t* chosen;  // ids: groups, or experts before any drop
  double* sums;     // tokens, z, entropy
};

inline Block block_of(const RouteScratch& s, int64_t block, int64_t E) {
  const int64_t width = padded(E);
  float* rows = s.floats + block * kRouteRows * width;
  int32_t* counts = s.ints + block * kRouteCounts * width;
  return {rows,
          rows + width,
          rows + 2 * width,
          rows + 3 * width,
          rows + 4 * width,
          rows + 5 * width,
          rows + 6 * width,
          rows + 7 * width,
          counts,
          counts + width,
          counts + 2 * width,
          s.doubles + block * 3};
}

inline void clear(const Block& b, int64_t E) {
  for (int64_t e = 0; e < padded(E); ++e) {
    b.logit[e] = b.key[e] = b.noisy[e] = -kInfinity;
    b.importance[e] = b.win[e] = b.power[e] = b.noisy_power[e] = 0.f;
    b.load[e] = b.live[e] = 0;
  }
}

// max(entropy, 0), NaN stays.
inline vf clamped(vf H) { return select(H < 0.f, splat(0.f), H); }

inline vf load_part(const float* row, int64_t E, int64_t e) {
  return e + kLanes <= E ? load(row + e) : load_some(row + e, E - e, 0.f);
}

// exp(-|x|): what sigmoid and its logarithm are made of, without overflow.
inline vf exp_minus_abs(vf x) { return exp(select(x > 0.f, -x, x)); }

// log(1 + x) for x in [0, 1]: see log1p(float).
inline vf log1p(vf x) {
  const vf u = 1.f + x;
  return log(u) + (x - (u - 1.f)) / u;
}

// a and key of one token of egs.
template <class Float>
void widen_egs(const RouteInput& p, int64_t t, const Block& b) {
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  const float* entropy = p.entropy + t * p.stride_et;
  for_row(score, p.E, -kInfinity, [&](int64_t e, vf x) {
    const vf H = clamped(load_part(entropy, p.E, e));
    const vf a = p.tau > 0.f ? -H / p.tau : -log(H + p.floor);
    const vi gone = x == -kInfinity;
    store(b.logit + e, select(gone, splat(-kInfinity), a));
    store(b.key + e, select(gone | (H != H), splat(-kInfinity), -H));
  });
}

template <class Float>
void widen_sigmoid(const RouteInput& p, int64_t t, const Block& b) {
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  const bool by_sigmoid = p.bias != nullptr || p.policy == RoutePolicy::kGroupLimited;
  for_row(score, p.E, -kInfinity, [&](int64_t e, vf x) {
    const vi gone = x == -kInfinity;
    const vf tail = exp_minus_abs(x);
    const vf a = select(x > 0.f, splat(0.f), x) - log1p(tail);
    vf key = x;
    if (by_sigmoid) {
      key = select(x < 0.f, tail, splat(1.f)) / (1.f + tail);
      if (p.bias != nullptr) key += load_part(p.bias, p.E, e);
    }
    store(b.logit + e, select(gone, splat(-kInfinity), a));
    store(b.key + e, select(gone | (x != x) | (key != key), splat(-kInfinity), key));
  });
}

// a, a + noise and key of one token.
template <class Float>
void widen(const RouteInput& p, int64_t t, const Block& b) {
  if (p.entropy != nullptr) return widen_egs<Float>(p, t, b);
  if (p.sigmoid) return widen_sigmoid<Float>(p, t, b);
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  const float* noise = p.noise != nullptr ? p.noise + t * p.stride_nt : nullptr;
  for_row(score, p.E, -kInfinity, [&](int64_t e, vf x) {
    store(b.logit + e, x);
    vf key = x;
    if (noise != nullptr) {
      key = x + load_part(noise, p.E, e);
      store(b.noisy + e, key);
    }
    store(b.key + e, select((x == -kInfinity) | (key != key), splat(-kInfinity), key));
  });
}

// Ids of the K largest keys, ties to the smaller id, E where none is left. Lane l leads the
// elements l, l + kLanes, ...: taking one rescans its lane alone. Destroys the keys.
inline void choose(float* key, int64_t E, int64_t K, int32_t* expert) {
  const vi ids = lane_ids();
  const vi none = vi{} + int32_t(E);
  vf value = splat(-kInfinity);
  vi place = none, here = ids;
  for (int64_t e = 0; e < E; e += kLanes, here += kLanes) {
    const vf x = load(key + e);
    const vi better = x > value;
    value = select(better, x, value);
    place = (better & here) | (~better & place);
  }
  for (int64_t k = 0; k < K; ++k) {
    const vi leads = value == highest_lane(value);
    const int32_t taken = lowest_lane((leads & place) | (~leads & none));
    expert[k] = taken;
    if (taken == E) continue;
    key[taken] = -kInfinity;
    float best = -kInfinity;
    int32_t at = int32_t(E);
    const int32_t lane = taken % kLanes;
    for (int64_t e = lane; e < E; e += kLanes) {
      const bool better = key[e] > best;
      at = better ? int32_t(e) : at;
      best = better ? key[e] : best;
    }
    const vi changed = ids == lane;
    value = select(changed, splat(best), value);
    place = (changed & (vi{} + at)) | (~changed & place);
  }
}

// Leaves the keys of the best groups, -infinity in the others.
inline void limit_groups(const RouteInput& p, const Block& b) {
  const int64_t size = p.E / p.num_groups;
  for (int64_t g = 0; g < padded(p.num_groups); ++g) b.slot[g] = -kInfinity;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    float best = -kInfinity, next = -kInfinity;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const float key = b.key[e];
      next = key > best ? best : key > next ? key : next;
      best = key > best ? key : best;
    }
    b.slot[g] = p.sigmoid && next != -kInfinity ? best + next : best;
  }
  choose(b.slot, p.num_groups, p.top_groups, b.chosen);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    bool kept = false;
    for (int64_t i = 0; i < p.top_groups; ++i) kept |= b.chosen[i] == g;
    for (int64_t e = g * size; e < (g + 1) * size && !kept; ++e) b.key[e] = -kInfinity;
  }
}

// The experts of a widened token before any capacity drop. Returns the K-th before adaptive k.
inline int32_t choose_experts(const RouteInput& p, const Block& b, const Moments& m,
                              int32_t* expert) {
  const int32_t none = int32_t(p.E);
  if (p.policy == RoutePolicy::kGroupLimited) limit_groups(p, b);
  choose(b.key, p.E, p.K, expert);
  const int32_t last = expert[p.K - 1];
  if (p.adaptive == RouteAdaptive::kMass) {
    const float inverse = m.inverse_total();
    float before = 0.f;
    for (int64_t k = 0; k < p.K; ++k) {
      const float here = expert[k] < none ? b.power[expert[k]] * inverse : 0.f;
      if (before >= p.mass) expert[k] = none;
      before += here;
    }
  } else if (p.adaptive == RouteAdaptive::kBands) {
    const float entropy = m.entropy();
    int64_t keep = 1;
    for (int64_t i = 0; i < p.num_bands; ++i) keep += entropy > float(p.bands[i]);
    for (int64_t k = keep; k < p.K; ++k) expert[k] = none;
  }
  return last;
}

// Weights of the chosen into b.slot, before any drop; `noisy` are the moments of a + noise.
inline void slot_weights(const RouteInput& p, const Block& b, const Moments& noisy,
                         const int32_t* expert) {
  const int32_t none = int32_t(p.E);
  const bool chosen = p.sum == RouteSum::kChosen;
  // Where the likeliest expert need not be chosen, the powers of all chosen ones may be 0.
  const bool own = p.sigmoid || (chosen && p.policy == RoutePolicy::kExpertChoice);
  const float* power = p.noise != nullptr ? b.noisy_power : b.power;
  if (own) {
    float top = -kInfinity;
    for (int64_t k = 0; k < p.K; ++k) {
      b.slot[k] = expert[k] < none ? b.logit[expert[k]] : -kInfinity;
      top = b.slot[k] > top ? b.slot[k] : top;
    }
    for (int64_t k = p.K; k < padded(p.K); ++k) b.slot[k] = -kInfinity;
    const float shift = chosen && top != -kInfinity ? top : 0.f;
    for (int64_t k = 0; k < p.K; k += kLanes) store(b.slot + k, exp(load(b.slot + k) - shift));
  } else {
    for (int64_t k = 0; k < p.K; ++k) b.slot[k] = expert[k] < none ? power[expert[k]] : 0.f;
  }
  if (p.sum == RouteSum::kNothing) return;
  float inverse = noisy.inverse_total();
  if (chosen) {
    float total = 0.f;
    for (int64_t k = 0; k < p.K; ++k) total += b.slot[k];
    inverse = total > 0.f ? 1.f / total : 0.f;  // no expert at all: the weights are 0 anyway
  }
  for (int64_t k = 0; k < p.K; ++k) b.slot[k] *= inverse;
}

inline Moments noisy_moments(const RouteInput& p, const Block& b, const Moments& m) {
  return p.noise != nullptr ? moments(b.noisy, p.E, b.noisy_power) : m;
}

// (score - threshold) / noise_std of some experts; infinity where all of them win.
struct Margins {
  float threshold, inverse_std;
  bool all;

  vf of(vf a) const {
    const vf margin = all ? splat(kInfinity) : (a - threshold) * inverse_std;
    return select(a == -kInfinity, splat(-kInfinity), margin);
  }
};

inline Margins margins_of(const RouteInput& p, const Block& b, int32_t last) {
  const float* noisy = p.noise != nullptr ? b.noisy : b.logit;
  const bool all = last == int32_t(p.E);
  return {all ? 0.f : noisy[last], 1.f / p.noise_std, all};
}

// Probability that a standard normal number is below x, to 1.2e-7 of itself on the lower side
// [Numerical Recipes, erfcc].
inline vf normal_below(vf x) {
  const vf z = select(x < 0.f, -x, x) * 0.70710678118654752f;
  const vf t = 1.f / (1.f + 0.5f * z);
  vf y = t * 0.17087277f - 0.82215223f;
  y = y * t + 1.48851587f;
  y = y * t - 1.13520398f;
  y = y * t + 0.27886807f;
  y = y * t - 0.18628806f;
  y = y * t + 0.09678418f;
  y = y * t + 0.37409196f;
  y = y * t + 1.00002368f;
  y = y * t - 1.26551223f;
  const vf tail = 0.5f * t * exp(y - z * z);
  return select(x < 0.f, tail, 1.f - tail);
}

inline void add_wins(const RouteInput& p, const Block& b, int32_t last) {
  const Margins margins = margins_of(p, b, last);
  for (int64_t e = 0; e < p.E; e += kLanes) {
    store(b.win + e, load(b.win + e) + normal_below(margins.of(load(b.logit + e))));
  }
}

struct Variation {
  double mean, cv2;  // squared coefficient of variation of numbers of the live experts
};

inline Variation variation(const float* x, const int32_t* live, int64_t E, double count) {
  double total[4] = {}, apart[4] = {};  // four sums: an addition waits for the one before it
  for (int64_t e = 0; e < E; ++e) total[e & 3] += double(x[e]);
  const double mean = ((total[0] + total[1]) + (total[2] + total[3])) / count;
  for (int64_t e = 0; e < E; ++e) {
    const double d = double(x[e]) - mean;
    apart[e & 3] += live[e] != 0 ? d * d : 0;
  }
  const double square = ((apart[0] + apart[1]) + (apart[2] + apart[3])) / count;
  return {mean, mean == 0 ? 0 : square / (mean * mean)};
}

inline double at_least_1(double x) { return x < 1 ? 1 : x; }

// Derivative of cv2 by x[e].
inline double slope_of(const Variation& v, const float* x, const int32_t* live, int64_t e,
                       double count) {
  if (v.mean == 0 || live[e] == 0) return 0;
  return 2 * ((double(x[e]) - v.mean) / v.mean - v.cv2) / (count * v.mean);
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
