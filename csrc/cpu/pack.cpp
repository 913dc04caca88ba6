// pack: all panels of all experts, once, for calls to come.
#include "pack.h"

namespace gose::cpu::GOSE_LEVEL {

void pack(const PackParams& p, const Parallel& threads) {
  constexpr int64_t kRun = 16;  // panels of a work item
  const int64_t panels = panels_of(p), runs = (panels + kRun - 1) / kRun;
  const int64_t steps = (p.K + kAlignK - 1) / kAlignK * kAlignK;
  parallel_for(threads, p.E * runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = item / runs, first = item % runs * kRun;
      const int64_t count = panels - first < kRun ? panels - first : kRun;
      char* to = p.packed + e * p.stride_packed + first * steps * kPanel * bytes_of(p.dtype);
      pack_run(p, e, first, count, to);
    }
  });
}

}  // namespace gose::cpu::GOSE_LEVEL
