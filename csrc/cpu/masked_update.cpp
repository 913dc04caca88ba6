// masked_sgd_, masked_adam_, masked_lion_, masked_square_sum: one pass over the tensors of a list.
// Runs of frozen units and vectors of frozen elements are skipped without loading them; in mixed
// vectors frozen lanes are selected, so they keep their bits.
//
// Compiled without contraction (setup.py): the same bits at every level.
#include "draws.h"
#include "vec_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

extern "C" double pow(double, double) noexcept;

namespace gose::cpu::GOSE_LEVEL {
namespace {

typedef uint8_t vb __attribute__((vector_size(kLanes)));

inline vf sqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// A bit per lane that is set, the first one lowest.
inline uint32_t lane_bits(vi x) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(x[i] != 0) << i;
  return bits;
#endif
}

// What a step count does to adam's step; the other rules have no counts.
struct Bias {
  vf rate, grow;  // lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step): a division less by element
};

template <int kMoments>  // 1 with momentum, 0 without
struct Sgd {
  static constexpr int kStates = kMoments;
  MaskedSgdParams p;

  Bias bias(float) const { return Bias(); }
  void operator()(const Bias&, vf g, vf& param, vf* state) const {
    g = g * p.scale;
    if (p.weight_decay != 0.f) g = g + p.weight_decay * param;
    if constexpr (kMoments == 1) {
      state[0] = p.momentum * state[0] + p.undamped * g;
      g = p.nesterov ? g + p.momentum * state[0] : state[0];
    }
    param = param - p.lr * g;
  }
};

template <int kMoments>  // 3 with amsgrad, 2 without
struct Adam {
  static constexpr int kStates = kMoments;
  MaskedAdamParams p;
  float rest1, beta2, rest2;

  explicit Adam(const MaskedAdamParams& given)
      : p(given), rest1(float(1 - p.beta1)), beta2(float(p.beta2)), rest2(float(1 - p.beta2)) {}

  // In float64: 1 - beta2^step cancels three digits at the first step.
  Bias bias(float step) const {
    const double left1 = 1 - pow(p.beta1, double(step)), left2 = 1 - pow(p.beta2, double(step));
    return {splat(float(p.lr / left1)), splat(float(1 / __builtin_sqrt(left2)))};
  }
  void operator()(const Bias& b, vf g, vf& param, vf* state) const {
    g = g * p.scale;
    if (p.weight_decay != 0.f) g = g + p.weight_decay * param;
    const vf apart = g - state[0];
    // As torch's lerp: exact at both ends.
    state[0] = rest1 < 0.5f ? state[0] + rest1 * apart : g + (rest1 - 1.f) * apart;
    state[1] = state[1] * beta2 + rest2 * g * g;
    vf highest = state[1];
    if constexpr (kMoments == 3) {
      const vf old = state[2];
      highest = state[2] = select((old > highest) | (old != old), old, highest);
    }
    param = param * p.keep - b.rate * (state[0] / (sqrt(highest) * b.grow + p.eps));
  }
};

struct Lion {
  static constexpr int kStates = 1;
  MaskedLionParams p;

  Bias bias(float) const { return Bias(); }
  void operator()(const Bias&, vf g, vf& param, vf* state) const {
    g = g * p.scale;
    const vf mixed = p.beta1 * state[0] + p.rest1 * g;
    const vf sign = select(mixed > 0.f, splat(1.f), select(mixed < 0.f, splat(-1.f), splat(0.f)));
    param = param * p.keep - p.lr * sign;
    state[0] = p.beta2 * state[0] + p.rest2 * g;
  }
};

// The bias of a count, kept for the few counts that a tensor's elements have: pow is slow.
template <class Rule>
class Biases {
 public:
  explicit Biases(const Rule& rule) : rule_(rule) {}

  const Bias& of(float step) {
    const uint32_t slot = bits_of(step) * 2654435761u >> 28;
    if (!used_[slot] || bits_of(step_[slot]) != bits_of(step)) {
      used_[slot] = true;
      step_[slot] = step;
      bias_[slot] = rule_.bias(step);
    }
    return bias_[slot];
  }

