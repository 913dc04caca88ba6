// torch's threads for the CPU kernels.
#pragma once

#include <pthread.h>

#include "bind.h"
#include "cpu/kernels.h"

namespace gose {

// The threads of a process do not live on in a forked child, but OpenMP would wait for them.
inline bool in_forked_child = false;
inline const int watch_forks = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

inline const cpu::Parallel kTorchThreads = {
    [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      if (in_forked_child && count > grain && torch::stable::get_num_threads() > 1) {
        STD_TORCH_CHECK(false,
                        "gose_kernels: a forked child can run on one thread only; call "
                        "torch.set_num_threads(1) in it, or start it with the spawn method");
      }
      if (count > 0)
        STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
    }};

}  // namespace gose
