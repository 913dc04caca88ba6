// route and its backward for policies softmax and egs without capacity, noise or adaptive k.
//
// One pass over the scores: a token's row is widened into scratch once, its moments give weights,
// entropy and losses together. Tokens go in blocks of kRouteBlock; what is summed over tokens is
// summed per block, then over blocks in order, so no number depends on the threads.
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

int64_t padded(int64_t E) { return (E + 15) / 16 * 16; }

// One block's part of the scratch.
struct Block {
  float* logit;       // [E padded] a of the token at hand, -infinity in the padding
  float* key;         // [E padded]
  float* power;       // [E padded] exp(a - max)
  float* importance;  // [E padded] sums over the block, or of the gradient of entropy_E
  int32_t* load;      // [E padded]
  int32_t* live;      // [E padded] 1 = available to a token of the block
  double* sums;       // tokens, z, entropy
};

Block block_of(const RouteScratch& s, int64_t block, int64_t E) {
  const int64_t width = padded(E);
  float* rows = s.floats + block * 4 * width;
  int32_t* counts = s.ints + block * 2 * width;
  return {rows,   rows + width,   rows + 2 * width,     rows + 3 * width,
          counts, counts + width, s.doubles + block * 3};
}

// max(entropy, 0), NaN stays.
inline vf clamped(vf H) { return select(H < 0.f, splat(0.f), H); }

// a and key of one token.
template <class Float>
void widen(const RouteInput& p, int64_t t, const Block& b) {
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  if (p.entropy == nullptr) {
    for_row(score, p.E, -kInfinity, [&](int64_t e, vf x) {
      store(b.logit + e, x);
      store(b.key + e, select(x != x, splat(-kInfinity), x));
    });
    return;
  }
  const float* entropy = p.entropy + t * p.stride_et;
  for_row(score, p.E, -kInfinity, [&](int64_t e, vf x) {
    const vf given = e + kLanes <= p.E ? load(entropy + e) : load_some(entropy + e, p.E - e, 0.f);
    const vf H = clamped(given);
    const vf a = p.tau > 0.f ? -H / p.tau : -log(H + p.floor);
    const vi gone = x == -kInfinity;
    store(b.logit + e, select(gone, splat(-kInfinity), a));
    store(b.key + e, select(gone | (H != H), splat(-kInfinity), -H));
  });
}

// Ids of the K largest keys, ties to the smaller id, E where none is left. Lane l leads the
// elements l, l + kLanes, ...: taking one rescans its lane alone. Destroys the keys.
void choose(float* key, int64_t E, int64_t K, int32_t* expert) {
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

// 1 / what the weights are normalized by: all experts or the chosen ones.
float inverse_normalizer(const Moments& m, bool chosen, const float* power, const int32_t* expert,
                         int64_t K, int64_t E) {
  if (!chosen) return m.inverse_total();
  float total = 0.f;
  for (int64_t k = 0; k < K; ++k) total += expert[k] < E ? power[expert[k]] : 0.f;
  return total > 0.f ? 1.f / total : 0.f;  // no expert at all: the weights are 0 anyway
}

template <class Float>
void route_block(const RouteParams& p, int64_t block) {
  const RouteInput& in = p.in;
  const Block b = block_of(p.scratch, block, in.E);
  const int64_t width = padded(in.E);
  for (int64_t e = 0; e < width; ++e) {
    b.importance[e] = 0.f;
    b.logit[e] = b.key[e] = -kInfinity;
    b.load[e] = b.live[e] = 0;
  }
  double tokens = 0, z_loss = 0, entropy_sum = 0;
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  for (int64_t t = block * kRouteBlock; t < stop; ++t) {
    widen<Float>(in, t, b);
    const Moments m = moments(b.logit, in.E, b.power);
    int32_t* expert = p.expert + t * in.K;
    float* weight = p.weight + t * in.K;
    choose(b.key, in.E, in.K, expert);
    const float inverse = inverse_normalizer(m, in.chosen, b.power, expert, in.K, in.E);
    for (int64_t k = 0; k < in.K; ++k) {
      const bool used = expert[k] < in.E;
      weight[k] = used ? b.power[expert[k]] * inverse : 0.f;
      if (used) ++b.load[expert[k]];
    }
    p.entropy[t] = m.entropy();
    if (m.n == 0) continue;
    const float inverse_total = m.inverse_total();
    for (int64_t e = 0; e < in.E; e += kLanes) {  // the scratch is padded: whole vectors
      store(b.importance + e, load(b.importance + e) + load(b.power + e) * inverse_total);
      vi live;
      std::memcpy(&live, b.live + e, sizeof live);
      live |= load(b.logit + e) != -kInfinity;
      std::memcpy(b.live + e, &live, sizeof live);
    }
    tokens += 1;
    entropy_sum += double(p.entropy[t]);
    if (in.entropy == nullptr) z_loss += double(m.log_total()) * double(m.log_total());
  }
  b.sums[0] = tokens;
  b.sums[1] = z_loss;
  b.sums[2] = entropy_sum;
}

struct Variation {
  double mean, cv2;  // squared coefficient of variation of importance over the live experts
};

Variation variation(const float* importance, const int32_t* live, int64_t E, double count) {
  double total = 0, apart = 0;
  for (int64_t e = 0; e < E; ++e) total += double(importance[e]);
  const double mean = total / count;
  for (int64_t e = 0; e < E; ++e) {
    const double d = double(importance[e]) - mean;
    if (live[e] != 0) apart += d * d;
  }
  return {mean, mean == 0 ? 0 : apart / count / (mean * mean)};
}

double at_least_1(double x) { return x < 1 ? 1 : x; }

void finish(const RouteParams& p, int64_t blocks) {
  const int64_t E = p.in.E;
  double tokens = 0, z_loss = 0, entropy_sum = 0, assigned = 0, shared = 0, experts = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const double* sums = p.scratch.doubles + i * 3;
    tokens += sums[0], z_loss += sums[1], entropy_sum += sums[2];
  }
  int32_t* live = p.scratch.ints + padded(E);  // block 0's, or zeros without a token
  for (int64_t e = 0; e < E; ++e) {
    double importance = 0;
    int32_t load = 0, any = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const Block b = block_of(p.scratch, i, E);
      importance += double(b.importance[e]);
      load += b.load[e];
      any |= b.live[e];
    }
    p.importance[e] = float(importance);
    p.load[e] = load;
    live[e] = any;
    experts += any != 0;
    assigned += load;
    shared += double(load) * importance;
  }
  tokens = at_least_1(tokens);
  experts = at_least_1(experts);
  p.loss[0] = float(experts * (shared / at_least_1(assigned)) / tokens);
  p.loss[1] = float(variation(p.importance, live, E, experts).cv2);
  p.loss[2] = 0.f;  // noisy_load: not for these calls
  p.loss[3] = float(z_loss / tokens);
  p.loss[4] = float(entropy_sum / tokens);
}

