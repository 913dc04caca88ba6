// route: one pass over the scores. A token's row is widened into scratch once, its moments give
// weights, entropy and losses together. Tokens go in blocks of kRouteBlock; what is summed over
// tokens is summed per block, then over blocks in order, so no number depends on the threads.
// Capacity and expert_choice need all tokens: passes of their own, in route_all.h.
#include "route_all.h"
#include "route_lanes.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// logsumexp of the scores, 0 without any.
template <class Float>
float log_total(const RouteInput& p, const Moments& m, int64_t t) {
  if (!p.sigmoid) return m.log_total();
  const Float* score = static_cast<const Float*>(p.score) + t * p.stride_st;
  return moments(score, p.E, nullptr).log_total();
}

// Sums over the tokens of a block.
template <class Float>
void add_statistics(const RouteParams& p, const Block& b, const Moments& m, int64_t t) {
  const RouteInput& in = p.in;
  p.entropy[t] = m.entropy();
  if (m.n == 0) return;
  const float inverse_total = m.inverse_total();
  for (int64_t e = 0; e < in.E; e += kLanes) {  // the scratch is padded: whole vectors
    store(b.importance + e, load(b.importance + e) + load(b.power + e) * inverse_total);
    vi live;
    std::memcpy(&live, b.live + e, sizeof live);
    live |= load(b.logit + e) != -kInfinity;
    std::memcpy(b.live + e, &live, sizeof live);
  }
  b.sums[0] += 1;
  if (in.entropy == nullptr) {
    const double z = double(log_total<Float>(in, m, t));
    b.sums[1] += z * z;
  }
  b.sums[2] += double(p.entropy[t]);
}

// Weights of the chosen experts of token t.
void write_slots(const RouteParams& p, const Block& b, const Moments& noisy, int64_t t) {
  const int32_t* expert = p.expert + t * p.in.K;
  slot_weights(p.in, b, noisy, expert);
  for (int64_t k = 0; k < p.in.K; ++k) p.weight[t * p.in.K + k] = b.slot[k];
}

// expert_choice, before the experts choose.
void write_log_p(const RouteParams& p, const Block& b, const Moments& m, int64_t t) {
  float* log_p = p.scratch.log_p + t * padded(p.in.E);
  const float total = m.log_total();
  for (int64_t e = 0; e < p.in.E; e += kLanes) {
    const vf a = load(b.logit + e);
    const vf x = a - total;
    store(log_p + e, select((a == -kInfinity) | (x != x), splat(-kInfinity), x));
  }
}

// log p of the first slot, noise included.
float priority_of(const RouteInput& in, const Block& b, const Moments& noisy, int32_t first) {
  if (first == in.E) return -kInfinity;
  return (in.noise != nullptr ? b.noisy : b.logit)[first] - noisy.log_total();
}

template <class Float>
void route_block(const RouteParams& p, int64_t block) {
  const RouteInput& in = p.in;
  const Block b = block_of(p.scratch, block, in.E);
  clear(b, in.E);
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  int64_t t = route_by_lanes<Float>(p, block * kRouteBlock, stop, b);
  for (; t < stop; ++t) {
    widen<Float>(in, t, b);
    const Moments m = moments(b.logit, in.E, b.power);
    add_statistics<Float>(p, b, m, t);
    if (in.policy == RoutePolicy::kExpertChoice) {
      write_log_p(p, b, m, t);
      continue;
    }
    const Moments noisy = noisy_moments(in, b, m);
    int32_t* expert = p.expert + t * in.K;
    const int32_t last = choose_experts(in, b, m, expert);
    write_slots(p, b, noisy, t);
    for (int64_t k = 0; k < in.K; ++k) {
      if (expert[k] < in.E) ++b.load[expert[k]];
    }
    if (in.noise_std > 0.f && m.n > 0) add_wins(in, b, last);
    if (in.capacity > 0 && in.priority) {
      p.scratch.log_p[t] = priority_of(in, b, noisy, expert[0]);
    }
  }
}

