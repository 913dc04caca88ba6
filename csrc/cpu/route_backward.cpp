// route_backward: closed forms, the choice held constant. The gradient of a first, then of what
// ranks the experts.
#include "route_token.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

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
  float* win;     // [E padded] of the sum over tokens of Phi(margin), policy softmax
  float z, entropy;
  bool noisy;
};

template <class Float>
void win_block(const RouteInput& in, const RouteScratch& s, int64_t block) {
  const Block b = block_of(s, block, in.E);
  clear(b, in.E);
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  for (int64_t t = block * kRouteBlock; t < stop; ++t) {
    widen<Float>(in, t, b);
    choose(b.key, in.E, in.K, b.chosen);
    add_wins(in, b, b.chosen[in.K - 1]);
  }
}

template <class Float>
Shared share(const RouteBackwardParams& p, const Parallel& threads) {
  const RouteInput& in = p.in;
  const int64_t E = in.E, width = padded(E), blocks = blocks_of(in.T);
  Shared shared = {p.scratch.column, p.scratch.column + width, 0.f, 0.f, false};
  for (int64_t e = 0; e < width; ++e) {
    shared.column[e] = e < E && p.grad_importance != nullptr ? p.grad_importance[e] : 0.f;
    shared.win[e] = 0.f;
  }
  if (p.grad_loss == nullptr) return shared;
  shared.noisy = in.noise_std > 0.f && p.grad_loss[2] != 0.f && blocks > 0;
  if (shared.noisy) {
    parallel_for(threads, blocks, grain_of_blocks(E), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) win_block<Float>(in, p.scratch, i);
    });
  }
  int32_t* live = block_of(p.scratch, 0, E).live;  // zeros: of no block yet
  const double tokens = at_least_1(count_live<Float>(in, live));
  double experts = 0, assigned = 0;
  for (int64_t e = 0; e < E; ++e) experts += live[e], assigned += p.load[e];
  experts = at_least_1(experts);
  const Variation v = variation(p.importance, live, E, experts);
  const double balance = double(p.grad_loss[0]) * experts / at_least_1(assigned) / tokens;
  for (int64_t e = 0; e < E; ++e) {
    const double slope = slope_of(v, p.importance, live, e, experts);
    shared.column[e] += float(balance * p.load[e] + double(p.grad_loss[1]) * slope);
  }
  if (in.entropy == nullptr) shared.z = float(2 * double(p.grad_loss[3]) / tokens);
  shared.entropy = float(double(p.grad_loss[4]) / tokens);
  if (!shared.noisy) return shared;
  float* win = block_of(p.scratch, 0, E).importance;
  for (int64_t e = 0; e < E; ++e) {
    double wins = 0;
    for (int64_t i = 0; i < blocks; ++i) wins += double(block_of(p.scratch, i, E).win[e]);
    win[e] = float(wins / tokens);
  }
  const Variation w = variation(win, live, E, experts);
  const double scale = double(p.grad_loss[2]) / (tokens * double(in.noise_std));
  for (int64_t e = 0; e < E; ++e) shared.win[e] = float(scale * slope_of(w, win, live, e, experts));
  return shared;
}

// The choice that the weights were normalized over, if drops hide a part of it.
const int32_t* choice_of(const RouteBackwardParams& p, const Block& b, const Moments& m,
                         int64_t t) {
  const RouteInput& in = p.in;
  const bool drops = in.capacity > 0 && in.policy != RoutePolicy::kExpertChoice;
  if (!drops || in.sum != RouteSum::kChosen) return p.expert + t * in.K;
  choose_experts(in, b, m, b.chosen);
  return b.chosen;
}

// Adds the gradient through the weights to the row at b.key, which has none of it yet.
void add_weight_gradient(const RouteBackwardParams& p, int64_t t, const Block& b,
                         const Moments& noisy, const int32_t* choice) {
  const RouteInput& in = p.in;
  const int32_t none = int32_t(in.E);
  const float* grad = p.grad_weight + t * in.K;
  const int32_t* expert = p.expert + t * in.K;
  float slots = 0.f;  // sum of grad * weight over the slots
  for (int64_t k = 0; k < in.K; ++k) slots += expert[k] < none ? grad[k] * b.slot[k] : 0.f;
  const bool chosen = in.sum == RouteSum::kChosen;
  for (int64_t k = 0; k < in.K; ++k) {
    if (choice[k] == none) continue;
    const float used = expert[k] < none ? grad[k] : 0.f;
    b.key[choice[k]] += b.slot[k] * (used - (chosen ? slots : 0.f));
  }
  if (in.sum != RouteSum::kExperts) return;
  const float* power = in.noise != nullptr ? b.noisy_power : b.power;
  const float scale = slots * noisy.inverse_total();
  for (int64_t e = 0; e < in.E; e += kLanes) {
    store(b.key + e, load(b.key + e) - load(power + e) * scale);
  }
}