// ---- backward ----

// Tokens and experts that are not all -infinity; a row of -infinity is read to its end, any other
// only until its experts are known to be live.
template <class Float>
double count_live(const RouteInput& in, int32_t* live) {
  double tokens = 0;
  int64_t unknown = in.E;
  for (int64_t t = 0; t < in.T; ++t) {
    const Float* score = static_cast<const Float*>(in.score) + t * in.stride_st;
    bool any = false;
    for (int64_t e = 0; e < in.E && (!any || unknown > 0); ++e) {
      if (to_float(score[e]) == -kInfinity) continue;
      any = true;
      if (live[e] == 0) live[e] = 1, --unknown;
    }
    tokens += any;
  }
  return tokens;
}

// What all tokens share: the gradient of importance, and of the losses that are means over tokens.
struct Shared {
  float* column;  // [E padded]
  float z, entropy;
};

template <class Float>
Shared share(const RouteBackwardParams& p) {
  const int64_t E = p.in.E;
  const Block first = block_of(p.scratch, 0, E);
  Shared shared = {p.scratch.column, 0.f, 0.f};
  for (int64_t e = 0; e < padded(E); ++e) {
    shared.column[e] = e < E && p.grad_importance != nullptr ? p.grad_importance[e] : 0.f;
  }
  if (p.grad_loss == nullptr) return shared;
  const double tokens = at_least_1(count_live<Float>(p.in, first.live));
  double experts = 0, assigned = 0;
  for (int64_t e = 0; e < E; ++e) experts += first.live[e], assigned += p.load[e];
  experts = at_least_1(experts);
  const Variation v = variation(p.importance, first.live, E, experts);
  const double balance = double(p.grad_loss[0]) * experts / at_least_1(assigned) / tokens;
  for (int64_t e = 0; e < E; ++e) {
    double slope = 0;
    if (v.mean != 0 && first.live[e] != 0) {
      slope = 2 * ((double(p.importance[e]) - v.mean) / v.mean - v.cv2) / (experts * v.mean);
    }
    shared.column[e] += float(balance * p.load[e] + double(p.grad_loss[1]) * slope);
  }
  if (p.in.entropy == nullptr) shared.z = float(2 * double(p.grad_loss[3]) / tokens);
  shared.entropy = float(double(p.grad_loss[4]) / tokens);
  return shared;
}