// expert_choice: the K likeliest of the experts that took the token.
template <class Float>
void choose_among_takers(const RouteParams& p, int64_t block) {
  const RouteInput& in = p.in;
  const Block b = block_of(p.scratch, block, in.E);
  const int64_t stop = in.T < (block + 1) * kRouteBlock ? in.T : (block + 1) * kRouteBlock;
  for (int64_t t = block * kRouteBlock; t < stop; ++t) {
    widen<Float>(in, t, b);
    const float* log_p = p.scratch.log_p + t * padded(in.E);
    for (int64_t e = 0; e < in.E; ++e) b.key[e] = log_p[e] == -kInfinity ? -kInfinity : b.key[e];
    choose(b.key, in.E, in.K, p.expert + t * in.K);
    write_slots(p, b, moments(b.logit, in.E, b.power), t);
  }
}

constexpr int64_t kFew = 16;  // experts whose sums stay in registers; divides every padded row

struct Few {
  double importance[kFew], win[kFew];
  int32_t load[kFew], live[kFew];
};

// Sums over all blocks of experts [e, e + kFew).
Few sum_blocks(const RouteParams& p, int64_t e, int64_t blocks) {
  Few few = {};
  for (int64_t i = 0; i < blocks; ++i) {
    const Block b = block_of(p.scratch, i, p.in.E);
    for (int64_t l = 0; l < kFew; ++l) {
      few.importance[l] += double(b.importance[e + l]);
      few.load[l] += b.load[e + l];
      few.live[l] |= b.live[e + l];
    }
    if (p.in.noise_std == 0.f) continue;
    for (int64_t l = 0; l < kFew; ++l) few.win[l] += double(b.win[e + l]);
  }
  return few;
}

void finish(const RouteParams& p, int64_t blocks) {
  const RouteInput& in = p.in;
  const bool takers = in.policy == RoutePolicy::kExpertChoice;
  double tokens = 0, z_loss = 0, entropy_sum = 0, assigned = 0, shared = 0, experts = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const double* sums = p.scratch.doubles + i * 3;
    tokens += sums[0], z_loss += sums[1], entropy_sum += sums[2];
  }
  tokens = at_least_1(tokens);
  int32_t* live = p.scratch.ints + padded(in.E);  // block 0's, or zeros without a token
  float* win = p.scratch.column;
  for (int64_t first = 0; first < in.E; first += kFew) {
    const Few few = sum_blocks(p, first, blocks);
    const int64_t count = in.E - first < kFew ? in.E - first : kFew;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t e = first + i;
      const int32_t load = few.load[i] + (takers && blocks > 0 ? p.load[e] : 0);
      p.importance[e] = float(few.importance[i]);
      p.load[e] = load;
      win[e] = float(few.win[i] / tokens);
      live[e] = few.live[i];
      experts += few.live[i] != 0;
      assigned += load;
      shared += double(load) * few.importance[i];
    }
  }
  experts = at_least_1(experts);
  p.loss[0] = float(experts * (shared / at_least_1(assigned)) / tokens);
  p.loss[1] = float(variation(p.importance, live, in.E, experts).cv2);
  p.loss[2] = in.noise_std > 0.f ? float(variation(win, live, in.E, experts).cv2) : 0.f;
  p.loss[3] = float(z_loss / tokens);
  p.loss[4] = float(entropy_sum / tokens);
}

template <class Float>
void route_tokens(const RouteParams& p, const Parallel& threads) {
  const int64_t blocks = blocks_of(p.in.T), grain = grain_of_blocks(p.in.E);
  const bool takers = p.in.policy == RoutePolicy::kExpertChoice;
  parallel_for(threads, blocks, grain, [&p](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) route_block<Float>(p, i);
  });
  if (takers && blocks > 0) {
    take_all(p, threads);
    parallel_for(threads, blocks, grain, [&p](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) choose_among_takers<Float>(p, i);
    });
  }
  finish(p, blocks);
  if (p.in.capacity > 0 && !takers) drop(p);
}

}  // namespace

void route(const RouteParams& p, const Parallel& threads) {
  switch (p.in.dtype) {
    case DType::kFloat32: return route_tokens<float>(p, threads);
    case DType::kBFloat16: return route_tokens<bf16>(p, threads);
    case DType::kFloat16: return route_tokens<fp16>(p, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