  // Of one vector of counts, in the lanes of `live`.
  Bias of(vf step, vi live) {
    Bias out = {};
    while (const uint32_t left = lane_bits(live)) {
      const float value = step[__builtin_ctz(left)];
      const vi same = ((vi)step == (vi)splat(value)) & live;
      const Bias& bias = of(value);
      out.rate = select(same, bias.rate, out.rate);
      out.grow = select(same, bias.grow, out.grow);
      live &= ~same;
    }
    return out;
  }

 private:
  const Rule& rule_;
  bool used_[16] = {};
  float step_[16];
  Bias bias_[16];
};

// Where vectors are read and written: elements of the tensors, or of a padded copy.
template <class Float>
struct Place {
  Float* param;
  const Float* grad;
  float* master;
  float* state[3];
};

// float32 values as their upper halves: to nearest, or with u given up with the probability of what
// is cut off.
inline vh halves(vf x, const float* u) {
  if (u == nullptr) return bf16_bits(x);
  const vu lane = (vu) __builtin_convertvector(load(u) * 65536.f - 0.5f, vi);
  const vi is_nan = x != x;
  const vu kept = ((vu)is_nan & ((vu)x | 0x400000u)) | (~(vu)is_nan & ((vu)x + lane));
  return __builtin_convertvector(kept >> 16, vh);
}

inline void store_live(float* p, vi kept, vf old, vf x, const float*) {
  store(p, select(kept, old, x));
}
inline void store_live(bf16* p, vi kept, vf, vf x, const float* u) {
  vh before;
  std::memcpy(&before, p, sizeof before);
  const vh stay = __builtin_convertvector((vu)kept >> 16, vh);
  const vh after = (before & stay) | (halves(x, u) & ~stay);
  std::memcpy(p, &after, sizeof after);
}

// One vector at element i, its states at s. Lanes in `kept` keep their bits.
template <class Float, class Rule>
inline void update_vector(const Rule& rule, const Place<Float>& to, int64_t i, int64_t s,
                          const Bias& bias, vi kept, const float* u) {
  const vf old = to.master != nullptr ? load(to.master + s) : load(to.param + i);
  vf param = old, state[3], old_state[3];
  for (int n = 0; n < Rule::kStates; ++n) state[n] = old_state[n] = load(to.state[n] + s);
  rule(bias, load(to.grad + i), param, state);
  if (to.master != nullptr) store(to.master + s, select(kept, old, param));
  store_live(to.param + i, kept, old, param, u);
  for (int n = 0; n < Rule::kStates; ++n) {
    store(to.state[n] + s, select(kept, old_state[n], state[n]));
  }
}

// The first `count` < kLanes lanes of a vector: on a padded copy.
template <class Float, class Rule>
void update_some(const Rule& rule, const Place<Float>& to, int64_t i, int64_t s, int64_t count,
                 const Bias& bias, vi kept, const float* u) {
  Float param[kLanes] = {}, grad[kLanes] = {};
  float master[kLanes] = {}, state[3][kLanes] = {};
  std::memcpy(param, to.param + i, count * sizeof(Float));
  std::memcpy(grad, to.grad + i, count * sizeof(Float));
  if (to.master != nullptr) std::memcpy(master, to.master + s, count * 4);
  for (int n = 0; n < Rule::kStates; ++n) std::memcpy(state[n], to.state[n] + s, count * 4);
  const Place<Float> copy = {
      param, grad, to.master == nullptr ? nullptr : master, {state[0], state[1], state[2]}};
  update_vector(rule, copy, 0, 0, bias, kept, u);
  std::memcpy(to.param + i, param, count * sizeof(Float));
  if (to.master != nullptr) std::memcpy(to.master + s, master, count * 4);
  for (int n = 0; n < Rule::kStates; ++n) std::memcpy(to.state[n] + s, state[n], count * 4);
}

// Whether a unit must not change: its mask says so, or it has no state.
inline bool is_frozen(const UpdateTensor& t, int64_t unit) {
  if (t.row != nullptr && t.row[unit] < 0) return true;
  switch (t.kind) {
    case MaskKind::kNone: return false;
    case MaskKind::kBytes: return static_cast<const uint8_t*>(t.frozen)[unit] != 0;
    case MaskKind::kBits: return static_cast<const uint8_t*>(t.frozen)[unit >> 3] >> (unit & 7) & 1;
    case MaskKind::kScores: return static_cast<const float*>(t.frozen)[unit] >= t.threshold;
  }
  return false;
}

struct Run {  // live elements [begin, end) of units [unit, next), their states `shift` further on
  int64_t begin, end, shift, unit, next;
};

// The first run of units from `unit` on whose states follow one another and, where counts are by
// unit, have one count, cut to [begin, end); empty if there is none.
inline Run next_run(const UpdateTensor& t, int64_t unit, int64_t begin, int64_t end) {
  const int64_t inner = t.inner;
  int64_t at = unit * inner;
  for (; at < end && is_frozen(t, unit); at += inner) ++unit;
  if (at >= end) return {end, end, 0, unit, unit};
  const int64_t first = unit, from = at > begin ? at : begin;
  const int64_t slot = t.row == nullptr ? unit : t.row[unit];
  for (++unit, at += inner; at < end && !is_frozen(t, unit); ++unit, at += inner) {
    if (t.row != nullptr && t.row[unit] != slot + (unit - first)) break;
    if (t.step_by_mask && t.step[unit] != t.step[first]) break;
  }
  return {from, at < end ? at : end, (slot - first) * inner, first, unit};
}

// Fetches the live elements that come kAhead later: the hardware does not see past a frozen unit.
constexpr int64_t kAhead = 512;

template <class Float, int kStates>
class Ahead {
 public:
  Ahead(const UpdateTensor& t, const Place<Float>& to, Run first, int64_t end)
      : t_(t), to_(to), run_(first), at_(first.begin), end_(end) {}

