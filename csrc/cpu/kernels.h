// The CPU kernels of every instruction-set level, and the choice of one level at run time.
//
// csrc/cpu/<op>.cpp is compiled once per level with -DGOSE_LEVEL=<level>. What it shares by header
// stands in anonymous namespaces, and it uses no std:: templates: of two copies of one inline
// function the linker keeps one, perhaps the AVX-512 one, and an older CPU dies on it.
#pragma once

#include "../params.h"

namespace gose::cpu {

// How a kernel asks its host for threads: `run` calls body(begin, end, context) on pieces that
// cover [0, count), at least `grain` long, and returns when all are done. Results must not depend
// on the pieces.
struct Parallel {
  void (*run)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

// One line per kernel: X(name, params).
#define GOSE_CPU_KERNELS(X)                       \
  X(combine, CombineParams)                       \
  X(combine_backward, CombineBackwardParams)      \
  X(entropy, EntropyParams)                       \
  X(entropy_backward, EntropyBackwardParams)      \
  X(dispatch, DispatchParams)                     \
  X(route, RouteParams)                           \
  X(route_backward, RouteBackwardParams)          \
  X(masked_sgd, MaskedSgdParams)                  \
  X(masked_adam, MaskedAdamParams)                \
  X(masked_lion, MaskedLionParams)                \
  X(masked_square_sum, MaskedSquareSumParams)     \
  X(find_live, LiveParams)                        \
  X(quantize, QuantizeParams)                     \
  X(dequantize, DequantizeParams)                 \
  X(pack, PackParams)                             \
  X(quantize_weights, QuantizeWeightsParams)      \
  X(expert_mlp, ExpertMlpParams)                  \
  X(expert_mlp_backward, ExpertMlpBackwardParams) \
  X(grouped_gemm, GroupedGemmParams)              \
  X(distill_loss, DistillParams)                  \
  X(squared_grad, SquaredGradParams)              \
  X(low_rank, LowRankParams)                      \
  X(grouped_gemm_backward, GroupedGemmBackwardParams)

// One line per level that is compiled, worst first: X(level).
#if defined(__x86_64__)
#define GOSE_CPU_LEVELS(X) X(portable) X(avx2) X(avx512)
#else
#define GOSE_CPU_LEVELS(X) X(portable)
#endif

#define GOSE_DECLARE_KERNEL(name, Params) void name(const Params&, const Parallel&);
#define GOSE_DECLARE_LEVEL(level)       \
  namespace level {                     \
  GOSE_CPU_KERNELS(GOSE_DECLARE_KERNEL) \
  }
GOSE_CPU_LEVELS(GOSE_DECLARE_LEVEL)
#undef GOSE_DECLARE_LEVEL
#undef GOSE_DECLARE_KERNEL

struct Kernels {
#define GOSE_KERNEL_POINTER(name, Params) void (*name)(const Params&, const Parallel&);
  GOSE_CPU_KERNELS(GOSE_KERNEL_POINTER)
#undef GOSE_KERNEL_POINTER
};

enum class Level : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* name_of(Level level);
Level best_level();        // what this CPU and operating system can run
Level level_in_use();      // best_level() capped by GOSE_ISA; throws if that is no level
const Kernels& kernels();  // of level_in_use(); avx512_bf16 and amx bring micro-kernels
                           // (microgemm.h) and use AVX-512's kernels

}  // namespace gose::cpu
