// The parts of route that look at all tokens: capacity, and experts that choose.
#pragma once

#include "route_token.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

// Unsigned numbers in the order of the floats; equal for equal ones, NaN largest.
inline uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t u = bits_of(x + 0.f);  // -0 becomes 0
  return u >> 31 != 0 ? ~u : u | 0x80000000u;
}

// Tokens by descending log_p, ties to the smaller id: a radix sort, 8 bits a pass.
inline const uint32_t* by_priority(const RouteScratch& s, int64_t T) {
  uint32_t *key = s.order, *id = key + T, *key_out = id + T, *id_out = key_out + T;
  for (int64_t t = 0; t < T; ++t) key[t] = ~ordered(s.log_p[t]), id[t] = uint32_t(t);
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < T; ++i) ++start[(key[i] >> shift & 255) + 1];
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < T; ++i) {
      const int64_t to = start[key[i] >> shift & 255]++;
      key_out[to] = key[i], id_out[to] = id[i];
    }
    uint32_t* const old_key = key;
    uint32_t* const old_id = id;
    key = key_out, id = id_out, key_out = old_key, id_out = old_id;
  }
  return id;
}

// Slots beyond every expert's capacity become unused.
inline void drop(const RouteParams& p) {
  const RouteInput& in = p.in;
  const uint32_t* order = in.priority ? by_priority(p.scratch, in.T) : nullptr;
  int32_t* taken = block_of(p.scratch, 0, in.E).chosen;
  for (int64_t e = 0; e < in.E; ++e) taken[e] = 0;
  for (int64_t k = 0; k < in.K; ++k) {
    for (int64_t i = 0; i < in.T; ++i) {
      const int64_t n = (order != nullptr ? int64_t(order[i]) : i) * in.K + k;
      const int32_t e = p.expert[n];
      if (e == in.E || taken[e]++ < in.capacity) continue;
      p.expert[n] = int32_t(in.E);
      p.weight[n] = 0.f;
    }
  }
}

// The `count`-th largest of the keys, 8 bits a pass from the top, and how many are above it.
struct Nth {
  uint32_t key;
  int64_t above;
};

inline Nth nth_largest(const uint32_t* key, int64_t T, int64_t count) {
  uint32_t prefix = 0, known = 0;
  int64_t above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t found[256] = {};
    for (int64_t t = 0; t < T; ++t) {
      if ((key[t] & known) == prefix) ++found[key[t] >> shift & 255];
    }
    uint32_t digit = 255;
    while (digit > 0 && above + found[digit] < count) above += found[digit--];
    prefix |= digit << shift;
    known |= 255u << shift;
  }
  return {prefix, above};
}

// expert_choice: expert e takes its `capacity` likeliest tokens; log_p of the others becomes
// -infinity.
inline void take_tokens(const RouteParams& p, int64_t e) {
  const int64_t T = p.in.T, width = padded(p.in.E);
  uint32_t* key = p.scratch.order + e * T;
  float* log_p = p.scratch.log_p + e;
  for (int64_t t = 0; t < T; ++t) key[t] = ordered(log_p[t * width]);
  const uint32_t none = ordered(-kInfinity);
  const Nth nth = p.in.capacity < T ? nth_largest(key, T, p.in.capacity) : Nth{none, T};
  int64_t room = p.in.capacity - nth.above;  // for tokens at the threshold itself
  int32_t load = 0;
  for (int64_t t = 0; t < T; ++t) {
    const bool taken = key[t] > none && (key[t] > nth.key || (key[t] == nth.key && room-- > 0));
    if (!taken) log_p[t * width] = -kInfinity;
    load += taken;
  }
  p.load[e] = load;
}

// Sixteen experts a piece: a cache line of log_p, so threads share none.
inline void take_all(const RouteParams& p, const Parallel& threads) {
  parallel_for(threads, padded(p.in.E) / 16, grain_of(p.in.T * 64),
               [&p](int64_t begin, int64_t end) {
                 const int64_t stop = end * 16 < p.in.E ? end * 16 : p.in.E;
                 for (int64_t e = begin * 16; e < stop; ++e) take_tokens(p, e);
               });
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
