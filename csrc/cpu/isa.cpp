// Which instruction-set level runs here. Compiled once, for the oldest CPU.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "microgemm.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>

namespace gose::cpu {
namespace {

constexpr Level kLevels[] = {Level::kPortable, Level::kAvx2, Level::kAvx512, Level::kAvx512Bf16,
                             Level::kAmx};

#if defined(__x86_64__)
// Linux hands out the 8 KB tile state only to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM,
// XFEATURE_XTILEDATA). Without it the first tile instruction is a SIGILL.
bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return (d & kBf16) && (d & kTile) && amx_permitted();
}
#endif

Level probe() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // the builtins below also ask the operating system (XCR0)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (!avx2) return Level::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Level::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Level::kAvx512;
  return has_amx_bf16() ? Level::kAmx : Level::kAvx512Bf16;
#else
  return Level::kPortable;
#endif
}

Level capped() {
  const char* wanted = std::getenv("GOSE_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_level();
  std::string known;
  for (Level level : kLevels) {
    if (std::strcmp(wanted, name_of(level)) == 0) {
      return level < best_level() ? level : best_level();
    }
    known += std::string(known.empty() ? "" : ", ") + name_of(level);
  }
  throw std::runtime_error("ValueError: GOSE_ISA must be one of " + known + ", got " + wanted);
}

#define GOSE_KERNEL_OF(name, Params) &LEVEL::name,
constexpr Kernels kPortable = {
#define LEVEL portable
    GOSE_CPU_KERNELS(GOSE_KERNEL_OF)
#undef LEVEL
};
#if defined(__x86_64__)
constexpr Kernels kAvx2 = {
#define LEVEL avx2
    GOSE_CPU_KERNELS(GOSE_KERNEL_OF)
#undef LEVEL
};
constexpr Kernels kAvx512 = {
#define LEVEL avx512
    GOSE_CPU_KERNELS(GOSE_KERNEL_OF)
#undef LEVEL
};
#endif

}  // namespace

const char* name_of(Level level) {
  switch (level) {
    case Level::kPortable: return "portable";
    case Level::kAvx2: return "avx2";
    case Level::kAvx512: return "avx512";
    case Level::kAvx512Bf16: return "avx512_bf16";
    case Level::kAmx: return "amx";
  }
  return "unknown";
}

Level best_level() {
  static const Level level = probe();
  return level;
}

Level level_in_use() {
  static const Level level = capped();
  return level;
}

const Kernels& kernels() {
  switch (level_in_use()) {
#if defined(__x86_64__)
    case Level::kAmx:
    case Level::kAvx512Bf16:
    case Level::kAvx512: return kAvx512;
    case Level::kAvx2: return kAvx2;
#else
    case Level::kAmx:
    case Level::kAvx512Bf16:
    case Level::kAvx512:
    case Level::kAvx2:
#endif
    case Level::kPortable: return kPortable;
  }
  return kPortable;
}

#define GOSE_GEMM_OF(level)                                     \
  switch (weights) {                                            \
    case Weights::kInt8: return level::kGemmOfInt8;             \
    case Weights::kInt4: return level::kGemmOfInt4;             \
    case Weights::kPlain: break;                                \
  }                                                             \
  switch (dtype) {                                              \
    case DType::kBFloat16: return level::kGemmOfBFloat16;       \
    case DType::kFloat16: return level::kGemmOfFloat16;         \
    default: return level::kGemmOfFloat32; /* others refused */ \
  }

// The kernels on bfloat16 rows alone.
#define GOSE_BFLOAT16_GEMM_OF(level)                     \
  switch (weights) {                                     \
    case Weights::kInt8: return level::kGemmOfInt8;      \
    case Weights::kInt4: return level::kGemmOfInt4;      \
    case Weights::kPlain: return level::kGemmOfBFloat16; \
  }

const MicroGemm& micro_gemm(DType dtype, Weights weights) {
  switch (level_in_use()) {
#if defined(__x86_64__)
    case Level::kAmx:
      if (dtype == DType::kBFloat16) GOSE_BFLOAT16_GEMM_OF(amx)
      [[fallthrough]];
    case Level::kAvx512Bf16:
      // Intel's cores run vdpbf16ps at a quarter of the rate of the multiply-add it replaces two
      // of.
      if (dtype == DType::kBFloat16 && __builtin_cpu_is("amd")) GOSE_BFLOAT16_GEMM_OF(avx512_bf16)
      [[fallthrough]];
    case Level::kAvx512: GOSE_GEMM_OF(avx512)
    case Level::kAvx2: GOSE_GEMM_OF(avx2)
#else
    case Level::kAmx:
    case Level::kAvx512Bf16:
    case Level::kAvx512:
    case Level::kAvx2:
#endif
    case Level::kPortable: break;
  }
  GOSE_GEMM_OF(portable)
}
#undef GOSE_BFLOAT16_GEMM_OF
#undef GOSE_GEMM_OF

int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return int64_t(known > 0 ? known : 1 << 20);
  }();
  return bytes;
}

}  // namespace gose::cpu