// Gradient of a for one token into b.key; scratch rows are padded, so whole vectors.
void logit_gradient(const RouteBackwardParams& p, const Shared& shared, int64_t t, const Block& b) {
  const RouteInput& in = p.in;
  const Moments m = moments(b.logit, in.E, b.power);
  const int32_t* expert = p.expert + t * in.K;
  const float inverse = inverse_normalizer(m, in.chosen, b.power, expert, in.K, in.E);
  float slots = 0.f;  // sum of grad * weight over the slots
  for (int64_t k = 0; k < in.K && p.grad_weight != nullptr; ++k) {
    if (expert[k] < in.E) slots += p.grad_weight[t * in.K + k] * b.power[expert[k]] * inverse;
  }
  const float inverse_total = m.inverse_total(), mean_z = m.mean_z(), log_n = m.log_n();
  const float row = (p.grad_entropy != nullptr ? p.grad_entropy[t] : 0.f) + shared.entropy;
  const float entropy = log_n > 0.f ? row / log_n : 0.f;
  vf dots = {};
  for (int64_t e = 0; e < in.E; e += kLanes) dots += load(b.power + e) * load(shared.column + e);
  const float common =
      shared.z * m.log_total() - sum(dots) * inverse_total - (in.chosen ? 0.f : slots);
  for (int64_t e = 0; e < in.E; e += kLanes) {
    const vf a = load(b.logit + e);
    const vf slope = load(shared.column + e) - entropy * (a - m.shift - mean_z) + common;
    const vf grad = load(b.power + e) * inverse_total * slope;
    store(b.key + e, select(a == -kInfinity, splat(0.f), grad));
  }
  for (int64_t k = 0; k < in.K && p.grad_weight != nullptr; ++k) {
    if (expert[k] == in.E) continue;
    const float weight = b.power[expert[k]] * inverse;
    b.key[expert[k]] += weight * (p.grad_weight[t * in.K + k] - (in.chosen ? slots : 0.f));
  }
}

template <class Float>
void route_backward_block(const RouteBackwardParams& p, const Shared& shared, int64_t block) {
  const RouteInput& in = p.in;
  const Block b = block_of(p.scratch, block, in.E);
  for (int64_t e = 0; e < padded(in.E); ++e) {
    b.importance[e] = 0.f;
    b.logit[e] = -kInfinity;
    b.power[e] = b.key[e] = 0.f;
  }
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  for (int64_t t = block * kRouteBlock; t < stop; ++t) {
    widen<Float>(in, t, b);
    logit_gradient(p, shared, t, b);
    if (in.entropy == nullptr) {
      Float* grad = static_cast<Float*>(p.grad) + t * in.E;
      for_row(b.key, in.E, 0.f, [&](int64_t e, vf g) { store_row(grad, in.E, e, g); });
      continue;
    }
    float* grad = static_cast<float*>(p.grad) + t * in.E;
    for_row(in.entropy + t * in.stride_et, in.E, 0.f, [&](int64_t e, vf given) {
      const vf slope = in.tau > 0.f ? splat(-1.f / in.tau) : -1.f / (clamped(given) + in.floor);
      const vf g = select(given < 0.f, splat(0.f), load(b.key + e) * slope);
      if (in.stride_et == 0) {
        store(b.importance + e, load(b.importance + e) + g);
      } else {
        store_row(grad, in.E, e, g);
      }
    });
  }
}

template <class Float>
void route_backward_tokens(const RouteBackwardParams& p, const Parallel& threads) {
  const int64_t blocks = (p.in.T + kRouteBlock - 1) / kRouteBlock;
  const Shared shared = share<Float>(p);
  parallel_for(threads, blocks, grain_of(kRouteBlock * p.in.E * 4),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) route_backward_block<Float>(p, shared, i);
               });
  if (p.in.entropy == nullptr || p.in.stride_et != 0) return;
  for (int64_t e = 0; e < p.in.E; ++e) {
    double total = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      total += double(block_of(p.scratch, i, p.in.E).importance[e]);
    }
    static_cast<float*>(p.grad)[e] = float(total);
  }
}

}  // namespace

void route(const RouteParams& p, const Parallel& threads) {
  const int64_t blocks = (p.in.T + kRouteBlock - 1) / kRouteBlock;
  parallel_for(threads, blocks, grain_of(kRouteBlock * p.in.E * 4),
               [&p](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   switch (p.in.dtype) {
                     case DType::kFloat32: route_block<float>(p, block); break;
                     case DType::kBFloat16: route_block<bf16>(p, block); break;
                     case DType::kFloat16: route_block<fp16>(p, block); break;
                     case DType::kFloat64:
                     case DType::kInt32: break;  // refused by the binding
                   }
                 }
               });
  finish(p, blocks);
}

void route_backward(const RouteBackwardParams& p, const Parallel& threads) {
  switch (p.in.dtype) {
    case DType::kFloat32: return route_backward_tokens<float>(p, threads);
    case DType::kBFloat16: return route_backward_tokens<bf16>(p, threads);
    case DType::kFloat16: return route_backward_tokens<fp16>(p, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