  // Keeps kAhead live elements between those that are updated and those that are fetched.
  void pass(int64_t elements) {
    for (credit_ += elements; credit_ > 0 && run_.begin < end_; credit_ -= kLanes) {
      __builtin_prefetch(to_.param + at_, 1);
      __builtin_prefetch(to_.grad + at_);
      if (to_.master != nullptr) __builtin_prefetch(to_.master + at_ + run_.shift, 1);
      for (int n = 0; n < kStates; ++n) __builtin_prefetch(to_.state[n] + at_ + run_.shift, 1);
      at_ += kLanes;
      if (at_ >= run_.end) {
        run_ = next_run(t_, run_.next, run_.end, end_);
        at_ = run_.begin;
      }
    }
  }

 private:
  const UpdateTensor& t_;
  const Place<Float> to_;
  Run run_;
  int64_t at_, end_, credit_ = 0;
};

// What one thread keeps between the pieces of a tensor.
template <class Rule>
struct Worker {
  const Rule& rule;
  Biases<Rule> biases;
  Draws draws;
  bool stochastic;
  float u[kLanes];

  Worker(const Rule& given, bool with_draws)
      : rule(given), biases(given), draws{}, stochastic(with_draws) {}

  void to(const UpdateTensor& t, int64_t draw) {
    draws.key = philox_key(t.seed, draw);
    draws.first = -1;
  }
  const float* draw(const UpdateTensor& t, int64_t i) {
    if (!stochastic) return nullptr;
    draws.to(t.start + i, kLanes, u);
    return u;
  }
};

// Elements [begin, end) of units that are frozen as a whole.
template <class Float, class Rule>
void update_units(Worker<Rule>& worker, const UpdateTensor& t, const Place<Float> to, int64_t begin,
                  int64_t end) {
  const Rule rule = worker.rule;  // stores cannot change it: its numbers stay in registers
  Run run = next_run(t, begin / t.inner, begin, end);
  Ahead<Float, Rule::kStates> ahead(t, to, run, end);
  const bool gaps = run.begin > begin || run.end < end;
  if (gaps) ahead.pass(kAhead);
  Bias bias = t.step == nullptr || t.step_by_mask ? Bias() : worker.biases.of(t.step[0]);
  for (; run.begin < end; run = next_run(t, run.next, run.end, end)) {
    if (t.step_by_mask) bias = worker.biases.of(t.step[run.unit]);
    int64_t i = run.begin;
    for (; i + kLanes <= run.end; i += kLanes) {
      if (gaps) ahead.pass(kLanes);
      update_vector(rule, to, i, i + run.shift, bias, vi{}, worker.draw(t, i));
    }
    const int64_t rest = run.end - i;
    if (rest == 0) continue;
    if (gaps) ahead.pass(rest);
    update_some(rule, to, i, i + run.shift, rest, bias, vi{}, worker.draw(t, i));
  }
}

// The frozen lanes among the `count` <= kLanes elements from i on, a multiple of kLanes.
inline vi frozen_lanes(const UpdateTensor& t, int64_t i, int64_t count) {
  switch (t.kind) {
    case MaskKind::kNone: return vi{};
    case MaskKind::kBytes: {
      vb bytes = {};
      std::memcpy(&bytes, static_cast<const uint8_t*>(t.frozen) + i, count);
      return __builtin_convertvector(bytes, vi) != 0;
    }
    case MaskKind::kBits: {
      uint32_t word = 0;
      std::memcpy(&word, static_cast<const uint8_t*>(t.frozen) + (i >> 3), (count + 7) >> 3);
      return (((vi{} + int32_t(word >> (i & 7))) >> lane_ids()) & 1) != 0;
    }
    case MaskKind::kScores: {
      const float* score = static_cast<const float*>(t.frozen) + i;
      return (count == kLanes ? load(score) : load_some(score, count, 0.f)) >= t.threshold;
    }
  }
  return vi{};
}

// Elements [begin, end) with a mask value each, and counts that are theirs alone.
template <class Float, class Rule>
void update_elements(Worker<Rule>& worker, const UpdateTensor& t, const Place<Float> to,
                     int64_t begin, int64_t end) {
  const UpdateTensor own = t;  // see update_units
  const Rule rule = worker.rule;
  Bias bias = own.step == nullptr || own.step_by_mask ? Bias() : worker.biases.of(own.step[0]);
  const auto count = [&](vf step, vi kept) {
    const vf next = select(kept, step, step + 1.f);
    bias = worker.biases.of(next, ~kept);
    return next;
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const vi kept = frozen_lanes(own, i, kLanes);
    if (lane_bits(~kept) == 0) continue;
    if (own.step_by_mask) store(own.step + i, count(load(own.step + i), kept));
    update_vector(rule, to, i, i, bias, kept, worker.draw(own, i));
  }
  const int64_t rest = end - i;
  if (rest <= 0) return;
  const vi kept = frozen_lanes(own, i, rest) | (lane_ids() >= int32_t(rest));
  if (own.step_by_mask) {
    store_some(own.step + i, rest, count(load_some(own.step + i, rest, 0.f), kept));
  }
  update_some(rule, to, i, i, rest, bias, kept, worker.draw(own, i));
}

// Whether every element has a mask value, and state in its place.
inline bool by_element(const UpdateTensor& t) {
  return t.inner == 1 && t.row == nullptr && t.numel > 0;
}

// Pieces of chunks go to whichever thread is free: frozen ones take no time.
template <class Float, class Rule>
void update_list(const Rule& rule, const UpdateList& list, const Parallel& threads) {
  const int64_t chunks = list.count == 0 ? 0 : list.tensor[list.count - 1].end_chunk;
  // Enough to share out, few enough that waits for memory at their beginnings do not count.
  const int64_t piece = chunks < 64 ? 1 : chunks / 64;
  int64_t taken = 0;
  parallel_for(threads, chunks, list.grain, [&](int64_t, int64_t) {
    Worker<Rule> worker(rule, list.stochastic);
    for (int64_t n = -1;;) {
      int64_t chunk = __atomic_fetch_add(&taken, piece, __ATOMIC_RELAXED);
      if (chunk >= chunks) return;
      for (const int64_t stop = chunk + piece < chunks ? chunk + piece : chunks; chunk < stop;) {
        const int64_t last = n;
        while (n < 0 || list.tensor[n].end_chunk <= chunk) ++n;
        const UpdateTensor& t = list.tensor[n];
        if (n != last) worker.to(t, list.draw);
        const int64_t first = n == 0 ? 0 : list.tensor[n - 1].end_chunk;
        const int64_t until = t.end_chunk < stop ? t.end_chunk : stop;
        const int64_t begin = (chunk - first) * kUpdateChunk;
        const int64_t full = (until - first) * kUpdateChunk, end = full < t.numel ? full : t.numel;
        const Place<Float> to = {static_cast<Float*>(t.param),
                                 static_cast<const Float*>(t.grad),
                                 t.master,
                                 {t.state[0], t.state[1], t.state[2]}};
        if (by_element(t)) {
          update_elements(worker, t, to, begin, end);
        } else {
          update_units(worker, t, to, begin, end);
        }
        chunk = until;
      }
    }
  });
}

template <class Rule>
void update(const Rule& rule, const UpdateList& list, const Parallel& threads) {
  if (list.dtype == DType::kBFloat16) return update_list<bf16>(rule, list, threads);
  update_list<float>(rule, list, threads);
}

// A pass of its own, but for counts of elements: those of rows belong to several threads.
void count_steps(const UpdateList& list, const Parallel& threads) {
  for (int64_t n = 0; n < list.count; ++n) {
    const UpdateTensor& t = list.tensor[n];
    if (!t.step_by_mask) t.step[0] += 1.f;
    if (!t.step_by_mask || by_element(t)) continue;
    parallel_for(threads, t.num_steps, 1 << 14, [&t](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        t.step[j] = is_frozen(t, j) ? t.step[j] : t.step[j] + 1.f;
    });
  }
}

// The sum of squares of live elements [begin, end).
template <class Float>
double square_sum(const UpdateTensor& t, int64_t begin, int64_t end) {
  typedef double vd __attribute__((vector_size(8 * kLanes)));
  const Float* grad = static_cast<const Float*>(t.grad);
  vd total = {};
  const auto add = [&total](vf x) {
    const vd wide = __builtin_convertvector(x, vd);
    total += wide * wide;
  };
  if (t.inner == 1) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = end - i < kLanes ? end - i : kLanes;
      const vi kept = frozen_lanes(t, i, count);
      const vf x = count == kLanes ? load(grad + i) : load_some(grad + i, count, 0.f);
      add(select(kept, vf{}, x));
    }
  } else {
    for (Run run = next_run(t, begin / t.inner, begin, end); run.begin < end;
         run = next_run(t, run.next, run.end, end)) {
      for_row(grad + run.begin, run.end - run.begin, 0.f, [&](int64_t, vf x) { add(x); });
    }
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

}  // namespace