// Gradient of noisy_load by the scores, through the threshold too.
void add_noisy_load_gradient(const RouteBackwardParams& p, const Shared& shared, const Block& b,
                             int32_t last) {
  const Margins margins = margins_of(p.in, b, last);
  if (margins.all) return;
  vf through = {};
  for (int64_t e = 0; e < p.in.E; e += kLanes) {
    const vf margin = margins.of(load(b.logit + e));
    const vf density = exp(margin * margin * -0.5f) * 0.3989422804014327f;
    const vf grad = load(shared.win + e) * density;
    through += grad;
    store(b.key + e, load(b.key + e) + grad);
  }
  b.key[last] -= sum(through);
}

// Gradient of a for one token into b.key; scratch rows are padded, so whole vectors.
void logit_gradient(const RouteBackwardParams& p, const Shared& shared, int64_t t, const Block& b) {
  const RouteInput& in = p.in;
  const Moments m = moments(b.logit, in.E, b.power);
  const Moments noisy = noisy_moments(in, b, m);
  int32_t last = 0;
  if (shared.noisy) {  // policy softmax: the keys are needed once more
    choose(b.key, in.E, in.K, b.chosen);
    last = b.chosen[in.K - 1];
    for (int64_t e = 0; e < in.E; ++e) {
      const float key = in.noise != nullptr ? b.noisy[e] : b.logit[e];
      b.key[e] = b.logit[e] == -kInfinity || key != key ? -kInfinity : key;
    }
  }
  const int32_t* choice = choice_of(p, b, m, t);
  if (p.grad_weight != nullptr) slot_weights(in, b, noisy, choice);
  const float inverse_total = m.inverse_total(), mean_z = m.mean_z(), log_n = m.log_n();
  const float row = (p.grad_entropy != nullptr ? p.grad_entropy[t] : 0.f) + shared.entropy;
  const float entropy = log_n > 0.f ? row / log_n : 0.f;
  vf dots = {};
  for (int64_t e = 0; e < in.E; e += kLanes) dots += load(b.power + e) * load(shared.column + e);
  const float z = in.sigmoid ? 0.f : shared.z * m.log_total();
  const float common = z - sum(dots) * inverse_total;
  for (int64_t e = 0; e < in.E; e += kLanes) {
    const vf a = load(b.logit + e);
    const vf slope = load(shared.column + e) - entropy * (a - m.shift - mean_z) + common;
    const vf grad = load(b.power + e) * inverse_total * slope;
    store(b.key + e, select(a == -kInfinity, splat(0.f), grad));
  }
  if (p.grad_weight != nullptr) add_weight_gradient(p, t, b, noisy, choice);
  if (shared.noisy && m.n > 0) add_noisy_load_gradient(p, shared, b, last);
}

// From the gradient of a to that of the scores of token t.
template <class Float>
void write_score_gradient(const RouteBackwardParams& p, const Shared& shared, int64_t t,
                          const Block& b) {
  const RouteInput& in = p.in;
  Float* grad = static_cast<Float*>(p.grad) + t * in.E;
  if (!in.sigmoid) {
    for_row(b.key, in.E, 0.f, [&](int64_t e, vf g) { store_row(grad, in.E, e, g); });
    return;
  }
  const Float* score = static_cast<const Float*>(in.score) + t * in.stride_st;
  const Moments m = moments(score, in.E, b.noisy_power);
  const float z = shared.z * m.log_total() * m.inverse_total();
  for_row(score, in.E, -kInfinity, [&](int64_t e, vf x) {
    const vf tail = exp_minus_abs(x);
    const vf slope = select(x < 0.f, splat(1.f), tail) / (1.f + tail);  // sigmoid(-x)
    store_row(grad, in.E, e, load(b.key + e) * slope + load(b.noisy_power + e) * z);
  });
}

void write_entropy_gradient(const RouteBackwardParams& p, int64_t t, const Block& b) {
  const RouteInput& in = p.in;
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

template <class Float>
void route_backward_block(const RouteBackwardParams& p, const Shared& shared, int64_t block) {
  const RouteInput& in = p.in;
  const Block b = block_of(p.scratch, block, in.E);
  clear(b, in.E);
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  for (int64_t t = block * kRouteBlock; t < stop; ++t) {
    widen<Float>(in, t, b);
    logit_gradient(p, shared, t, b);
    if (in.entropy != nullptr) {
      write_entropy_gradient(p, t, b);
    } else {
      write_score_gradient<Float>(p, shared, t, b);
    }
  }
}

template <class Float>
void route_backward_tokens(const RouteBackwardParams& p, const Parallel& threads) {
  const int64_t blocks = blocks_of(p.in.T);
  const Shared shared = share<Float>(p, threads);
  parallel_for(threads, blocks, grain_of_blocks(p.in.E), [&](int64_t begin, int64_t end) {
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
