// masked_sgd_, masked_adam_, masked_lion_: one pass over all tensors of a list. Runs of frozen mask
// values and vectors of frozen elements are skipped without loading them; in mixed vectors frozen
// lanes are selected, so they keep their bits.
//
// Compiled without contraction (setup.py): the same bits at every level.
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

// What a step count does to adam's step; the other rules have no counts.
struct Bias {
  vf rate, root;  // lr / (1 - beta1^step), sqrt(1 - beta2^step)
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
      state[0] = p.momentum * state[0] + g;
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
    return {splat(float(p.lr / left1)), splat(float(__builtin_sqrt(left2)))};
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
    param = param * p.keep - b.rate * (state[0] / (sqrt(highest) / b.root + p.eps));
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

  // Of one vector of counts.
  Bias of(vf step) {
    Bias out = of(step[0]);
    for (int i = 1; i < kLanes; ++i) {
      if (step[i] == step[0]) continue;
      const Bias& other = of(step[i]);
      out.rate[i] = other.rate[0];
      out.root[i] = other.root[0];
    }
    return out;
  }

 private:
  const Rule& rule_;
  bool used_[16] = {};
  float step_[16];
  Bias bias_[16];
};

// Whether no lane is set.
inline bool none(vi x) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x) == 0;
#else
  return sum(x) == 0;
#endif
}

// Elements that are fetched ahead: the hardware does not see past a frozen row.
constexpr int64_t kAhead = 512;

// One vector of elements, `count` of them: all of them where kFull. Frozen lanes keep their bits.
template <bool kFull, class Rule>
inline void update_vector(const Rule& rule, const UpdateTensor& t, int64_t i, int64_t count,
                          const Bias& bias, vi kept) {
  const auto load_part = [&](const float* p) {
    return kFull ? load(p + i) : load_some(p + i, count, 0.f);
  };
  const auto store_part = [&](float* p, vf x) {
    kFull ? store(p + i, x) : store_some(p + i, count, x);
  };
  const vf old = load_part(t.param);
  vf param = old, state[3], old_state[3];
  for (int s = 0; s < Rule::kStates; ++s) state[s] = old_state[s] = load_part(t.state[s]);
  rule(bias, load_part(t.grad), param, state);
  store_part(t.param, select(kept, old, param));
  for (int s = 0; s < Rule::kStates; ++s) {
    store_part(t.state[s], select(kept, old_state[s], state[s]));
  }
}

// Elements [begin, end), all live, of one step count; the next live ones start at `next`.
template <class Rule>
void update_run(const Rule& rule, const UpdateTensor& t, int64_t begin, int64_t end, int64_t next,
                const Bias& bias) {
  const UpdateTensor own = t;  // stores cannot change it: its pointers stay in registers
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    if (next != end) {
      const int64_t ahead = i + kAhead < end ? i + kAhead : next + (i + kAhead - end);
      __builtin_prefetch(own.param + ahead, 1);
      __builtin_prefetch(own.grad + ahead);
      for (int s = 0; s < Rule::kStates; ++s) __builtin_prefetch(own.state[s] + ahead, 1);
    }
    update_vector<true>(rule, own, i, kLanes, bias, vi{});
  }
  if (i < end) update_vector<false>(rule, own, i, end - i, bias, vi{});
}

// Elements [begin, end) with a mask value each.
template <class Rule>
void update_elements(const Rule& rule, const UpdateTensor& t, int64_t begin, int64_t end,
                     Biases<Rule>& biases) {
  const UpdateTensor own = t;
  Bias bias = own.step == nullptr || own.step_by_mask ? Bias() : biases.of(own.step[0]);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    vb frozen;
    std::memcpy(&frozen, own.frozen + i, sizeof frozen);
    const vi kept = __builtin_convertvector(frozen, vi) != 0;
    if (none(~kept)) continue;
    if (own.step_by_mask) bias = biases.of(load(own.step + i));
    update_vector<true>(rule, own, i, kLanes, bias, kept);
  }
  const int64_t rest = end - i;
  if (rest <= 0) return;
  vb frozen = ~vb{};
  std::memcpy(&frozen, own.frozen + i, rest);
  const vi kept = __builtin_convertvector(frozen, vi) != 0;
  if (own.step_by_mask) bias = biases.of(load_some(own.step + i, rest, 0.f));
  update_vector<false>(rule, own, i, rest, bias, kept);
}

// The end of the run of equal masks (and, where they are by mask, equal counts) at element i.
inline int64_t end_of_run(const UpdateTensor& t, int64_t i, int64_t end) {
  const int64_t first = i / t.inner;
  int64_t last = first;
  while ((last + 1) * t.inner < end && !t.frozen[last + 1] == !t.frozen[first] &&
         (!t.step_by_mask || t.step[last + 1] == t.step[first])) {
    ++last;
  }
  return (last + 1) * t.inner < end ? (last + 1) * t.inner : end;
}

template <class Rule>
void update_chunk(const Rule& rule, const UpdateTensor& t, int64_t begin, int64_t end,
                  Biases<Rule>& biases) {
  if (t.frozen != nullptr && t.inner == 1) return update_elements(rule, t, begin, end, biases);
  if (t.frozen == nullptr) {
    const Bias bias = t.step == nullptr ? Bias() : biases.of(t.step[0]);
    return update_run(rule, t, begin, end, end, bias);
  }
  for (int64_t i = begin; i < end;) {
    const int64_t first = i / t.inner, stop = end_of_run(t, i, end);
    if (!t.frozen[first]) {
      int64_t next = stop;
      while (next < t.numel && t.frozen[next / t.inner]) next = (next / t.inner + 1) * t.inner;
      if (next >= t.numel) next = stop;
      const Bias bias = t.step == nullptr ? Bias() : biases.of(t.step[t.step_by_mask ? first : 0]);
      update_run(rule, t, i, stop, next, bias);
    }
    i = stop;
  }
}

template <class Rule>
void update(const Rule& rule, const UpdateList& list, const Parallel& threads) {
  const int64_t chunks = list.count == 0 ? 0 : list.tensor[list.count - 1].end_chunk;
  parallel_for(threads, chunks, list.grain, [&](int64_t begin, int64_t end) {
    Biases<Rule> biases(rule);
    int64_t n = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (list.tensor[n].end_chunk <= chunk) ++n;
      const UpdateTensor& t = list.tensor[n];
      const int64_t from = (chunk - (n == 0 ? 0 : list.tensor[n - 1].end_chunk)) * kUpdateChunk;
      const int64_t to = t.numel - from < kUpdateChunk ? t.numel : from + kUpdateChunk;
      update_chunk(rule, t, from, to, biases);
    }
  });
}

// A pass of its own: a count of a row belongs to elements of several threads.
void count_steps(const UpdateList& list, const Parallel& threads) {
  for (int64_t n = 0; n < list.count; ++n) {
    const UpdateTensor& t = list.tensor[n];
    if (!t.step_by_mask) {
      t.step[0] += 1.f;
      continue;
    }
    parallel_for(threads, t.num_steps, 1 << 14, [&t](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) t.step[j] = t.frozen[j] ? t.step[j] : t.step[j] + 1.f;
    });
  }
}

}  // namespace

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