// Chunks apart, then one after the other: the same bits for any number of threads.
void masked_square_sum(const MaskedSquareSumParams& p, const Parallel& threads) {
  const UpdateList& list = p.list;
  const int64_t chunks = list.count == 0 ? 0 : list.tensor[list.count - 1].end_chunk;
  parallel_for(threads, chunks, list.grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0, chunk = begin; chunk < end; ++chunk) {
      while (list.tensor[n].end_chunk <= chunk) ++n;
      const UpdateTensor& t = list.tensor[n];
      const int64_t from = (chunk - (n == 0 ? 0 : list.tensor[n - 1].end_chunk)) * kUpdateChunk;
      const int64_t to = t.numel - from < kUpdateChunk ? t.numel : from + kUpdateChunk;
      p.partial[chunk] = list.dtype == DType::kBFloat16 ? square_sum<bf16>(t, from, to)
                                                        : square_sum<float>(t, from, to);
    }
  });
  for (int64_t n = 0, chunk = 0; n < list.count; ++n) {
    p.out[n] = 0;
    for (; chunk < list.tensor[n].end_chunk; ++chunk) p.out[n] += p.partial[chunk];
  }
}

void masked_sgd(const MaskedSgdParams& p, const Parallel& threads) {
  if (p.momentum != 0.f) return update(Sgd<1>{p}, p.list, threads);
  update(Sgd<0>{p}, p.list, threads);
}

void masked_adam(const MaskedAdamParams& p, const Parallel& threads) {
  count_steps(p.list, threads);
  if (p.amsgrad) return update(Adam<3>(p), p.list, threads);
  update(Adam<2>(p), p.list, threads);
}

void masked_lion(const MaskedLionParams& p, const Parallel& threads) {
  update(Lion{p}, p.list, threads);
}

}  // namespace gose::cpu::GOSE_LEVEL
