// The inner product of every expert GEMM: C[rows][32] = A[rows][K] . panel[K][32], float32 sums.
//
// A panel is 32 columns of a weight matrix, packed so that every level reads it in one sequential
// stream: float32 and float16 as [K][32], bfloat16 as [K/2][32][2] (pairs along K: what vdpbf16ps
// and AMX tiles multiply). Every column is summed with K ascending, whatever the rows of the call:
// a token's bits do not depend on the batch it comes in. Quantized panels (quantized.h) are widened
// in registers, or in a scratch panel that stays in the first-level cache.
#pragma once

#include "../params.h"

namespace gose::cpu {

constexpr int64_t kPanel = 32;     // columns of a panel
constexpr int64_t kAlignK = 32;    // K of A and panel is a multiple: a step of AMX
constexpr int64_t kMostRows = 48;  // of any kernel

struct MicroGemm {
  const char* name;
  int32_t rows;    // most rows of one call
  bool bf16_rows;  // A holds bfloat16, else float32
  // `ahead` points to `lines` cache lines that the caller reads next: they are prefetched, spread
  // over the call.
  void (*run)(const void* a, int64_t stride_a, int32_t rows, const void* panel, int64_t K, float* c,
              const char* ahead, int64_t lines);
};

// Steps [begin, end) of K, whole multiples of kAlignK, as a bfloat16 panel without the r.
using WidenQuantized = void(const void* panel, int64_t begin, int64_t end, uint16_t* out);

#define GOSE_DECLARE_GEMMS(level)         \
  namespace level {                       \
  extern const MicroGemm kGemmOfFloat32;  \
  extern const MicroGemm kGemmOfBFloat16; \
  extern const MicroGemm kGemmOfFloat16;  \
  extern const MicroGemm kGemmOfInt8;     \
  extern const MicroGemm kGemmOfInt4;     \
  WidenQuantized widen_int8, widen_int4;  \
  }
GOSE_DECLARE_GEMMS(portable)
#if defined(__x86_64__)
GOSE_DECLARE_GEMMS(avx2)
GOSE_DECLARE_GEMMS(avx512)
namespace avx512_bf16 {
extern const MicroGemm kGemmOfBFloat16;
extern const MicroGemm kGemmOfInt8;
extern const MicroGemm kGemmOfInt4;
}  // namespace avx512_bf16
namespace amx {
extern const MicroGemm kGemmOfBFloat16;
extern const MicroGemm kGemmOfInt8;
extern const MicroGemm kGemmOfInt4;
}  // namespace amx
#endif
#undef GOSE_DECLARE_GEMMS

// Of level_in_use(): x of this dtype times panels of such weights.
const MicroGemm& micro_gemm(DType dtype, Weights weights = Weights::kPlain);
int64_t cache_bytes();  // of a core's second-level cache

}  // namespace gose::cpu
