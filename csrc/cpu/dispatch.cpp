// dispatch: a counting sort. Every chunk of slots counts its experts, one scan gives each chunk its
// first row of every expert, every chunk places its slots. Stable whatever the threads do.
#include "vec.h"

namespace gose::cpu::GOSE_LEVEL {

void dispatch(const DispatchParams& p, const Parallel& threads) {
  const int64_t N = p.T * p.K, E1 = p.E + 1;
  const int64_t chunks = (N + p.chunk - 1) / p.chunk;
  parallel_for(threads, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t* count = p.scratch + c * E1;
      for (int64_t e = 0; e < E1; ++e) count[e] = 0;
      const int64_t stop = N < (c + 1) * p.chunk ? N : (c + 1) * p.chunk;
      for (int64_t n = c * p.chunk; n < stop; ++n) ++count[p.expert[n]];
    }
  });
  int32_t row = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    p.offset[e] = row;
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t count = p.scratch[c * E1 + e];
      p.scratch[c * E1 + e] = row;
      row += count;
    }
  }
  p.offset[p.E] = row;
  for (int64_t n = row; n < N; ++n) p.token[n] = -1;
  parallel_for(threads, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t* next = p.scratch + c * E1;
      int64_t n = c * p.chunk;
      const int64_t stop = N < n + p.chunk ? N : n + p.chunk;
      int64_t t = n / p.K, k = n % p.K;
      for (; n < stop; ++n) {
        const int64_t e = p.expert[n];
        if (e == p.E) {
          p.row[n] = -1;
        } else {
          p.row[n] = next[e];
          p.token[next[e]++] = int32_t(t);
        }
        if (++k == p.K) k = 0, ++t;
      }
    }
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
